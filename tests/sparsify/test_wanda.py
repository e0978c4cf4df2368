import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Stats, apply
from jaxweights.sparsify import magnitude, wanda, wanda_scores
from jaxweights.weights import Axes, Masked
from tests._fixtures import fixture


def stats_of(**second_moments):
    """Statistics of 100 tokens per matrix."""
    values = {}
    for path, moment in second_moments.items():
        moment = jnp.asarray(moment, jnp.float32)
        count = jnp.full(moment.shape[:-1], 100, jnp.int32)
        values[path] = {"second_moment": moment, "count": count}
    return Stats(values)


def sample(shape=(12, 8), stack=()):
    key_w, key_x = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(key_w, (*stack, *shape))
    return weight, jnp.exp(jax.random.normal(key_x, (*stack, shape[0])))


def mask_of(weight, moment, **settings):
    settings = {"sparsity": 0.5} | settings
    if "of" in settings:
        del settings["sparsity"]
    return apply(wanda(**settings), {"w": weight}, stats=stats_of(w=moment))["w"].mask


CASES = {
    "wanda_s50": {"sparsity": 0.5},
    "wanda_s30": {"sparsity": 0.3},
    "wanda_nm24": {"keep": 2, "of": 4},  # theirs counts what is removed
    "wanda_nm48": {"keep": 4, "of": 8},
}


def inputs_of(data, case):
    """Inputs of the linears as their loop sees them: each block's output comes after pruning."""
    x, inputs = data["X"].reshape(-1, 32), {}
    relu = lambda y: np.maximum(y, 0)  # noqa: E731
    for layer in ("layer0", "layer1"):
        inputs[f"{layer}.fc1"] = x
        inputs[f"{layer}.fc2"] = relu(x @ data[f"before/{layer}.fc1"].T)
        hidden = relu(x @ data[f"{case}/after/{layer}.fc1"].T)
        x = x + hidden @ data[f"{case}/after/{layer}.fc2"].T
    return inputs


def test_the_replayed_inputs_are_the_recorded_ones():
    data = fixture("sparsify/wanda.npz")
    for name, x in inputs_of(data, "wanda_s50").items():
        recorded = data[f"wanda_s50/input/{name}"].reshape(x.shape)
        np.testing.assert_allclose(x, recorded, atol=1e-5)  # float32 products of 48 terms


@pytest.mark.parametrize("case", CASES)
def test_zeros_and_survivors_equal_the_authors(case):
    data = fixture("sparsify/wanda.npz")
    for name, x in inputs_of(data, case).items():
        kernel = jnp.asarray(data[f"before/{name}"].T)
        moment = (x.astype(np.float64) ** 2).sum(axis=0)
        pruned = apply(wanda(**CASES[case]), {"w": kernel}, stats=stats_of(w=moment))["w"]
        np.testing.assert_array_equal(pruned.materialize(), data[f"{case}/after/{name}"].T)


def test_every_output_loses_the_lowest_products_of_weight_and_norm():
    weight, moment = sample()
    scores = (
        np.abs(np.asarray(weight, np.float64)) * np.sqrt(np.asarray(moment, np.float64))[:, None]
    )
    np.testing.assert_allclose(wanda_scores(weight, moment), scores, rtol=1e-6)  # two roundings
    expected = np.ones(scores.shape, bool)
    for column in range(8):
        expected[np.argsort(scores[:, column])[:6], column] = False
    np.testing.assert_array_equal(mask_of(weight, moment), expected)
    assert (
        expected != apply(magnitude(sparsity=0.5, group="output"), {"w": weight})["w"].mask
    ).any()


def test_rescaling_an_input_against_its_row_leaves_the_mask():
    weight, moment = sample()
    factor = 2.0 ** jnp.arange(-6.0, 6.0)  # exact in floating point
    scaled = mask_of(weight / factor[:, None], moment * factor**2)
    np.testing.assert_array_equal(scaled, mask_of(weight, moment))


def test_permuting_inputs_permutes_the_mask():
    weight, moment = sample()
    order = jax.random.permutation(jax.random.key(2), 12)
    np.testing.assert_array_equal(
        mask_of(weight[order], moment[order]), mask_of(weight, moment)[order]
    )


@pytest.mark.parametrize("settings", [{"group": "output"}, {"keep": 2, "of": 4}, {"group": "leaf"}])
def test_equal_inputs_make_it_magnitude(settings):
    weight, _ = sample()
    asked = settings if "of" in settings else settings | {"sparsity": 0.5}
    expected = apply(magnitude(**asked), {"w": weight})["w"].mask
    np.testing.assert_array_equal(mask_of(weight, jnp.full(12, 3.0), **settings), expected)


