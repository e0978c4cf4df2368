"""Axes and shared inputs, read off the traces of models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.lift import infer_layout
from jaxweights.lift._infer_layout import trace_model
from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes
from tests.lift._weights import int8, normal


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_kernels_stacks_heads_and_experts_are_told_apart():
    params = {
        "scanned": leaf(3, 4, 4),
        "heads": leaf(4, 2, 3),
        "out": leaf(2, 3, 4),
        "experts": leaf(5, 4, 6),
        "torch": leaf(7, 4),
        "bias": leaf(4),
        "unused": leaf(4, 4),
    }

    def fn(p, x):
        x = jax.lax.scan(lambda h, w: (h @ w + p["bias"][None], None), x, p["scanned"])[0]
        heads = jnp.einsum("td,dhe->the", x, p["heads"])
        x = jnp.einsum("the,hed->td", heads, p["out"])
        experts = jnp.einsum("etd,edf->etf", jnp.stack([x] * 5), p["experts"])
        return x @ p["torch"].T, experts

    assert dict(infer_layout(fn, params, leaf(8, 4))) == {
        "scanned": Axes(),
        "heads": Axes((-3,), (-2, -1)),
        "out": Axes((-3, -2), (-1,)),
        "experts": Axes(),
        "torch": Axes((-1,), (-2,)),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_tables_and_tied_heads_are_embeddings(tied, mapped):
    look = lambda table, ids: table[ids]  # noqa: E731
    if mapped:  # as Equinox writes it
        look = jax.vmap(jax.vmap(look, (None, 0)), (None, 0))
    fn = lambda p, ids: look(p["table"], ids) @ (p["table"].T if tied else p["head"])  # noqa: E731
    layout = infer_layout(fn, {"table": leaf(9, 4), "head": leaf(4, 9)}, np.zeros((2, 3), int))
    assert layout["table"] == EMBEDDING
    assert ("head" in layout) == (not tied)


@pytest.mark.parametrize(
    "names, shape, axes",
    [
        (("NHWC", "HWIO", "NHWC"), (3, 2, 4, 5), CONV_HWIO),
        (("NCHW", "OIHW", "NCHW"), (5, 4, 3, 2), Axes((-3, -2, -1), (-4,), "conv")),
    ],
)
def test_convolutions_contract_window_and_channels(names, shape, axes):
    fn = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["k"], (1, 1), "SAME", dimension_numbers=names
    )
    x = leaf(1, 6, 7, 4) if names[0] == "NHWC" else leaf(1, 4, 6, 7)
    assert infer_layout(fn, {"k": leaf(*shape)}, x)["k"] == axes


def test_reshapes_casts_slices_and_loops_are_seen_through():
    params = {"w": leaf(3, 6, 4), "v": leaf(4, 6)}

    def fn(p, x):
        half = p["w"].astype(jnp.bfloat16)
        x = jax.lax.fori_loop(
            0, 3, lambda i, h: jnp.tanh((h @ half[i]) @ half[0].T), x.astype(jnp.bfloat16)
        )
        heads = p["v"].reshape(4, 2, 3).astype(jnp.bfloat16)
        return jnp.einsum("td,dhe->the", x[:, :4], heads)

    layout = infer_layout(fn, params, leaf(5, 6))
    assert layout["v"] == Axes()
    assert "w" not in layout  # contracted over either side
    assert "contradictory ways, with input axes (1,) and (2,)" in dict(layout.unclear)["w"]


def test_a_leaf_used_in_contradictory_ways_is_an_error_that_says_so():
    params = {"w": normal(0, 4, 4)}
    layout = infer_layout(lambda p, x: (x @ p["w"]) @ p["w"].T, params, normal(1, 2, 4))
    with pytest.raises(ValueError, match=r"'w': the model multiplies it in contradictory ways"):
        jw.apply(jw.sparsify.magnitude(sparsity=0.5), params, layout=layout)


def test_matrices_that_are_picked_by_index_are_unclear():
    fn = lambda p, x, i: jnp.einsum("td,tdf->tf", x, jnp.take(p["w"], i, axis=0, mode="clip"))  # noqa: E731
    layout = infer_layout(fn, {"w": leaf(3, 4, 5)}, leaf(2, 4), jnp.array([0, 2]))
    assert not len(layout)
    assert "picks entries of its first axis" in dict(layout.unclear)["w"]


def test_nothing_is_computed_and_represented_weights_count_like_dense_ones():
    params = {"w": int8(normal(0, 4, 3))}
    assert infer_layout(lambda p, x: x @ p["w"], params, leaf(2, 4))["w"] == Axes()


def owners(fn, params, *inputs):
    return dict(trace_model(fn, params, inputs).owners)


TWO = {"a": leaf(4, 4), "b": leaf(4, 4)}
STACKS = {"a": leaf(3, 4, 4), "b": leaf(3, 4, 4)}


def test_weights_that_provably_read_one_input_have_one_owner():
    fn = lambda p, x: (jnp.tanh(x) @ p["a"], jnp.tanh(x) @ p["b"])  # noqa: E731
    assert owners(fn, TWO, leaf(2, 4)) == {"b": "a"}

    def scanned(p, x):
        step = lambda h, w: (jnp.tanh(h @ w[0]) * (h @ w[1]), None)  # noqa: E731
        return jax.lax.scan(step, x, (p["a"], p["b"]))[0]

    assert owners(scanned, STACKS, leaf(2, 4)) == {"b": "a"}

    def looped(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, h: (h @ p["a"][i]) * (h @ p["b"][i]), x)

    assert owners(looped, STACKS, leaf(2, 4)) == {"b": "a"}

    def heads(p, x):  # the axes of outputs may stand anywhere
        return jnp.einsum("thk,hkd->td", x, p["a"]), jnp.einsum("thk,dhk->td", x, p["b"])

    assert owners(heads, {"a": leaf(3, 4, 5), "b": leaf(5, 3, 4)}, leaf(2, 3, 4)) == {"b": "a"}

    def convolutions(p, x):
        return convolved(x, p["a"], "HWIO"), convolved(x, p["b"], "HWOI")

    assert owners(
        convolutions, {"a": leaf(3, 3, 2, 4), "b": leaf(3, 3, 5, 2)}, leaf(1, 5, 5, 2)
    ) == {"b": "a"}


APART = {
    "another input": lambda p, x: (x @ p["a"]) @ p["b"],
    "another branch": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda h: h @ p["a"], lambda h: h @ p["b"], x
    ),
    "once and in a loop": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, h: h + x @ p["b"], x @ p["a"]
    ),
    "once and twice": lambda p, x: x @ p["a"] + x @ p["b"] + jnp.sin(x) @ p["b"],
    "random numbers": lambda p, x: (
        jax.random.normal(jax.random.key(0), (2, 4)) @ p["a"],
        jax.random.normal(jax.random.key(1), (2, 4)) @ p["b"],
    ),
}


@pytest.mark.parametrize("case", APART)
def test_weights_that_see_different_data_have_no_common_owner(case):
    assert owners(APART[case], TWO, leaf(2, 4)) == {}


def convolved(x, kernel, layout, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC"), **options
    )


# Of each pair the shapes, and a model in which both contract the same axes of one array.
DISORDERED = {
    "heads stored after their features": (
        ((3, 4, 5), (4, 3, 5)),
        lambda p, x: jnp.einsum("thk,hkd->td", x, p["a"]) + jnp.einsum("thk,khd->td", x, p["b"]),
        (2, 3, 4),
    ),
    "heads joined after their features": (
        ((3, 4, 5), (4, 3, 5)),
        lambda p, x: x @ p["a"].reshape(12, 5) + x @ jnp.swapaxes(p["b"], 0, 1).reshape(12, 5),
        (2, 12),
    ),
    "stacks in another order": (
        ((2, 3, 4, 4), (3, 2, 4, 4)),
        lambda p, x: (
            jnp.einsum("ehtd,ehdf->ehtf", x, p["a"]) + jnp.einsum("ehtd,hedf->ehtf", x, p["b"])
        ),
        (2, 3, 7, 4),
    ),
    "channels of a kernel before its window": (
        ((3, 3, 2, 4), (4, 2, 3, 3)),
        lambda p, x: convolved(x, p["a"], "HWIO") + convolved(x, p["b"], "OIHW"),
        (1, 5, 5, 2),
    ),
}


@pytest.mark.parametrize("case", DISORDERED)
def test_matrices_whose_inputs_are_listed_in_another_order_have_no_common_owner(case):
    (first, second), fn, x = DISORDERED[case]
    assert owners(fn, {"a": leaf(*first), "b": leaf(*second)}, leaf(*x)) == {}


def test_layers_in_another_order_have_no_common_owner():
    def fn(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, h: h @ p["a"][i] + h @ p["b"][2 - i], x)

    assert owners(fn, STACKS, leaf(2, 4)) == {}

    def unrolled(p, x):
        return x @ p["a"][0] + x @ p["b"][1]

    assert owners(unrolled, STACKS, leaf(2, 4)) == {}
