"""Kernels of grouped convolutions as stacks of matrices, wherever their axes are."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core._feature_groups import FeatureGroups, columns_like_gram
from jaxweights.weights import Axes, Masked, Quantized, View

# Of each layout: shape, axes, groups, and how a group's matrices are cut out of the kernel.
LAYOUTS = {
    "HWIO": (
        (3, 2, 2, 6),
        Axes((-4, -3, -2), (-1,), "conv"),
        lambda k, g: k[..., 2 * g : 2 * g + 2],
    ),
    "OIHW": ((6, 2, 3, 2), Axes((-3, -2, -1), (-4,), "conv"), lambda k, g: k[2 * g : 2 * g + 2]),
    "layers in front": (
        (4, 3, 2, 6),
        Axes((-3, -2), (-1,), "conv"),
        lambda k, g: k[..., 2 * g : 2 * g + 2],
    ),
    "layers behind": (
        (3, 2, 6, 4),
        Axes((-4, -3), (-2,), "conv"),
        lambda k, g: k[..., 2 * g : 2 * g + 2, :],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_kernel_has_the_matrices_of_its_groups_and_joins_to_itself(name):
    shape, axes, cut = LAYOUTS[name]
    kernel = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    view = View.of(shape, axes)
    groups = FeatureGroups(shape, view, 3)
    split = groups.split(kernel)
    matrices = groups.view.to_matrix(split)
    # A statistic has its groups behind the stack, wherever the split kernel has them.
    stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
    numbers = jnp.broadcast_to(jnp.arange(3), (*stack, 3))
    moved = groups.statistic(numbers)
    assert moved.shape == matrices.shape[:-2]
    for g in range(3):
        expected = View.of(cut(kernel, g).shape, axes).to_matrix(cut(kernel, g))
        found = matrices[np.asarray(moved) == g].reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(groups.join(split), kernel)
    # A scale of one matrix, (1, 1), becomes that of its columns.
    scale = (1.0 + moved.astype(jnp.float32))[..., None, None]
    codes = (matrices % 5).astype(jnp.int8)
    parts = Quantized.from_codes(codes, scale, bits=4, view=groups.view)
    joined = groups.join(Masked(parts, split > 3))
    assert joined.base.view == view and joined.base.scale.shape == (*stack, 1, 3)
    expected = jnp.where(kernel > 3, groups.join(parts.materialize()), 0)
    np.testing.assert_array_equal(joined.materialize(), expected)


def test_pooled_extremes_are_those_of_all_groups():
    shape = (2, 4, 1, 6)
    groups = FeatureGroups(shape, View.of(shape, Axes((-3, -2), (-1,), "conv")), 3)
    value = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(groups.pooled("max", value), value[:, 2])
    np.testing.assert_array_equal(groups.pooled("min", value), value[:, 0])


def test_columns_go_with_the_gram_matrix_of_their_group():
    matrix = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    assert columns_like_gram(matrix, jnp.zeros((2, 3, 3))) is matrix
    grouped = columns_like_gram(matrix, jnp.zeros((2, 2, 3, 3)))
    np.testing.assert_array_equal(grouped[:, 1], matrix[..., 2:])
