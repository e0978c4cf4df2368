import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import Fold, check_same_function, smooth, smooth_scale
from jaxweights.weights import Rescaled
from tests._fixtures import fixture
from tests.quantize._fold_models import TOKENS, model, stats_of


def layer(shift=True):
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    params = {
        "norm": {"scale": 1 + 0.3 * draw(0, 16), "bias": draw(1, 16)},
        "q": {"kernel": draw(2, 16, 8)},
        "k": {"kernel": draw(3, 16, 4)},
    }

    def fn(p, x):
        h = x * p["norm"]["scale"][None] + p["norm"]["bias"][None]
        return h @ p["q"]["kernel"], h @ p["k"]["kernel"]

    return fn, params, draw(4, 32, 16) * jnp.exp(1.5 * draw(5, 16))[None]


FOLD = Fold("(?:q|k)/kernel", "norm/scale", shifts="norm/bias")


def run(tx, fn, params, x):
    return jw.apply(tx, params, stats=jw.calibrate(fn, params, [x], needs=tx.needs(params)))


def inputs_of(params, x):
    return np.asarray(x * params["norm"]["scale"][None] + params["norm"]["bias"][None])


@pytest.mark.parametrize("case", ["alpha0.5", "alpha0.75"])
def test_folded_leaves_equal_the_authors(case):
    arrays = fixture("quantize/smoothquant.npz")
    kernels = sorted(name for name in arrays if name.startswith("fc"))
    params = {"norm": {"scale": arrays["ln_weight"], "bias": arrays["ln_bias"]}}
    params |= {name: {"kernel": arrays[name].T.copy()} for name in kernels}
    params = jax.tree.map(jnp.asarray, params)
    top = jnp.asarray(arrays["act_scale"])
    entry = {"count": jnp.asarray(40, jnp.int32), "min": -top, "max": 0.5 * top}
    stats = jw.Stats({f"{name}/kernel": entry for name in kernels})
    tx = smooth(
        alpha=float(case[5:]), folds=[Fold(r"fc\d/kernel", "norm/scale", shifts="norm/bias")]
    )
    new = jw.apply(tx, params, stats=stats)
    for name, value in (
        ("ln_weight", new["norm"]["scale"]),
        ("ln_bias", new["norm"]["bias"]),
        *((name, new[name]["kernel"].T) for name in kernels),
    ):
        np.testing.assert_allclose(value, arrays[f"{case}/{name}"], rtol=1e-6)


@pytest.mark.parametrize("name", ["gqa", "biases", "post", "bert"])
@pytest.mark.parametrize("folded", [True, False])
def test_models_compute_what_they_did(name, folded):
    fn, params, folds = model(name)
    tx = smooth(alpha=0.7, folds=folds if folded else ())
    new = jw.apply(tx, params, stats=stats_of(name, "min", "max", "count"))
    assert check_same_function(fn, params, new, [TOKENS]) < 1e-5
    kept = [p for p, leaf in jw.core.flatten(new)[0].items() if isinstance(leaf, Rescaled)]
    expected = {"bert": 5, "post": 5}.get(name, 0) if folded else (6 if name == "bert" else 7)
    assert len(kept) == expected
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, new)))]
    assert folded is False or any(changed)