def test_it_errs_less_than_magnitude_where_inputs_differ():
    key_x, key_w = jax.random.split(jax.random.key(0))
    scale = jnp.where(jnp.arange(64) < 8, 10.0, 1.0)
    x = jax.random.normal(key_x, (512, 64)) * scale[None]
    weight = jax.random.normal(key_w, (64, 32)) / 8
    pruned = {
        "wanda": apply(wanda(sparsity=0.5), {"w": weight}, stats=stats_of(w=(x**2).sum(axis=0))),
        "magnitude": apply(magnitude(sparsity=0.5), {"w": weight}),
    }
    errors = {
        name: float(jnp.sum((x @ (weight - params["w"].materialize())) ** 2))
        for name, params in pruned.items()
    }
    assert errors["wanda"] < 0.4 * errors["magnitude"]


def test_stacked_matrices_use_their_own_statistics():
    weight, moment = sample(stack=(3,))
    stats = stats_of(w=moment)
    pruned = apply(wanda(sparsity=0.5), {"w": weight}, stats=stats, layout={"w": Axes()})["w"]
    for i in range(3):
        np.testing.assert_array_equal(pruned.mask[i], mask_of(weight[i], moment[i]))


def expert_stats(moment):
    values = {"second_moment": moment.at[1].set(0.0), "count": jnp.array([100, 0, 100])}
    return Stats({"w": values})


def test_an_expert_without_tokens_is_an_error_that_names_it():
    weight, moment = sample(stack=(3,))
    with pytest.raises(ValueError) as error:
        apply(wanda(sparsity=0.5), {"w": weight}, stats=expert_stats(moment), layout={"w": Axes()})
    assert (
        "sparsify.wanda: 'w': no calibration token reached 1 of its matrices, at stack index [1]"
        in (str(error.value))
    )
    assert "fallback='magnitude'" in str(error.value)


def test_an_expert_without_tokens_falls_back_to_magnitude_on_request():
    weight, moment = sample(stack=(3,))
    tx = wanda(sparsity=0.5, fallback="magnitude")
    pruned = apply(tx, {"w": weight}, stats=expert_stats(moment), layout={"w": Axes()})["w"]
    expected = apply(magnitude(sparsity=0.5, group="output"), {"w": weight[1]})["w"]
    np.testing.assert_array_equal(pruned.mask[1], expected.mask)
    np.testing.assert_array_equal(pruned.mask[0], mask_of(weight[0], moment[0]))


def test_missing_foreign_and_broken_statistics_are_refused_by_name():
    weight, moment = sample()
    tx = wanda(sparsity=0.5)
    with pytest.raises(ValueError, match=r"sparsify\.wanda: 'stats' is missing"):
        apply(tx, {"w": weight})
    with pytest.raises(ValueError, match="'w': the statistic 'count' is missing"):
        apply(tx, {"w": weight}, stats=Stats({"w": {"second_moment": moment}}))
    with pytest.raises(ValueError, match=r"'second_moment' has shape \(8,\)"):
        apply(tx, {"w": weight}, stats=stats_of(w=moment[:8]))
    with pytest.raises(ValueError, match="'second_moment' is not finite"):
        apply(tx, {"w": weight}, stats=stats_of(w=moment.at[3].set(jnp.inf)))


def test_jit_equals_eager_and_needs_are_declared():
    weight, moment = sample()
    stats, tx = stats_of(w=moment), wanda(sparsity=0.5, group="global")
    assert tx.needs({"w": weight}) == {"w": frozenset({"second_moment", "count"})}
    compiled = jax.jit(lambda p, s: apply(tx, p, stats=s))({"w": weight}, stats)["w"]
    assert isinstance(compiled, Masked)
    eager = apply(tx, {"w": weight}, stats=stats)["w"]
    np.testing.assert_array_equal(compiled.mask, eager.mask)
    assert int((~eager.mask).sum()) == 48


def test_bfloat16_scores_are_compared_in_float32():
    weight, moment = sample()
    weight = weight.astype(jnp.bfloat16)
    mask = mask_of(weight, moment)
    np.testing.assert_array_equal(mask, mask_of(weight.astype(jnp.float32), moment))


def test_an_unknown_fallback_is_refused():
    with pytest.raises(ValueError, match="fallback='skip' must be 'error' or 'magnitude'"):
        wanda(sparsity=0.5, fallback="skip")
