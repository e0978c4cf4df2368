"""Models of Flax linen, Flax NNX and Equinox's style are lifted unmodified."""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.lift import infer_layout, lift
from jaxweights.weights import materialize
from tests.lift._weights import int8, low_rank, normal

# Flax adds arrays of different ranks and dtypes.
pytestmark = pytest.mark.promotion(dtypes="standard", ranks="allow")


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=4)(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(x))), None


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, 4)
        return table.attend(nn.LayerNorm()(table(ids)))


LINEN = {
    "Dense": (nn.Dense(3), (5, 4)),
    "Dense in bfloat16": (nn.Dense(3, dtype=jnp.bfloat16), (5, 4)),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 2, 4)),
    "Einsum": (nn.Einsum((4, 2, 3), "btd,dhe->bthe", use_bias=False), (2, 5, 4)),
    "MultiHeadDotProductAttention": (Attention(), (2, 3, 4)),
    "Conv": (nn.Conv(5, (3, 2), strides=(2, 1)), (1, 6, 5, 4)),
    "scan of remat": (Scanned(), (5, 4)),
    "Embed with a tied head": (Embedded(), None),
}


def represent(params, layout, make):
    """Represents every matrix that the model's own trace names."""
    flat, treedef = jw.core.flatten(params)
    new = {p: make(np.asarray(x), layout[p]) if p in layout else x for p, x in flat.items()}
    return jw.core.unflatten(treedef, new)


@pytest.mark.parametrize("make", [int8, low_rank], ids=["int8", "low_rank"])
@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_take_represented_weights(name, make):
    model, shape = LINEN[name]
    x = np.array([[0, 3, 6]]) if shape is None else normal(0, *shape)
    params = jax.jit(model.init)(jax.random.key(0), x)
    layout = infer_layout(model.apply, params, x)
    assert len(layout) >= 1 and not layout.unclear
    represented = represent(params, layout, make)
    # No kernel becomes dense, but `Int8` has no rule for a convolution.
    mode = "ok" if name == "Conv" else "error"
    both = jax.jit(
        lambda p, x: (lift(model.apply, on_materialize=mode)(p, x), model.apply(materialize(p), x))
    )
    actual, expected = both(represented, x)
    assert actual.dtype == expected.dtype
    tolerance = 0.05 if actual.dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(
        np.float32(actual), np.float32(expected), rtol=tolerance, atol=tolerance
    )


