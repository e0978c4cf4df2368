import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import flatten
from jaxweights.quantize import (
    ActivationSteps,
    Fold,
    activation_steps,
    check_same_function,
    outlier_tune,
    outlier_tune_errors,
)
from jaxweights.quantize._folds import find_sites
from jaxweights.quantize._outlier_tune import fold_steps
from tests.quantize._fold_models import TOKENS, model, stats_of

FOLD = Fold("(?:q|k)/kernel", "norm/scale", shifts="norm/bias", biases="(?:q|k)/bias")


def layer():
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    params = {
        "norm": {"scale": 1 + 0.3 * draw(0, 16), "bias": 2 * draw(1, 16)},
        "q": {"kernel": draw(2, 16, 8), "bias": draw(3, 8)},
        "k": {"kernel": draw(4, 16, 4), "bias": draw(5, 4)},
    }

    def fn(p, x):
        h = inputs_of(p, x)
        return h @ p["q"]["kernel"] + p["q"]["bias"][None], h @ p["k"]["kernel"] + p["k"]["bias"][
            None
        ]

    return fn, params, draw(6, 32, 16).at[:, 3].mul(30.0)


def inputs_of(p, x):
    return x * p["norm"]["scale"][None] + p["norm"]["bias"][None]


def tune(fn, params, x, **settings):
    tx = outlier_tune(folds=FOLD, **settings)
    return jw.apply(tx, params, stats=jw.calibrate(fn, params, [x], needs=tx.needs(params)))


def test_the_folded_layer_is_the_same_and_every_channel_spans_the_codes():
    fn, params, x = layer()
    new = tune(fn, params, x)
    assert check_same_function(fn, params, new, [x]) < 1e-5
    h = np.asarray(inputs_of(new, x))
    np.testing.assert_allclose(h.max(0), 127, rtol=1e-4)
    np.testing.assert_allclose(h.min(0), -127, rtol=1e-4)
    plain = np.asarray(inputs_of(params, x))
    z = (plain.max(0) + plain.min(0)) / 2
    np.testing.assert_allclose(
        new["q"]["bias"], params["q"]["bias"] + z @ params["q"]["kernel"], rtol=1e-4, atol=1e-4
    )
    skewed = np.asarray(inputs_of(tune(fn, params, x, symmetrize=False), x))
    np.testing.assert_allclose(abs(skewed).max(0), 127, rtol=1e-4)
    assert (skewed.max(0) + skewed.min(0)).max() > 10


def test_doubling_a_channel_and_halving_its_row_changes_no_code():
    fn, params, x = layer()
    other = jax.tree.map(lambda leaf: leaf, params)
    for name in ("scale", "bias"):
        other["norm"][name] = params["norm"][name].at[5].mul(2)
    for name in "qk":
        other[name]["kernel"] = params[name]["kernel"].at[5].divide(2)
    codes = [np.round(inputs_of(tune(fn, p, x), x)) for p in (params, other)]
    np.testing.assert_array_equal(*codes)


def test_the_inverse_fold_restores_the_weights():
    _, params, _ = layer()
    flat, _ = flatten(params)
    layout = jw.core.conventional_layout(params)
    (site,) = find_sites("test", [FOLD], flat, layout)
    steps = ActivationSteps(jnp.linspace(-3, 3, 16), jnp.exp(jnp.linspace(-2, 2, 16)))
    there = fold_steps(flat, site, steps, layout)
    assert not np.allclose(there["q/bias"], flat["q/bias"])
    inverse = ActivationSteps(-steps.shift / steps.scale, 1 / steps.scale)
    back = fold_steps(there, site, inverse, layout)
    for path in flat:
        np.testing.assert_allclose(back[path], flat[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "biases"])
