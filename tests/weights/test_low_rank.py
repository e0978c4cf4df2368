"""LowRank against its dense value, in every layout and operation."""

from __future__ import annotations

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes, LowRank, Masked, Quantized, View, Weight

# Products of about 10 terms of order 1 in float32: a hundred roundings.
CLOSE = dict(rtol=1e-5, atol=1e-5)

LAYOUTS = {
    "plain": ((6, 8), Axes()),
    "transposed": ((8, 6), Axes(inputs=(-1,), outputs=(-2,))),
    "stacked": ((3, 6, 8), Axes()),
    "experts": ((2, 3, 6, 8), Axes()),
    "attention_query": ((6, 4, 2), Axes(inputs=(-3,), outputs=(-2, -1))),
    "attention_output": ((4, 2, 6), Axes(inputs=(-3, -2), outputs=(-1,))),
    "stacked_attention": ((3, 6, 4, 2), Axes(inputs=(-3,), outputs=(-2, -1))),
    "stack_inside": ((6, 3, 8), Axes(inputs=(-3,), outputs=(-1,))),
    "embedding": ((9, 6), EMBEDDING),
    "conv": ((3, 2, 4, 5), CONV_HWIO),
}


def draw(seed: int, shape, dtype=jnp.float32):
    # By NumPy: every draw of another shape would compile a program.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def low_rank(shape, axes=Axes(), *, rank=2, base=None, scaling=0.5) -> LowRank:
    view = View.of(shape, axes)
    stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
    base = draw(1, shape) if base is None else base
    down, up = draw(2, (*stack, view.in_dim, rank)), draw(3, (*stack, rank, view.out_dim))
    return LowRank.over(base, down, up, scaling=scaling, view=view)


def dense_by_hand(weight: LowRank) -> np.ndarray:
    """The sum in float64, entry by entry in the leaf's layout."""
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    delta = wide(weight.scaling)[..., None, None] * (wide(weight.down) @ wide(weight.up))
    base = weight.base.materialize() if isinstance(weight.base, Weight) else weight.base
    axes, shape = weight.view.axes, weight.shape
    stack = weight.view.stack_axes(len(shape))
    out = wide(base).copy()
    for index in np.ndindex(*shape):
        row = np.ravel_multi_index([index[a] for a in axes.inputs], weight.view.in_shape)
        col = np.ravel_multi_index([index[a] for a in axes.outputs], weight.view.out_shape)
        out[index] += delta[(*(index[a] for a in stack), row, col)]
    return out


def numbers(weight: LowRank, over: tuple[int, ...]):
    """Activations that contract the given axes of a weight, and the dimension numbers."""
    over = tuple(a % weight.ndim for a in over)
    stack = weight.view.stack_axes(weight.ndim)
    x_shape = (*(weight.shape[a] for a in stack), 5, *(weight.shape[a] for a in over))
    first = len(stack) + 1
    x_over = tuple(range(first, first + len(over)))
    return draw(7, x_shape), ((x_over, over), (tuple(range(len(stack))), stack))


def assert_product_equals_the_dense_one(weight: LowRank, over: tuple[int, ...]) -> None:
    x, dims = numbers(weight, over)
    lazy = jax.jit(lambda w, x: w.dot(x, dims))(weight, x)
    dense = jax.jit(lambda w, x: jax.lax.dot_general(x, w.materialize(), dims))(weight, x)
    np.testing.assert_allclose(lazy, dense, rtol=1e-4, atol=1e-4)