def test_layouts_of_linen_modules_know_heads_stacks_and_windows():
    def axes(name):
        model, shape = LINEN[name]
        x = np.array([[0, 3, 6]]) if shape is None else normal(0, *shape)
        return infer_layout(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)

    attention = axes("MultiHeadDotProductAttention")
    prefix = "params/MultiHeadDotProductAttention_0/"
    assert attention[prefix + "query/kernel"] == jw.Axes((-3,), (-2, -1))
    assert attention[prefix + "out/kernel"] == jw.Axes((-3, -2), (-1,))
    assert set(axes("scan of remat").values()) == {jw.Axes()}
    assert set(axes("Conv").values()) == {jw.weights.CONV_HWIO}
    assert set(axes("Embed with a tied head").values()) == {jw.weights.EMBEDDING}
    general = axes("DenseGeneral")["params/kernel"]
    assert general == jw.Axes((-4, -3), (-2, -1))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def test_nnx_modules_are_split_lifted_and_merged():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    x = normal(0, 5, 4)
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    layout = infer_layout(fn, state, x)
    assert len(layout) == 2
    represented = represent(state, layout, int8)
    actual = jax.jit(lift(fn, on_materialize="error"))(represented, x)
    np.testing.assert_allclose(actual, fn(materialize(represented), x), rtol=2e-5, atol=2e-5)
    pruned = jw.apply(jw.sparsify.magnitude(sparsity=0.5), state, layout=layout)
    assert jax.tree.structure(materialize(pruned)) == jax.tree.structure(state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """As Equinox writes it: weights (out, in), methods on the module, static settings."""

    weight: jax.Array
    bias: jax.Array
    activation: str = dataclasses.field(default="tanh", metadata={"static": True})

    def __call__(self, x):
        return getattr(jnp, self.activation)(self.weight @ x + self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mlp:
    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_modules_in_the_style_of_equinox_are_lifted_under_vmap_and_grad():
    model = Mlp([Linear(normal(0, 8, 4), np.zeros(8)), Linear(normal(1, 3, 8), np.ones(3))])
    x = normal(2, 5, 4)
    fn = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    layout = infer_layout(fn, model, x)
    assert layout["layers/0/weight"] == jw.Axes((-1,), (-2,))
    represented = represent(model, layout, low_rank)
    actual = jax.jit(lift(fn, on_materialize="error"))(represented, x)
    np.testing.assert_allclose(actual, fn(materialize(represented), x), rtol=2e-5, atol=2e-5)

    trainable, frozen = jw.split(represented, jw.adapt.factors)
    loss = lambda t: jnp.sum(lift(fn)(jw.combine(t, frozen), x))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in grads.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """Fields in the order of their use, not of the alphabet; a function and a flag as leaves."""

    up: Linear
    activation: object
    down: Linear
    inference: bool

    def __call__(self, x):
        if not self.inference:
            raise ValueError("traced or changed")
        return x + self.down(self.activation(self.up(x)))


def test_statistics_are_those_of_the_leaf_whatever_the_order_of_fields_and_layers():
    """More than ten layers of one shape: as text, layer 10 comes before layer 2."""
    keys = range(0, 48, 4)
    blocks = [
        Residual(Linear(normal(i, 4, 4), normal(i + 1, 4)), jax.nn.relu,
              Linear(normal(i + 2, 4, 4), normal(i + 3, 4)), True)
        for i in keys
    ]  # fmt: skip
    x = normal(100, 6, 4) / 100
    fn = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    model = Mlp(blocks)
    assert len(infer_layout(fn, model, x)) == 24
    tx = jw.chain(jw.quantize.gptq(bits=8, group_size=4), jw.adapt.lora(rank=1))
    stats = jw.calibrate(fn, model, [x], needs=tx.needs(model))
    h = np.asarray(x, np.float64)
    for i, block in enumerate(blocks):
        z = np.maximum(np.tanh(h @ np.asarray(block.up.weight).T + block.up.bias), 0)
        for name, read in (("up", h), ("down", z)):
            gram = stats.get(f"layers/{i}/{name}/weight", "gram")
            np.testing.assert_allclose(gram, read.T @ read, rtol=1e-4)
        z = np.tanh(z @ np.asarray(block.down.weight).T + block.down.bias)
        h = h + z
    small = jw.apply(tx, model, stats=stats)
    assert jax.tree.structure(materialize(small)) == jax.tree.structure(model)
    # Functions are no arguments of jit; `split` puts them aside.
    trainable, frozen = jw.split(small, jw.adapt.factors)
    out = jax.jit(lambda t, x: lift(fn)(jw.combine(t, frozen), x))(trainable, x)
    np.testing.assert_allclose(out, fn(model, x), rtol=0.1, atol=0.1)


def count_instructions(program):
    return {
        kind: len(re.findall(rf"= \S+ {kind}\(", program))
        for kind in ("dot", "fusion", "while", "convolution", "transpose", "copy", "custom-call")
    }


def test_a_lifted_dense_model_compiles_to_the_plain_program():
    """One leaf is represented, the rest is dense: what lift leaves alone costs nothing."""
    model, shape = LINEN["scan of remat"]
    x = normal(0, *shape)
    params = jax.jit(model.init)(jax.random.key(0), x)
    # A weight that is dense inside goes through every rule, and must leave no trace of it.
    wrapped = represent(params, infer_layout(model.apply, params, x), Plain.of)
    plain = jax.jit(model.apply).lower(params, x).compile()
    lifted = jax.jit(lift(model.apply)).lower(wrapped, x).compile()
    assert count_instructions(lifted.as_text()) == count_instructions(plain.as_text())
    np.testing.assert_array_equal(plain(params, x), lifted(wrapped, x))


@jw.weights._weight.weight_dataclass
class Plain(jw.weights.MatrixWeight):
    """A dense array dressed as a represented weight."""

    dense: jax.Array
    view: jw.weights.View = jw.weights._weight.static()

    @classmethod
    def of(cls, leaf, axes):
        view = jw.weights.View.of(leaf.shape, axes)
        return cls(jnp.asarray(view.to_matrix(leaf)), view)

    @property
    def dtype(self):
        return self.dense.dtype

    @property
    def _stack(self):
        return tuple(self.dense.shape[:-2])

    def matrix(self):
        return self.dense


@pytest.mark.parametrize("make", [int8, low_rank], ids=["int8", "low_rank"])
def test_the_program_does_not_grow_with_depth(make):
    def fn(p, x):
        def step(h, layer):
            return jnp.tanh(h @ layer["up"]) @ layer["down"], None

        return jax.lax.scan(step, x, p)[0]

    def equations(layers):
        p = {"up": make(normal(0, layers, 4, 8)), "down": make(normal(1, layers, 8, 4))}
        return len(str(jax.make_jaxpr(lift(fn))(p, normal(2, 5, 4))).splitlines())

    assert equations(64) == equations(4)
