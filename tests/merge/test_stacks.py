"""Tests of which axes count as stacked."""

from __future__ import annotations

import jax
import pytest

from jaxweights.core import Layout
from jaxweights.merge._stacks import stack_axes
from jaxweights.weights import Axes


def flat(**shapes):
    return {
        path.replace("__", "/"): jax.ShapeDtypeStruct(shape, "float32")
        for path, shape in shapes.items()
    }


LEAVES = flat(
    embed__embedding=(50, 8),
    layers__attn__q__kernel=(3, 8, 2, 4),
    layers__attn__q__bias=(3, 2, 4),
    layers__experts__up__kernel=(3, 5, 8, 16),
    layers__experts__up__bias=(3, 5, 16),
    layers__norm__scale=(3, 8),
    layers__odd=(4, 8),
    final__scale=(8,),
)
LAYOUT = Layout.of(
    {
        "embed/embedding": Axes(inputs=(-1,), outputs=(-2,), kind="embedding"),
        "layers/attn/q/kernel": Axes(inputs=(-3,), outputs=(-2, -1)),
        "layers/experts/up/kernel": Axes(),
    },
    traced=True,
)


def test_biases_and_norms_are_stacked_like_the_matrices_beside_them():
    assert stack_axes("f", LEAVES, LAYOUT) == {
        "embed/embedding": (),
        "layers/attn/q/kernel": (0,),
        "layers/attn/q/bias": (0,),
        "layers/experts/up/kernel": (0, 1),
        "layers/experts/up/bias": (0, 1),
        "layers/norm/scale": (0,),  # layers, which all matrices under `layers` share; not experts
        "layers/odd": (),  # its length is not that of the layers
        "final/scale": (),
    }


def test_stack_axes_need_not_lead():
    layout = Layout.of({"kernel": Axes(inputs=(-3,), outputs=(-1,))}, traced=True)
    assert stack_axes("f", flat(kernel=(2, 8, 3, 4)), layout)["kernel"] == (0, 2)


def test_an_ambiguous_leaf_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"'a/kernel': has shape \(2, 3, 4\).*Pass layout="):
        stack_axes("f", flat(a__kernel=(2, 3, 4)), Layout())


def test_a_leaf_that_the_trace_leaves_unclear_is_refused_with_its_reason():
    layout = Layout(traced=True, unclear=(("a/kernel", "is contracted both ways"),))
    with pytest.raises(ValueError, match=r"ambiguous \(is contracted both ways\)"):
        stack_axes("f", flat(a__kernel=(2, 3, 4)), layout)
