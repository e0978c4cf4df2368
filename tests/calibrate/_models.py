"""Small models in every style, each with a slow oracle of what its weights are multiplied with.

An oracle is plain NumPy and unrolled: it returns, for each weight, the rows `(tokens, in)` that a
batch multiplies it with, or one such array for every matrix of a stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass
class Model:
    """One model, its parameters, how to draw a batch, and the oracle."""

    fn: Callable[..., Any]
    params: dict[str, np.ndarray]
    batch: Callable[[np.random.Generator], Any]
    rows: Callable[[dict[str, np.ndarray], Any], dict[str, Any]]


MODELS: dict[str, Model] = {}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.4)


def tokens(*shape):
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def register(name, params, batch, rows):
    def add(fn):
        MODELS[name] = Model(fn, params, batch, rows)
        return fn

    return add


def chain_rows(p, x, *, first=True):
    """Inputs of `first` and of every layer of `rest`, applied one after another."""
    found = {"rest": []}
    h = x
    if first:
        found["first"] = h
        h = np.tanh(h @ p["first"])
    for w in p["rest"]:
        found["rest"].append(h)
        h = np.tanh(h @ w)
    return found


CHAIN = {"first": draw(0, 4, 5), "rest": draw(1, 3, 5, 5)}


def layer(h, w):
    return jnp.tanh(h @ w)


@register("plain", {"a": draw(0, 4, 5), "b": draw(1, 5, 3)}, tokens(6, 4),
          lambda p, x: {"a": x, "b": np.tanh(x @ p["a"])})  # fmt: skip
def plain(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


@register("scan", CHAIN, tokens(6, 4), chain_rows)
def scan(p, x):
    return jax.lax.scan(lambda h, w: (layer(h, w), None), layer(x, p["first"]), p["rest"])[0]


@register("unrolled", CHAIN, tokens(6, 4), chain_rows)
def unrolled(p, x):
    h = layer(x, p["first"])
    for i in range(3):
        h = layer(h, p["rest"][i])
    return h


@register("fori over a stack", CHAIN, tokens(6, 4), chain_rows)
def fori_stack(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: layer(h, p["rest"][i]), layer(x, p["first"]))


@register("scan over parts of a stack", CHAIN, tokens(6, 4), chain_rows)
def scan_parts(p, x):
    step = lambda h, w: (layer(h, w), None)  # noqa: E731
    h = jax.lax.scan(step, layer(x, p["first"]), p["rest"][:2])[0]
    return jax.lax.scan(step, h, p["rest"][2:])[0]


@register("scan over pairs of layers", {"rest": draw(1, 4, 5, 5)}, tokens(6, 5),
          lambda p, x: chain_rows(p, x, first=False))  # fmt: skip
def scan_pairs(p, x):
    step = lambda h, pair: (layer(layer(h, pair[0]), pair[1]), None)  # noqa: E731
    return jax.lax.scan(step, x, p["rest"].reshape(2, 2, 5, 5))[0]


@register("remat, jit and custom_vjp in a scan", CHAIN, tokens(6, 4), chain_rows)
def wrapped(p, x):
    @jax.custom_vjp
    def product(h, w):
        return h @ w

    product.defvjp(lambda h, w: (h @ w, (h, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))

    @jax.checkpoint
    def step(h, w):
        return jax.jit(lambda h: jnp.tanh(product(h, w)))(h), None

    return jax.lax.scan(step, layer(x, p["first"]), p["rest"])[0]


def repeated(p, x):
    h, found = x, []
    for _ in range(3):
        found.append(h)
        h = np.tanh(h @ p["w"])
    return {"w": np.concatenate(found)}


SHARED = {"w": draw(0, 4, 4)}


@register("shared by a Python loop", SHARED, tokens(6, 4), repeated)
def shared_loop(p, x):
    for _ in range(3):
        x = layer(x, p["w"])
    return x


@register("shared by fori_loop", SHARED, tokens(6, 4), repeated)
def shared_fori(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: layer(h, p["w"]), x)


@register("shared by a while loop", SHARED, tokens(6, 4), repeated)
def shared_while(p, x):
    body = lambda state: (state[0] + 1, layer(state[1], p["w"]))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def nested_rows(p, x):
    h, found = x, [[] for _ in range(2)]
    for _ in range(2):
        for i in range(2):
            found[i].append(h)
            h = np.tanh(h @ p["w"][i])
    return {"w": [np.concatenate(rows) for rows in found]}


@register(
    "the same stack scanned twice in a scan", {"w": draw(0, 2, 4, 4)}, tokens(6, 4), nested_rows
)
def nested(p, x):
    inner = lambda h, w: (layer(h, w), None)  # noqa: E731
    outer = lambda h, _: (jax.lax.scan(inner, h, p["w"])[0], None)  # noqa: E731
    return jax.lax.scan(outer, x, length=2)[0]


def two_level_rows(p, x):
    h, found = x, []
    for group in p["w"]:
        found.append([])
        for w in group:
            found[-1].append(h)
            h = np.tanh(h @ w)
    return {"w": found}


@register("two stack axes", {"w": draw(0, 2, 3, 4, 4)}, tokens(6, 4), two_level_rows)
def two_level(p, x):
    inner = lambda h, w: (layer(h, w), None)  # noqa: E731
    return jax.lax.scan(lambda h, ws: (jax.lax.scan(inner, h, ws)[0], None), x, p["w"])[0]


@register(
    "two stack axes, the first indexed", {"w": draw(0, 2, 3, 4, 4)}, tokens(6, 4), two_level_rows
)
def two_level_indexed(p, x):
    inner = lambda h, w: (layer(h, w), None)  # noqa: E731
    for i in range(2):
        x = jax.lax.scan(inner, x, p["w"][i])[0]
    return x


def again_rows(p, x):
    h, found = x, [[] for _ in range(3)]
    for i in range(3):
        found[i].append(h)
        h = np.tanh(h @ p["w"][i])
        found[0].append(h)
        h = np.tanh(h @ p["w"][0])
        found[2 - i].append(h)
        h = np.tanh(h @ p["w"][2 - i])
    return {"w": [np.concatenate(rows) for rows in found]}


@register(
    "a stack scanned, indexed and backwards", {"w": draw(0, 3, 4, 4)}, tokens(6, 4), again_rows
)
def again(p, x):
    def step(h, ws):
        return layer(layer(layer(h, ws[0]), p["w"][0]), ws[1]), None

    return jax.lax.scan(step, x, (p["w"], p["w"][::-1]))[0]


def cond_rows(p, x):
    taken, other = ("a", "b") if x[0, 0] > 0 else ("b", "a")
    return {taken: x, other: x[:0]}


@register("cond", {"a": draw(0, 4, 5), "b": draw(1, 4, 5)}, tokens(6, 4), cond_rows)
def cond(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda h: h @ p["a"], lambda h: h @ p["b"], x)


def ids(high, *shape):
    return lambda rng: rng.integers(0, high, shape).astype(np.int32)


def tied_rows(p, ids):
    x = p["embedding"][ids].reshape(-1, 4)
    return {"w": x, "embedding": np.tanh(x @ p["w"])}


@register(
    "tied embedding and head",
    {"embedding": draw(0, 7, 4), "w": draw(1, 4, 4)},
    ids(7, 2, 3),
    tied_rows,
)
def tied(p, ids):
    return layer(p["embedding"][ids], p["w"]) @ p["embedding"].T


def attention_rows(p, x):
    q, k, v = (np.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
    scores = np.einsum("bqhe,bkhe->bhqk", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(-1, keepdims=True), v)
    x = x.reshape(-1, 4)
    return {"q": x, "k": x, "v": x, "o": mixed.reshape(-1, 6)}


ATTENTION = {name: draw(i, 4, 2, 3) for i, name in enumerate("qkv")} | {"o": draw(3, 2, 3, 4)}


@register("attention", ATTENTION, tokens(2, 3, 4), attention_rows)
def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")

    @jax.custom_vjp  # as flash attention is
    def mix(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
        return jnp.einsum("bhqk,bkhe->bqhe", weights, v)

    mix.defvjp(lambda q, k, v: (mix(q, k, v), None), lambda res, g: (g, g, g))
    return jnp.einsum("bqhe,hed->bqd", mix(q, k, v), p["o"])


def slots(rng):
    """Four slots an expert, of which some are empty, that is zero."""
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    x[0, 2:] = 0
    x[1, :] = 0
    return x


@register("experts with empty slots", {"w": draw(0, 3, 5, 2)}, slots,
          lambda p, x: {"w": [rows[rows.any(-1)] for rows in x]})  # fmt: skip
def dispatched(p, x):
    return jnp.einsum("ecd,edf->ecf", x, p["w"])


@register("experts by vmap", {"w": draw(0, 3, 5, 2)}, tokens(3, 4, 5), lambda p, x: {"w": list(x)})
def vmapped(p, x):
    return jax.vmap(lambda w, h: h @ w)(p["w"], x)


def ragged_batch(rng):
    return rng.standard_normal((6, 5)).astype(np.float32), np.array([2, 0, 4], np.int32)


@register("experts by ragged_dot", {"w": draw(0, 3, 5, 2)}, ragged_batch,
          lambda p, batch: {"w": np.split(batch[0], np.cumsum(batch[1])[:-1])})  # fmt: skip
def ragged(p, x, sizes):
    return jax.lax.ragged_dot(x, p["w"], sizes)


def windows(x, kernel, strides, padding):
    """Every window of a padded image, flattened as (height, width, channel)."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = kernel.shape[:2]
    return np.stack(
        [
            x[b, i : i + height, j : j + width].reshape(-1)
            for b in range(len(x))
            for i in range(0, x.shape[1] - height + 1, strides[0])
            for j in range(0, x.shape[2] - width + 1, strides[1])
        ]
    )


STRIDES, PADDING = (2, 1), ((1, 0), (0, 2))


@register("conv", {"conv/kernel": draw(0, 3, 2, 2, 4)}, tokens(2, 6, 5, 2),
          lambda p, x: {"conv/kernel": windows(x, p["conv/kernel"], STRIDES, PADDING)})  # fmt: skip
def conv(p, x):
    return jax.lax.conv_general_dilated(
        x, p["conv/kernel"], STRIDES, PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@register("conv with channels first", {"conv/kernel": draw(0, 4, 2, 3, 2)}, tokens(2, 2, 6, 5),
          lambda p, x: {"conv/kernel": windows(x.transpose(0, 2, 3, 1),
                        p["conv/kernel"].transpose(2, 3, 1, 0), STRIDES, PADDING)
                        .reshape(-1, 3, 2, 2).transpose(0, 3, 1, 2).reshape(-1, 12)})  # fmt: skip
def conv_nchw(p, x):
    return jax.lax.conv_general_dilated(
        x, p["conv/kernel"], STRIDES, PADDING, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
