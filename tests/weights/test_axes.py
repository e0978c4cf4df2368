"""Axes and views relate every layout to a (*stack, in, out) matrix and back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes, View

CASES = [
    ((4, 3), Axes()),
    ((3, 4), EMBEDDING),
    ((2, 4, 3), Axes()),
    ((4, 2, 3), Axes((-3,), (-2, -1))),
    ((2, 3, 4), Axes((-3, -2), (-1,))),
    ((2, 3, 4), Axes((-2, -3), (-1,))),
    ((4, 5, 3), Axes((-3,), (-1,))),
    ((5, 4, 2, 3), Axes((-3,), (-1, -2))),
    ((3, 2, 4, 5), CONV_HWIO),
]


def draw(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def entry_of_matrix(leaf, axes, stack_index, i, o):
    """One entry by its definition: inputs and outputs are flattened in the order they are named."""
    index = [None] * leaf.ndim
    for named, flat in ((axes.inputs, i), (axes.outputs, o)):
        lengths = [leaf.shape[a] for a in named]
        for axis, position in zip(named, np.unravel_index(flat, lengths), strict=True):
            index[axis] = position
    stack = iter(stack_index)
    return leaf[tuple(next(stack) if k is None else k for k in index)]


@pytest.mark.parametrize("shape, axes", CASES)
def test_the_matrix_is_what_its_definition_says_and_goes_back_exactly(shape, axes):
    leaf = draw(shape)
    view = View.of(shape, axes)
    matrix = np.asarray(view.to_matrix(jnp.asarray(leaf)))
    stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
    assert matrix.shape == (*stack, view.in_dim, view.out_dim)
    for index in np.ndindex(*matrix.shape):
        *s, i, o = index
        assert matrix[index] == entry_of_matrix(leaf, axes, s, i, o)
    np.testing.assert_array_equal(view.from_matrix(jnp.asarray(matrix)), leaf)
    assert view.shape(stack) == shape


@pytest.mark.parametrize("shape, axes", CASES)
def test_one_view_serves_the_stack_and_its_slices(shape, axes):
    shape = (2, *shape)
    view = View.of(shape, axes)
    leaf = jnp.asarray(draw(shape))
    np.testing.assert_array_equal(view.to_matrix(leaf)[1], view.to_matrix(leaf[1]))


@pytest.mark.parametrize("shape, axes", CASES)
def test_a_transposed_view_describes_the_transposed_leaf(shape, axes):
    leaf, view = jnp.asarray(draw(shape)), View.of(shape, axes)
    matrix = view.to_matrix(leaf)
    kept = 0
    orders = list(itertools.permutations(range(len(shape))))
    for order in orders[:: 1 + len(orders) // 8]:
        moved = view.transposed(len(shape), order)
        if moved is not None:
            kept += 1
            np.testing.assert_array_equal(moved.to_matrix(jnp.transpose(leaf, order)), matrix)
    assert kept >= 1


RESHAPES = [
    ((4, 6), Axes(), (4, 2, 3), ((-3,), (-2, -1))),
    ((6, 4), Axes(), (2, 3, 4), ((-3, -2), (-1,))),
    ((4, 2, 3), Axes((-3,), (-2, -1)), (4, 6), ((-2,), (-1,))),
    ((5, 4, 6), Axes(), (5, 4, 2, 3), ((-3,), (-2, -1))),
    ((6, 4), EMBEDDING, (2, 3, 4), ((-1,), (-3, -2))),
    ((4, 6), Axes(), (2, 2, 6), ((-3, -2), (-1,))),
    ((4, 6), Axes(), (4, 1, 6), ((-3,), (-2, -1))),
]


@pytest.mark.parametrize("shape, axes, new_shape, sides", RESHAPES)
def test_a_reshaped_view_keeps_the_matrix(shape, axes, new_shape, sides):
    leaf, view = jnp.asarray(draw(shape)), View.of(shape, axes)
    new = view.reshaped(shape, new_shape)
    assert (new.axes.inputs, new.axes.outputs) == sides
    np.testing.assert_array_equal(new.to_matrix(leaf.reshape(new_shape)), view.to_matrix(leaf))
    assert new.axes.kind == axes.kind


@pytest.mark.parametrize(
    "shape, axes, new_shape",
    [
        ((4, 6), Axes(), (3, 8)),
        ((4, 6), Axes(), (24,)),
        ((2, 4, 6), Axes(), (8, 6)),
        ((4, 2, 3), Axes((-3,), (-2, -1)), (8, 3)),
        ((4, 5, 3), Axes((-3,), (-1,)), (20, 3)),
    ],
)
def test_a_reshape_that_mixes_axes_has_no_view(shape, axes, new_shape):
    assert View.of(shape, axes).reshaped(shape, new_shape) is None


def test_every_reshape_either_keeps_the_matrix_or_has_no_view():
    """All ways to factor 24 entries, against the definition."""
    shapes = [
        s for n in (1, 2, 3, 4) for s in itertools.product((1, 2, 3, 4, 6, 8, 12, 24), repeat=n)
    ]
    shapes = [s for s in shapes if np.prod(s) == 24]
    leaf = np.arange(24, dtype=np.float32)
    for shape, axes in (((4, 6), Axes()), ((2, 3, 4), Axes((-3, -2), (-1,))), ((2, 4, 3), Axes())):
        view = View.of(shape, axes)
        matrix = np_matrix(leaf.reshape(shape), view)
        for new_shape in shapes:
            new = view.reshaped(shape, new_shape)
            if new is not None:
                np.testing.assert_array_equal(np_matrix(leaf.reshape(new_shape), new), matrix)


def np_matrix(leaf, view):
    named = [a % leaf.ndim for a in (*view.axes.inputs, *view.axes.outputs)]
    stack = [a for a in range(leaf.ndim) if a not in named]
    sizes = [leaf.shape[a] for a in stack]
    return np.transpose(leaf, (*stack, *named)).reshape(*sizes, view.in_dim, view.out_dim)


@pytest.mark.parametrize(
    "inputs, outputs", [((), (-1,)), ((-2,), ()), ((-1,), (-1,)), ((-2, -2), (-1,))]
)
def test_axes_must_be_two_disjoint_sides(inputs, outputs):
    with pytest.raises(ValueError, match=r"Axes: inputs=.* must be two non-empty, disjoint sets"):
        Axes(inputs, outputs)


def test_axes_are_counted_from_the_end():
    with pytest.raises(ValueError, match=r"must be counted from the end \(negative\)"):
        Axes((0,), (-1,))
    with pytest.raises(ValueError, match=r"shape \(3,\) has rank 1, but .* names axis -2"):
        View.of((3,), Axes())


def test_views_are_static_under_jit():
    run = jax.jit(lambda leaf, view: view.to_matrix(leaf), static_argnums=1)
    assert run(jnp.ones((4, 2, 3)), View.of((4, 2, 3), Axes((-3,), (-2, -1)))).shape == (4, 6)