def materialized(weight: LowRank) -> jax.Array:
    return jax.jit(lambda w: w.materialize())(weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_value_is_the_sum_in_every_layout(layout):
    weight = low_rank(*LAYOUTS[layout])
    dense = materialized(weight)
    np.testing.assert_allclose(dense, dense_by_hand(weight), **CLOSE)
    assert dense.shape == weight.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_products_over_inputs_and_over_outputs_equal_the_dense_products(layout, side):
    weight = low_rank(*LAYOUTS[layout])
    assert_product_equals_the_dense_one(weight, getattr(weight.view.axes, side))


def test_a_contraction_over_part_of_the_inputs_is_left_to_the_caller():
    weight = low_rank(*LAYOUTS["attention_output"])
    assert weight.dot(draw(0, (5, 4)), (((1,), (0,)), ((), ()))) is None


@pytest.mark.parametrize(
    "layout, permutation",
    [("plain", (1, 0)), ("attention_query", (1, 2, 0)), ("stacked", (0, 2, 1))],
)
def test_transposing_moves_the_axes_and_nothing_else(layout, permutation):
    weight = low_rank(*LAYOUTS[layout])
    moved = weight.transpose(permutation)
    chex.assert_trees_all_equal((moved.down, moved.up), (weight.down, weight.up))
    np.testing.assert_allclose(
        moved.materialize(), jnp.transpose(weight.materialize(), permutation), **CLOSE
    )


@pytest.mark.parametrize(
    "layout, shape",
    [("attention_query", (6, 8)), ("attention_output", (8, 6)), ("plain", (2, 3, 4, 2))],
)
def test_reshaping_joins_and_splits_axes_of_one_side(layout, shape):
    weight = low_rank(*LAYOUTS[layout])
    reshaped = weight.reshape(shape)
    assert reshaped.shape == shape
    np.testing.assert_allclose(reshaped.materialize(), weight.materialize().reshape(shape), **CLOSE)


def test_reshaping_across_inputs_and_outputs_is_left_to_the_caller():
    assert low_rank((6, 8)).reshape((48,)) is None


@pytest.mark.parametrize("axes", [EMBEDDING, Axes()], ids=["table", "matrix"])
def test_rows_looked_up_are_those_of_the_dense_weight(axes):
    weight = low_rank((9, 6), axes)
    indices = jnp.array([[0, 8, 3], [3, 1, 0]])
    np.testing.assert_allclose(weight.take(indices), weight.materialize()[indices], **CLOSE)


@pytest.mark.parametrize(
    "x_shape, dims, params",
    [
        ((2, 7, 8, 4), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
        ((2, 4, 7, 8), ("NCHW", "HWIO", "NCHW"), {"padding": "VALID", "window_strides": (2, 1)}),
        ((2, 7, 8, 4), ("NHWC", "HWIO", "NCHW"), {"padding": "SAME", "rhs_dilation": (1, 2)}),
        (
            (2, 7, 8, 4),
            ("NHWC", "HWIO", "NHWC"),
            {"padding": [(1, 0), (2, 2)], "lhs_dilation": (2, 1)},
        ),
    ],
)
def test_convolutions_equal_the_dense_ones(x_shape, dims, params):
    weight = low_rank(*LAYOUTS["conv"])  # a kernel that is not square
    x, params = draw(5, x_shape), {"window_strides": (1, 1), "dimension_numbers": dims} | params
    lazy = jax.jit(lambda w, x: w.conv(x, **params))(weight, x)
    dense = jax.jit(lambda w, x: jax.lax.conv_general_dilated(x, w.materialize(), **params))
    np.testing.assert_allclose(lazy, dense(weight, x), rtol=1e-4, atol=1e-4)


def test_a_kernel_in_another_order_convolves_after_its_transposition():
    weight = low_rank(*LAYOUTS["conv"]).transpose((3, 2, 0, 1))
    params = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NCHW", "OIHW", "NCHW"),
    }
    x = draw(5, (2, 4, 7, 8))
    lazy = jax.jit(lambda w, x: w.conv(x, **params))(weight, x)
    dense = jax.jit(lambda w, x: jax.lax.conv_general_dilated(x, w.materialize(), **params))
    np.testing.assert_allclose(lazy, dense(weight, x), rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_is_left_to_the_caller():
    params = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 2,
    }
    weight = low_rank((3, 3, 2, 6), CONV_HWIO)
    assert weight.conv(draw(0, (1, 5, 5, 4)), **params) is None


def test_ragged_products_send_every_group_through_its_own_expert():
    weight = low_rank((3, 6, 8))
    x, sizes = draw(5, (10, 6)), jnp.array([4, 0, 6])
    expected = jax.lax.ragged_dot(x, weight.materialize(), sizes)
    np.testing.assert_allclose(weight.ragged_dot(x, sizes), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["masked", "quantized", "masked_quantized"])
def test_any_base_may_lie_under_the_factors(kind):
    codes = jax.random.randint(jax.random.key(4), (6, 8), -8, 8).astype(jnp.int8)
    quantized = Quantized.from_codes(codes, jnp.full((1, 8), 0.1), bits=4)
    mask = draw(5, (6, 8)) > 0
    base = {
        "masked": Masked(draw(1, (6, 8)), mask),
        "quantized": quantized,
        "masked_quantized": Masked(quantized, mask),
    }[kind]
    weight = low_rank((6, 8), base=base)
    np.testing.assert_allclose(weight.materialize(), dense_by_hand(weight), **CLOSE)
    assert_product_equals_the_dense_one(weight, (0,))
    assert_product_equals_the_dense_one(weight, (1,))
    assert weight.stack_shape == ()


def test_a_bfloat16_sum_is_rounded_once():
    base = draw(1, (6, 8), jnp.bfloat16)
    weight = low_rank((6, 8), base=base, scaling=1 / 3)
    once = jnp.asarray(dense_by_hand(weight), jnp.float32).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(weight.materialize(), once)
    # Rounding the product first gives another answer, so the test can tell.
    product_first = base + weight.delta.materialize().astype(jnp.bfloat16)
    assert (product_first != once).any()


def test_bfloat16_products_keep_the_dtype_and_agree_within_its_precision():
    weight = low_rank((6, 8)).astype(jnp.bfloat16)
    assert (weight.dtype, weight.down.dtype) == (jnp.bfloat16, jnp.float32)
    x, dims = draw(7, (5, 6), jnp.bfloat16), (((1,), (0,)), ((), ()))
    y = weight.dot(x, dims)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ dense_by_hand(weight)
    # Four roundings of 2**-9 each, of terms up to 4 times the result.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.03, atol=0.1)


def test_slicing_every_field_along_axis_0_slices_the_weight():
    weight = low_rank(*LAYOUTS["stacked_attention"])
    assert weight.stack_shape == (3,)
    dense = weight.materialize()
    for layer in range(3):
        part = jax.tree.map(lambda field: field[layer], weight).unstacked()  # noqa: B023
        np.testing.assert_allclose(part.materialize(), dense[layer], **CLOSE)


def test_vmap_over_the_stack_equals_a_loop():
    weight = low_rank((3, 6, 8))
    x, dims = draw(5, (3, 4, 6)), (((1,), (0,)), ((), ()))
    mapped = jax.vmap(lambda w, x: w.dot(x, dims))(weight, x)
    looped = [jax.tree.map(lambda f: f[i], weight).dot(x[i], dims) for i in range(3)]  # noqa: B023
    np.testing.assert_allclose(mapped, jnp.stack(looped), **CLOSE)


def test_a_stack_axis_behind_inputs_cannot_be_sliced_away():
    assert low_rank(*LAYOUTS["stack_inside"]).stack_shape == ()


@pytest.mark.parametrize("layout", ["plain", "stacked", "attention_query"])
def test_another_basis_of_the_rank_space_leaves_the_weight(layout):
    weight = low_rank(*LAYOUTS[layout], rank=3)
    basis = draw(9, (3, 3)) + 3 * jnp.eye(3)
    turned = dataclasses.replace(
        weight, down=weight.down @ basis, up=jnp.linalg.inv(basis) @ weight.up
    )
    np.testing.assert_allclose(turned.materialize(), weight.materialize(), rtol=1e-4, atol=1e-4)


def test_columns_of_zeros_in_the_rank_space_change_nothing():
    weight = low_rank((6, 8))
    padded = dataclasses.replace(
        weight,
        down=jnp.pad(weight.down, ((0, 0), (0, 3)), constant_values=7.0),
        up=jnp.pad(weight.up, ((0, 3), (0, 0))),
    )
    chex.assert_trees_all_close(padded.materialize(), weight.materialize(), rtol=1e-6)
    assert padded.rank == 5


def test_the_delta_is_linear_in_the_scaling():
    once, thrice = low_rank((3, 6, 8), scaling=0.5), low_rank((3, 6, 8), scaling=1.5)
    np.testing.assert_allclose(thrice.delta.materialize(), 3 * once.delta.materialize(), rtol=1e-5)


def test_every_matrix_of_a_stack_may_have_its_own_scaling():
    weight = low_rank((3, 6, 8), scaling=jnp.array([0.0, 1.0, 2.0]))
    chex.assert_trees_all_equal(weight.materialize()[0], weight.base[0])
    np.testing.assert_allclose(weight.materialize(), dense_by_hand(weight), **CLOSE)


def test_another_scaling_compiles_nothing_anew():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def dense(weight):
        return weight.materialize()

    dense(low_rank((6, 8), scaling=0.5))
    dense(low_rank((6, 8), scaling=0.7))


def test_gradients_of_the_factors_equal_those_through_the_dense_weight():
    weight, x = low_rank((6, 8)), draw(5, (4, 6))
    with_factors = lambda f: dataclasses.replace(weight, down=f[0], up=f[1])  # noqa: E731
    lazy = lambda f: jnp.sin(with_factors(f).dot(x, (((1,), (0,)), ((), ())))).sum()  # noqa: E731
    dense = lambda f: jnp.sin(x @ with_factors(f).materialize()).sum()  # noqa: E731
    factors = (weight.down, weight.up)
    chex.assert_trees_all_close(jax.grad(lazy)(factors), jax.grad(dense)(factors), rtol=1e-4)


def test_the_gradient_of_the_factors_never_forms_a_matrix_of_the_weights_size():
    weight, x = low_rank((48, 40), rank=2), draw(5, (7, 48))
    dims = (((1,), (0,)), ((), ()))

    def lazy(factors):
        return jnp.sin(dataclasses.replace(weight, down=factors[0], up=factors[1]).dot(x, dims))

    def dense(factors):
        filled = dataclasses.replace(weight, down=factors[0], up=factors[1])
        return jnp.sin(x @ filled.materialize())

    def products(fn):
        text = jax.jit(jax.grad(lambda f: fn(f).sum())).lower((weight.down, weight.up)).as_text()
        shapes = re.findall(r"dot_general.*-> tensor<(\d+)x(\d+)xf32>", text)
        return {tuple(sorted((int(a), int(b)))) for a, b in shapes}

    assert (40, 48) not in products(lazy)
    assert (40, 48) in products(dense)  # so the search finds it where it is


def test_factors_that_do_not_fit_are_refused_with_the_shapes_they_should_have():
    with pytest.raises(ValueError, match=r"needs \(6, 2\) and \(2, 8\)"):
        LowRank.over(jnp.ones((6, 8)), jnp.ones((8, 2)), jnp.ones((2, 6)))


def test_specs_of_a_sharded_weight_split_down_by_inputs_and_up_by_outputs():
    weight = low_rank(*LAYOUTS["stacked_attention"])
    specs = weight.partition(PartitionSpec(None, "data", "model"), None)
    assert specs.down == PartitionSpec(None, "data", None)
    assert specs.up == PartitionSpec(None, None, "model")
    assert specs.scaling == PartitionSpec(None)
    # Splitting head_dim would split the flattened outputs into scattered parts.
    assert weight.partition(PartitionSpec(None, None, None, "model"), None) is None


def test_parts_of_a_split_weight_are_the_parts_of_its_dense_value():
    weight = low_rank(*LAYOUTS["attention_query"])  # (6, 4, 2)
    dense = weight.materialize()
    half = dataclasses.replace(weight, base=weight.base[:, :2], up=weight.up[:, :4])
    np.testing.assert_allclose(half.materialize(), dense[:, :2], **CLOSE)
    x = draw(5, (5, 6))
    y = half.dot(x, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(y, jnp.einsum("td,dhk->thk", x, dense[:, :2]), rtol=1e-4, atol=1e-4)


def test_shapes_and_dtypes_are_known_without_data():
    abstract = jax.eval_shape(lambda: low_rank((3, 6, 8)))
    assert (abstract.shape, abstract.dtype) == ((3, 6, 8), jnp.float32)
