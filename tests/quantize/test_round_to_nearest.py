import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import lora
from jaxweights.core import Layout, apply, chain, partition
from jaxweights.quantize import Grid, quantize_matrix, round_to_nearest
from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes, Masked, Quantized

WEIGHT = jax.random.normal(jax.random.key(0), (64, 24))


@pytest.mark.parametrize(
    "bits, grid", [(2, "signed_max"), (4, "signed_max"), (7, "signed_max"), (8, "narrow")]
)
def test_the_default_grid_suits_the_bits(bits, grid):
    kernel = apply(round_to_nearest(bits=bits), {"kernel": WEIGHT})["kernel"]
    expected = quantize_matrix(WEIGHT, Grid(grid, bits))
    assert isinstance(kernel, Quantized)
    assert kernel.bits == bits
    assert np.array_equal(kernel.codes_matrix(), expected.codes)
    assert np.array_equal(kernel.scale, expected.scale)


@pytest.mark.parametrize(
    "group, shape", [(None, (1, 24)), (16, (4, 24)), ("tensor", (1, 1)), (1, (64, 24))]
)
def test_scales_have_the_shape_of_their_groups(group, shape):
    kernel = apply(round_to_nearest(bits=4, group_size=group), {"kernel": WEIGHT})["kernel"]
    assert kernel.scale.shape == shape
    assert kernel.group_size == (group if isinstance(group, int) else None)


@pytest.mark.parametrize("bits, expected", [(2, 2.25), (3, 4.25), (4, 4.25), (5, 8.25), (8, 8.25)])
def test_bytes_are_shared_by_codes_of_four_bits_and_fewer(bits, expected):
    weight = jnp.tile(WEIGHT, (2, 1))
    kernel = apply(round_to_nearest(bits=bits, group_size=128), {"kernel": weight})["kernel"]
    assert kernel.bits_per_weight == expected


def test_error_falls_with_bits_and_with_smaller_groups():
    def error(**settings):
        kernel = apply(round_to_nearest(**settings), {"kernel": WEIGHT})["kernel"]
        return float(jnp.sum((kernel.materialize() - WEIGHT) ** 2))

    by_bits = [error(bits=bits, group_size=32) for bits in range(2, 9)]
    assert all(more > fewer for more, fewer in itertools.pairwise(by_bits))
    by_group = [error(bits=4, group_size=group) for group in ("tensor", None, 16, 4)]
    assert all(more > fewer for more, fewer in itertools.pairwise(by_group))


def test_a_stack_equals_its_matrices_one_by_one():
    stack = jax.random.normal(jax.random.key(1), (3, 64, 24))
    layout = {"kernel": Axes()}
    tx = round_to_nearest(bits=4, group_size=16)
    whole = apply(tx, {"kernel": stack}, layout=layout)["kernel"]
    assert whole.shape == (3, 64, 24)
    for i in range(3):
        alone = apply(tx, {"kernel": stack[i]})["kernel"]
        assert np.array_equal(whole.codes[i], alone.codes)
        assert np.array_equal(whole.scale[i], alone.scale)


@pytest.mark.parametrize(
    "name, shape, axes",
    [
        ("q", (64, 4, 6), Axes(inputs=(-3,), outputs=(-2, -1))),
        ("o", (8, 8, 24), Axes(inputs=(-3, -2), outputs=(-1,))),
        ("conv", (2, 4, 8, 24), CONV_HWIO),
    ],
)
def test_other_layouts_are_rounded_as_their_matrix(name, shape, axes):
    params = {name: WEIGHT.reshape(shape)}
    new = apply(round_to_nearest(bits=4, group_size=16), params, layout={name: axes})[name]
    plain = apply(round_to_nearest(bits=4, group_size=16), {"kernel": WEIGHT})["kernel"]
    assert new.shape == shape
    assert np.array_equal(new.materialize(), plain.materialize().reshape(shape))


def test_an_embedding_is_rounded_only_when_named_and_then_row_by_row():
    params = {"embedding": WEIGHT, "kernel": WEIGHT + 1}
    untouched = apply(round_to_nearest(bits=8), params)
    assert untouched["embedding"] is WEIGHT
    named = apply(
        partition(("embedding", round_to_nearest(bits=8))), params, layout={"embedding": EMBEDDING}
    )
    table = named["embedding"]
    assert table.scale.shape == (1, 64)  # one scale a token
    expected = quantize_matrix(WEIGHT.T, Grid("narrow", 8))
    assert np.array_equal(table.codes_matrix(), expected.codes)


