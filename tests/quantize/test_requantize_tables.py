"""Values go to the levels of a table as well as to integers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import merge_adapters
from jaxweights.core import apply
from jaxweights.quantize import (
    add_deltas,
    fp4,
    fp8,
    mx,
    nf4,
    nvfp4,
    output_error,
    power,
    requantize,
)
from jaxweights.weights import (
    Axes,
    LowRank,
)
from tests.quantize._requantize import correlated, draw, stats_of

TABLES = {
    "nf4": nf4(group_size=8),
    "nf4 double": nf4(group_size=8, double_quantization=True),
    "fp4": fp4(group_size=16),
    "nvfp4": nvfp4(),
    "mxfp4": mx(element="e2m1"),
    "mxfp8": mx(element="e4m3"),
    "fp8": fp8(element="e5m2"),
    "power": power(bits=6, exponents=[0.5]),
}


def with_table(kind, *shape):
    layout = {"kernel": Axes()}
    return apply(TABLES[kind], {"kernel": draw(1, *shape)}, layout=layout)["kernel"]


def all_levels(weight):
    """The levels of every entry, `(levels, in, out)` float64."""
    if hasattr(weight, "table"):
        table = np.asarray(weight.table, np.float64)
    else:
        codes = jnp.arange(256, dtype=jnp.uint8)
        table = np.asarray(jax.lax.bitcast_convert_type(codes, weight.values.dtype), np.float64)
        table = table[np.isfinite(table)]
    scale = np.asarray(weight.scale_matrix(), np.float64)
    rows, cols = scale.shape
    scale = np.repeat(np.repeat(scale, 32 // rows, 0), 16 // cols, 1)
    return table[:, None, None] * scale


@pytest.mark.parametrize("kind", TABLES)
def test_values_go_to_the_nearest_of_the_levels_that_a_table_has(kind):
    weight, value = with_table(kind, 32, 16), draw(2, 32, 16, scale=0.8)
    new = requantize(weight, value).weight
    far = np.abs(all_levels(weight) - np.asarray(value, np.float64))
    missed = np.abs(np.asarray(new.materialize(), np.float64) - np.asarray(value))
    np.testing.assert_allclose(missed, far.min(0), atol=1e-6)
    assert type(new) is type(weight)
    chex.assert_trees_all_equal(new.scale, weight.scale)
    back = requantize(weight, weight.materialize())
    chex.assert_trees_all_equal(back.weight.materialize(), weight.materialize())
    assert back.clipped == 0 and requantize(weight, 3 * value).clipped > 0.02


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp8"])
def test_outputs_follow_on_tables_too_with_a_gram_matrix(kind):
    """QLoRA's base and what training added to it, merged and still what the runtime reads."""
    base, gram = with_table(kind, 32, 16), correlated()
    factors = draw(3, 32, 2, scale=0.1), draw(4, 2, 16, scale=0.1)
    params = {"kernel": LowRank.over(base, *factors)}
    target = params["kernel"].materialize()
    errors = {}
    for rounding in ("nearest", "gptq"):
        merged, report = merge_adapters(params, requantize=rounding, stats=stats_of(gram))
        new = merged["kernel"]
        chex.assert_trees_all_equal_shapes_and_dtypes(new, base)
        chex.assert_trees_all_equal(new.scale, base.scale)
        errors[rounding] = float(output_error(target, new.materialize(), gram, relative=True))
        assert report["kernel"].output_survived is not None
    assert errors["gptq"] < 0.85 * errors["nearest"]


def test_stacks_of_tables_are_requantized_as_their_slices_are():
    weight, value = with_table("nf4", 3, 32, 16), draw(5, 3, 32, 16)
    gram = jnp.stack([correlated(seed=i) for i in range(3)])
    new = requantize(weight, value, gram).weight
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i], weight)
        one = requantize(part, value[i], gram[i]).weight
        chex.assert_trees_all_equal(new.codes[i], one.codes)


def test_scales_of_tables_may_be_stretched_unless_they_are_quantized_themselves():
    value = draw(6, 32, 16, scale=2.0)
    weight = with_table("nf4", 32, 16)
    error = lambda new: float(jnp.sum(jnp.square(new.weight.materialize() - value)))  # noqa: E731
    assert error(requantize(weight, value, rescale=True)) < 0.6 * error(requantize(weight, value))
    double = with_table("nf4 double", 32, 16)
    words = r"rescale=True, but the weight's scales are a Codebook, quantized themselves"
    with pytest.raises(ValueError, match=rf"quantize.requantize: {words}"):
        requantize(double, value, rescale=True)
    with pytest.raises(ValueError, match=rf"quantize.add_deltas: 'kernel': {words}"):
        add_deltas({"kernel": double}, {"kernel": value}, rescale=True)