def test_llamas_compute_what_they_did_layer_by_layer(name):
    fn, params, folds = model(name)
    stats = stats_of(name, "min", "max", "count")
    new = jw.apply(outlier_tune(folds=folds), params, stats=stats)
    assert check_same_function(fn, params, new, [TOKENS]) < 2e-5
    high = jw.calibrate(fn, new, [TOKENS], needs={"layers/mlp/up/kernel": {"max", "min"}})
    reach = jnp.maximum(*(abs(high.get("layers/mlp/up/kernel", n)) for n in ("max", "min")))
    np.testing.assert_allclose(reach, 127, rtol=1e-3)  # RMSNorm: scaled, not centred
    assert flatten(new)[0]["head/kernel"] is flatten(params)[0]["head/kernel"]
    jitted = jax.jit(lambda p: jw.apply(outlier_tune(folds=folds), p, stats=stats))(params)
    for a, b in zip(*map(jax.tree.leaves, (new, jitted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_constant_and_unseen_channels_have_step_one_and_alpha_goes_from_channels_to_tensor():
    low, high = jnp.array([1.0, jnp.inf, -4.0]), jnp.array([1.0, -jnp.inf, 2.0])
    steps = activation_steps(low, high)
    assert steps.shift.tolist() == [1, 0, -1]
    np.testing.assert_allclose(steps.scale, [1, 1, 3 / 127], rtol=1e-6)
    low, high = -jnp.array([1.0, 16.0]), jnp.array([1.0, 16.0])
    for alpha, reach in ((1.0, [1, 16]), (0.5, [4, 16]), (0.0, [16, 16])):
        scale = activation_steps(low, high, bits=6, alpha=alpha).scale
        np.testing.assert_allclose(scale * 31, reach, rtol=1e-5)


def test_centring_lowers_the_error_of_activations_and_errors_are_told_apart():
    fn, params, x = layer()
    x = x.at[:, 3].divide(30.0)  # its own noise would drown the others'
    found, absolute = {}, {}
    for centred in (True, False):
        new = tune(fn, params, x, symmetrize=centred)
        h, weight = inputs_of(new, x), new["q"]["kernel"]
        found[centred] = outlier_tune_errors(h, weight)
        absolute[centred] = float(found[centred].activations * jnp.linalg.norm(h @ weight))
    assert absolute[True] < 0.95 * absolute[False]
    errors = found[True]
    root = float(jnp.hypot(errors.activations, errors.weights))
    assert float(errors.both) == pytest.approx(root, rel=0.3)  # the two hardly correlate
    exact = outlier_tune_errors(jnp.array([[1.0, -3.0]]), jnp.array([[127.0], [1.0]]))
    assert [float(e) for e in exact] == [0, 0, 0]


def test_what_cannot_be_tuned_is_refused():
    _, params, _ = layer()
    with pytest.raises(ValueError, match=r"quantize.outlier_tune: bits=9 must lie between 2 and 8"):
        outlier_tune(folds=FOLD, bits=9)
    with pytest.raises(ValueError, match=r"alpha=2 must lie in \[0, 1\]"):
        outlier_tune(folds=FOLD, alpha=2)
    tx = outlier_tune(folds=FOLD)
    with pytest.raises(ValueError, match=r"quantize.outlier_tune: 'stats' is missing"):
        jw.apply(tx, params)
    with pytest.raises(ValueError, match=r"'q/kernel': the statistic 'count' is missing"):
        jw.apply(tx, params, stats=jw.Stats({}))
    entry = {"count": jnp.asarray(0, jnp.int32), "min": jnp.zeros(16), "max": jnp.zeros(16)}
    with pytest.raises(ValueError, match=r"'k/kernel': no calibration token reached it"):
        jw.apply(tx, params, stats=jw.Stats({"q/kernel": entry, "k/kernel": entry}))
    kernel = outlier_tune(folds=Fold("b/kernel", "a/kernel"))
    tree = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    stats = jw.calibrate(
        lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"],
        tree,
        [jnp.ones((2, 3))],
        needs=kernel.needs(tree),
    )
    with pytest.raises(ValueError, match="none of the folds has a norm's gain as its writer"):
        jw.apply(kernel, tree, stats=stats)


def test_integer_products_with_one_step_err_less_on_tuned_activations():
    fn, params, x = layer()
    truth = fn(params, x)
    stages = [outlier_tune(folds=FOLD), jw.quantize.int8_static()]
    tuned = jw.pipeline(fn, params, [x], stages)
    plain = jw.pipeline(fn, params, [x], stages[1:])
    error = lambda p: float(jnp.linalg.norm(jw.lift(fn)(p, x)[0] - truth[0]))  # noqa: E731
    np.testing.assert_allclose(tuned["q"]["kernel"].input_scale, 1, rtol=1e-4)
    assert error(tuned) < 0.8 * error(plain)
