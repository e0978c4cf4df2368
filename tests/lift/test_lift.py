"""lift leaves signatures, structures and everything that is no weight as they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.lift import lift
from jaxweights.weights import materialize
from tests.lift._weights import Opaque, assert_same, int8, low_rank, normal

W = int8(normal(0, 4, 3))
X = normal(1, 5, 4)


def test_arguments_that_are_no_arrays_pass_through_unchanged():
    seen = {}

    def fn(config, w, x, *rest, activation=None, train=False, nothing=None, **more):
        seen.update(config=config, rest=rest, train=train, nothing=nothing, more=more)
        return activation(x @ w)

    config = {"name": "gelu", "sizes": (1, 2)}
    y = lift(fn)(config, W, X, "text", 3, activation=jnp.tanh, train=True, flag=object)
    assert_same(y, np.tanh(X @ np.asarray(materialize(W))))
    assert seen == {
        "config": config,
        "rest": ("text", 3),
        "train": True,
        "nothing": None,
        "more": {"flag": object},
    }
    assert isinstance(seen["rest"][1], int)  # so that `range(n)` and `if` still work on it


def test_results_keep_their_structure_and_non_arrays():
    def fn(w, x):
        return {"y": (x @ w, None), "name": "layer", "n": 3, "w": w, "empty": []}

    out = lift(fn)(W, X)
    assert out["name"] == "layer" and out["n"] == 3 and out["empty"] == [] and out["y"][1] is None
    assert_same(out["w"], materialize(W))


def test_weights_in_keyword_arguments_and_in_nested_containers_are_found():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Module:
        layers: list
        width: int = dataclasses.field(metadata={"static": True})

        def __call__(self, x):
            for layer in self.layers:
                x = x @ layer["kernel"]
            return x * self.width

    module = Module([{"kernel": W}, {"kernel": int8(normal(2, 3, 2))}], 2)
    fn = lambda *, module, x: module(x)  # noqa: E731
    assert_same(lift(fn)(module=module, x=X), fn(module=materialize(module), x=X))
    assert_same(lift(Module.__call__)(module, X), materialize(module)(X))


def test_closures_over_arrays_and_over_weights_work():
    scale = jnp.float32(2)
    assert_same(lift(lambda w: (X @ w) * scale)(W), 2 * X @ np.asarray(materialize(W)))
    with pytest.raises(TypeError):  # a closed-over weight is no array; nothing densifies silently
        lift(lambda x: x @ W)(X)


def test_integers_keys_scalars_and_numpy_arrays_are_ordinary_arguments():
    def fn(w, tokens, key, temperature, table):
        noise = jax.random.normal(key, (2, 4)) * temperature
        return (jnp.asarray(table)[tokens] + noise) @ w, tokens + 1, jax.random.split(key)

    table, tokens = normal(3, 9, 4), np.array([1, 8], np.int32)
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        actual = lift(fn)(W, tokens, key, np.float32(0.5), table)
        expected = fn(materialize(W), tokens, key, np.float32(0.5), table)
        assert_same(actual[0], expected[0])
        assert actual[1].dtype == expected[1].dtype == jnp.int32
        assert actual[2].dtype == expected[2].dtype
        assert bool(jnp.all(actual[2] == expected[2]))


def test_weak_types_are_kept_so_that_dtypes_do_not_change():
    fn = lambda w, x, factor: (x @ w) * factor  # noqa: E731
    half = int8(normal(0, 4, 3, dtype=jnp.bfloat16))
    x = X.astype(jnp.bfloat16)
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    assert lift(fn)(half, x, weak).dtype == jnp.bfloat16


def test_without_represented_weights_the_function_is_called_as_it_is():
    calls = []

    def fn(w, x):
        calls.append(isinstance(w, jax.core.Tracer))
        return x @ w

    lift(fn)(normal(0, 4, 3), X)
    assert calls == [False]


def test_a_function_is_wrapped_with_its_name_and_its_errors_come_out():
    def model(w, x):
        """Says what it does."""
        raise KeyError("missing")

    assert lift(model).__name__ == "model" and lift(model).__doc__ == "Says what it does."
    with pytest.raises(KeyError, match="missing"):
        lift(model)(W, X)


def test_shapes_of_results_are_known_without_computing():
    fn = lift(lambda w, x: jnp.tanh(x @ w))
    shape = jax.eval_shape(fn, W, X)
    assert (shape.shape, shape.dtype) == ((5, 3), jnp.float32)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), W)
    assert jax.eval_shape(fn, abstract, jax.ShapeDtypeStruct(X.shape, X.dtype)).shape == (5, 3)


def test_lifted_functions_may_be_lifted_and_transformed_again():
    w = low_rank(normal(0, 4, 4))
    fn = lambda w, x: jnp.sum(x @ w)  # noqa: E731
    inner = lift(fn)
    assert_same(lift(lambda w, x: inner(w, x) + fn(w, x))(w, X), 2 * fn(materialize(w), X), 1e-4)
    grad = jax.jit(jax.grad(lift(fn), argnums=1))(w, X)
    assert_same(grad, jax.grad(fn, argnums=1)(materialize(w), X), 1e-4)


@pytest.mark.parametrize("mode", ["materialise", None, True])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r"lift: on_materialize=.* Choose 'ok', 'warn' or 'error'"):
        lift(lambda w: w, on_materialize=mode)


def test_error_names_the_path_the_primitive_and_the_kind():
    fn = lambda p, x: x @ jnp.sin(p["mlp"]["kernel"])  # noqa: E731
    words = r"lift: 'mlp/kernel': the primitive 'sin' has no rule for a Int8 .*\(4, 3\)"
    with pytest.raises(ValueError, match=words):
        lift(fn, on_materialize="error")({"mlp": {"kernel": W}}, X)


def test_warning_names_the_path_and_the_primitive_and_goes_on():
    fn = lambda p, x: x @ (p["kernel"] * 2)  # noqa: E731
    with pytest.warns(UserWarning, match=r"lift: 'kernel': the primitive 'mul' has no rule"):
        y = lift(fn, on_materialize="warn")({"kernel": W}, X)
    assert_same(y, 2 * X @ np.asarray(materialize(W)))


def test_returning_a_weight_counts_as_materialising_it():
    with pytest.raises(ValueError, match=r"'kernel': the primitive 'output'"):
        lift(lambda p: p["kernel"], on_materialize="error")({"kernel": W})


def test_a_weight_that_is_not_used_is_not_materialised():
    fn = lift(lambda p, x: x + 1, on_materialize="error")
    assert_same(fn({"kernel": Opaque(normal(0, 3, 4))}, X), X + 1)