def test_a_masked_leaf_stays_masked_and_its_removed_entries_zero():
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, WEIGHT.shape)
    leaf = Masked(jnp.where(mask, WEIGHT, jnp.nan), mask)
    for grid in ("affine", "signed_max"):
        new = apply(round_to_nearest(bits=4, grid=grid), {"kernel": leaf})["kernel"]
        assert isinstance(new, Masked)
        assert isinstance(new.base, Quantized)
        assert np.array_equal(new.mask, mask)
        assert np.all(np.asarray(new.base.materialize())[~np.asarray(mask)] == 0)
        expected = quantize_matrix(jnp.where(mask, WEIGHT, 0), Grid(grid, 4))
        assert np.array_equal(new.base.codes_matrix(), expected.codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_shape_and_dtype_are_kept(dtype):
    kernel = apply(round_to_nearest(bits=4), {"kernel": WEIGHT.astype(dtype)})["kernel"]
    assert kernel.dtype == dtype
    assert kernel.materialize().dtype == dtype
    assert kernel.scale.dtype == jnp.float32


def test_compiled_equals_eager_bit_for_bit():
    tx = round_to_nearest(bits=3, group_size=16, grid="affine")
    eager = apply(tx, {"kernel": WEIGHT})["kernel"]
    compiled = jax.jit(lambda params: apply(tx, params))({"kernel": WEIGHT})["kernel"]
    for ours, theirs in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        assert np.array_equal(ours, theirs)


def test_abstract_leaves_get_the_shapes_that_concrete_ones_do():
    tx = round_to_nearest(bits=4, group_size=16)
    abstract = jax.eval_shape(lambda params: apply(tx, params), {"kernel": WEIGHT})["kernel"]
    concrete = apply(tx, {"kernel": WEIGHT})["kernel"]
    shapes = lambda w: [(x.shape, x.dtype) for x in jax.tree.leaves(w)]  # noqa: E731
    assert shapes(abstract) == shapes(concrete)
    assert abstract.bits_per_weight == concrete.bits_per_weight


def test_settings_are_checked_when_built():
    with pytest.raises(ValueError, match=r"quantize\.round_to_nearest: bits=1 must lie between"):
        round_to_nearest(bits=1)


BIG = Layout.of({"stack": Axes()})


@pytest.mark.parametrize(
    "params, words",
    [
        (
            {"mlp": {"kernel": jnp.ones((100, 8))}},
            "quantize.round_to_nearest: 'mlp/kernel': group_size=128 does not divide the input "
            "axis, which has length 100. Choose one of 1, 2, 4, 5, 10, 20, 25, 50, 100, fill up "
            "the last group by pad='zero', or leave this weight out with `partition`.",
        ),
        (
            {"kernel": jnp.zeros((128, 8)).at[3, 5].set(jnp.nan).at[4, 6].set(jnp.inf)},
            "'kernel': 2 of 8 groups hold values that are not finite, or too large for scales in "
            "float32, the first being group 0 of output 5. Repair the checkpoint",
        ),
        (
            {"stack": jnp.zeros((2, 256, 8)).at[1, 200, 5].set(jnp.inf)},
            "'stack': 1 of 32 groups hold values that are not finite, or too large for scales in "
            "float32, the first being group 1 of output 5 of matrix [1] in the stack.",
        ),
    ],
)
def test_a_leaf_that_cannot_be_rounded_is_refused_by_name(params, words):
    layout = BIG if "stack" in params else None
    with pytest.raises(ValueError) as error:
        apply(round_to_nearest(bits=4, group_size=128), params, layout=layout)
    assert words in str(error.value)


def test_scales_that_overflow_their_dtype_are_refused():
    tx = round_to_nearest(bits=4, scale_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"too large for scales in float16.*a wider scale_dtype"):
        apply(tx, {"kernel": 1e6 * WEIGHT})


@pytest.mark.parametrize("masked", [False, True])
def test_a_quantized_leaf_is_refused(masked):
    tx = round_to_nearest(bits=4)
    once = apply(tx, {"kernel": WEIGHT})
    if masked:
        once = {"kernel": Masked(once["kernel"], jnp.ones(WEIGHT.shape, bool))}
    with pytest.raises(ValueError) as error:
        apply(tx, once)
    kind = "a Masked Quantized" if masked else "a Quantized"
    assert f"'kernel': is already {kind}. Quantizing it again would add a second" in str(
        error.value
    )
    assert "Dequantize it first with `materialize`" in str(error.value)


def test_a_chain_in_the_wrong_order_is_told_the_right_one():
    with pytest.raises(ValueError, match=r"is already a LowRank.*quantizers come before LoRA"):
        apply(chain(lora(rank=1), round_to_nearest(bits=4)), {"kernel": WEIGHT})