def test_half_makes_the_largest_inputs_and_weights_of_every_channel_equal():
    fn, params, x = layer()
    new = run(smooth(alpha=0.5, folds=FOLD), fn, params, x)
    weights = np.concatenate([new["q"]["kernel"], new["k"]["kernel"]], axis=1)
    inputs = inputs_of(new, x)
    np.testing.assert_allclose(abs(inputs).max(0), abs(weights).max(1), rtol=1e-5)
    assert abs(inputs).max() < 0.5 * abs(inputs_of(params, x)).max()
    # Once more changes nothing: all scales are 1.
    again = run(smooth(alpha=0.5, folds=FOLD), fn, new, x)
    for a, b in zip(*map(jax.tree.leaves, (new, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_one_brings_all_inputs_to_one_and_zero_all_weights():
    fn, params, x = layer()
    new = run(smooth(alpha=1.0, folds=FOLD), fn, params, x)
    np.testing.assert_allclose(abs(inputs_of(new, x)).max(0), 1, rtol=1e-5)
    new = run(smooth(alpha=0.0, folds=FOLD), fn, params, x)
    weights = np.concatenate([new["q"]["kernel"], new["k"]["kernel"]], axis=1)
    np.testing.assert_allclose(abs(weights).max(1), 1, rtol=1e-5)


def test_kept_scales_are_those_that_would_be_folded_and_can_be_smoothed_again():
    fn, params, x = layer()
    folded = run(smooth(folds=FOLD), fn, params, x)
    kept = run(smooth(), fn, params, x)
    for name in "qk":
        np.testing.assert_allclose(kept[name]["kernel"].base, folded[name]["kernel"], rtol=1e-6)
    assert run(smooth(unfolded="leave"), fn, params, x)["q"]["kernel"] is params["q"]["kernel"]
    again = run(smooth(), fn, kept, x)
    assert isinstance(again["q"]["kernel"].base, jax.Array)  # scales are joined, not nested
    assert check_same_function(fn, params, again, [x]) < 1e-5


def test_quantizing_weights_and_activations_errs_less_after_smoothing():
    fn, params, x = layer()
    new = run(smooth(folds=FOLD), fn, params, x)

    def fake(a, axis):
        scale = np.abs(a).max(axis, keepdims=True) / 127
        return np.round(a / scale) * scale

    def error(p):
        h, w = inputs_of(p, x), np.asarray(p["q"]["kernel"])
        return np.linalg.norm(fake(h, 1) @ fake(w, 0) - h @ w)

    assert error(new) < 0.8 * error(params)


def test_dead_and_unseen_inputs_keep_their_rows_and_masks_stay():
    scale = smooth_scale(jnp.array([0.0, jnp.inf, 4.0]), jnp.array([1.0, 1.0, 0.0]))
    assert scale[:2].tolist() == [1, 1]
    np.testing.assert_allclose(scale[2], 2 / 1e-5**0.5, rtol=1e-6)
    fn, params, x = layer()
    pruned = jw.apply(jw.sparsify.magnitude(sparsity=0.5), params)
    new = run(smooth(folds=FOLD), fn, pruned, x)
    assert new["q"]["kernel"].mask is pruned["q"]["kernel"].mask
    assert check_same_function(fn, pruned, new, [x]) < 1e-5


def test_bfloat16_models_stay_bfloat16_and_compute_nearly_the_same():
    fn, params, x = layer()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x = x.astype(jnp.bfloat16)
    new = run(smooth(folds=FOLD), fn, half, x)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
    assert 1e-5 < check_same_function(fn, half, new, [x], tolerance=0.03)


def test_rounding_a_smoothed_weight_rounds_the_base():
    fn, params, x = layer()
    kept = run(smooth(), fn, params, x)
    rounded = jw.apply(jw.quantize.round_to_nearest(bits=8), kept)
    assert isinstance(rounded["q"]["kernel"].base, jw.Quantized)
    chained = jw.chain(smooth(), jw.quantize.round_to_nearest(bits=8))
    np.testing.assert_array_equal(
        run(chained, fn, params, x)["q"]["kernel"].base.codes, rounded["q"]["kernel"].base.codes
    )
    with pytest.raises(ValueError, match="moves or rescales input axes"):
        jw.chain(smooth(), jw.quantize.gptq(bits=4))


def test_settings_and_leaves_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"quantize.smooth: alpha=1.5 must lie in \[0, 1\]"):
        smooth(alpha=1.5)
    with pytest.raises(ValueError, match="unfolded='no' is unknown"):
        smooth(unfolded="no")
    fn, params, x = layer()
    stats = jw.calibrate(fn, params, [x], needs=smooth().needs(params))
    bad = jax.tree.map(lambda leaf: leaf, params)
    bad["q"]["kernel"] = bad["q"]["kernel"].at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'q/kernel': 1 of 128 values are not finite.*\[1, 2\]"):
        jw.apply(smooth(folds=FOLD), bad, stats=stats)
    quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), params)
    with pytest.raises(ValueError, match=r"'q/kernel': is already a Quantized. Smooth the dense"):
        jw.apply(smooth(), quantized, stats=stats)
