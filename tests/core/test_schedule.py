"""every, between and materialized: when a transform acts, and what it may change."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import (
    Context,
    Transform,
    between,
    chain,
    every,
    materialized,
    partition,
    stateless,
)
from jaxweights.weights import Masked

# Adds 1 at every step at which it acts, so that values count applications.
add_one = stateless(lambda p, _: jax.tree.map(lambda x: x + 1, p), name="add_one")


def add_step() -> Transform:
    """Adds the step that it sees."""
    return stateless(
        lambda p, context: p | {"w": p["w"] + context.require("step", "add_step")},
        name="add_step",
    )


def counting() -> Transform:
    """Counts its own applications in a state."""
    return Transform(
        init=lambda params: jnp.zeros([], jnp.int32),
        update=lambda params, state, context: (params, state + 1),
        name="counting",
    )


def run(tx, steps, *, jit, start=0, step=None):
    """Steps at which the value changes, and the final state."""
    update = lambda p, s, i: tx.update(p, s, Context(step=None if step is None else i))  # noqa: E731
    update = jax.jit(update) if jit else update
    params = {"w": jnp.zeros([], jnp.int32), "deep": {"b": jnp.ones((2,))}}
    state, acted = tx.init(params), []
    for i in range(start, start + steps):
        before = int(params["w"])
        params, state = update(params, state, jnp.int32(i))
        if int(params["w"]) != before:
            acted.append(i)
    return acted, params, state


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "tx, acts",
    [
        (every(1, add_one), list(range(12))),
        (every(3, add_one), [0, 3, 6, 9]),
        (every(20, add_one), [0]),
        (between(2, 4, add_one), [2, 3, 4]),
        (between(0, 0, add_one), [0]),
        (between(4, 10, every(3, add_one)), [6, 9]),
        (every(3, between(4, 10, add_one)), [6, 9]),
        (chain(every(4, add_one), between(5, 5, add_one)), [0, 4, 5, 8]),
        (partition(("w", every(5, add_one))), [0, 5, 10]),
    ],
    ids=[
        "always",
        "every",
        "once",
        "between",
        "first",
        "nested",
        "nested_other",
        "chain",
        "partition",
    ],
)
def test_it_acts_at_the_steps_it_says_and_at_no_other(tx, acts, jit):
    acted, params, _ = run(tx, 12, jit=jit)
    assert acted == acts
    if "partition" not in tx.name:
        np.testing.assert_array_equal(params["deep"]["b"], 1.0 + len(acts))


@pytest.mark.parametrize("jit", [False, True])
def test_a_step_that_the_caller_gives_is_the_clock(jit):
    acted, _, state = run(every(3, add_one), 6, jit=jit, start=100, step="given")
    assert acted == [102, 105]
    assert int(state.count) == 6


@pytest.mark.parametrize("jit", [False, True])
def test_what_is_inside_sees_the_step(jit):
    _, params, _ = run(between(3, 5, every(2, add_step())), 10, jit=jit)
    assert int(params["w"]) == 4


@pytest.mark.parametrize("jit", [False, True])
def test_the_inner_state_advances_only_when_it_acts(jit):
    _, _, state = run(every(3, counting()), 10, jit=jit)
    assert (int(state.count), int(state.inner)) == (10, 4)


def test_one_compiled_program_serves_all_steps():
    tx = between(1, 3, every(2, add_one))
    update = jax.jit(chex.assert_max_traces(lambda p, s: tx.update(p, s, Context()), n=1))
    params, state = {"w": jnp.zeros([])}, tx.init({"w": jnp.zeros([])})
    for _ in range(5):
        params, state = update(params, state)
    assert float(params["w"]) == 1


def test_a_whole_loop_can_be_scanned():
    tx = every(3, add_one)
    params = {"w": jnp.zeros([])}
    body = lambda carry, _: (tx.update(*carry, Context()), None)  # noqa: E731
    (params, _), _ = (
        jax.jit(lambda c: jax.lax.scan(body, c, None, length=10))((params, tx.init(params)))[0],
        None,
    )
    assert float(params["w"]) == 4


def test_represented_weights_and_leaves_that_are_no_arrays_pass_through():
    tx = every(
        2,
        partition(
            (
                "w/.*|w",
                stateless(
                    lambda p, _: {k: Masked(v.base * 2, v.mask) for k, v in p.items()},
                    name="double",
                ),
            )
        ),
    )
    tree = {"w": Masked(jnp.ones((2, 2)), jnp.eye(2) > 0), "fn": jax.nn.relu, "n": 3}
    update = lambda w, s: tx.update(tree | {"w": w}, s, Context())  # noqa: E731

    def traced(w, state):
        new, state = update(w, state)
        assert new["fn"] is jax.nn.relu and new["n"] == 3
        return new["w"], state

    w, state = tree["w"], tx.init(tree)
    for _ in range(3):
        w, state = jax.jit(traced)(w, state)
    chex.assert_trees_all_equal(w, Masked(4 * jnp.ones((2, 2)), tree["w"].mask))


mask_large = stateless(
    lambda p, _: jax.tree.map(lambda x: Masked(x, jnp.abs(x) > 1), p), name="mask_large"
)
halve_dtype = stateless(
    lambda p, _: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), name="halve_dtype"
)
drop_row = stateless(lambda p, _: jax.tree.map(lambda x: x[1:], p), name="drop_row")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "tx, words",
    [
        (mask_large, r"'w': mask_large turns an array \(3,\) float32 into a Masked \(3,\) float32"),
        (
            halve_dtype,
            r"'w': halve_dtype turns an array \(3,\) float32 into an array \(3,\) bfloat16",
        ),
        (drop_row, r"'w': drop_row turns an array \(3,\) float32 into an array \(2,\) float32"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_changes_the_kind_of_a_leaf_is_refused_and_the_remedy_named(tx, words, jit):
    for scheduled in (every(2, tx), between(5, 9, tx)):  # at once, or long before its turn

        def update(p, tx=scheduled):
            return tx.update(p, tx.init(p), Context())

        with pytest.raises(ValueError, match=rf"core\.\w+: {words}.*materialized\("):
            (jax.jit(update) if jit else update)({"w": jnp.arange(3.0)})


def test_a_state_that_changes_shape_is_refused():
    growing = Transform(
        init=lambda params: jnp.zeros(1),
        update=lambda params, state, context: (params, jnp.zeros(len(state) + 1)),
        name="growing",
    )
    tx = between(0, 9, growing)
    with pytest.raises(ValueError, match=r"core.between: growing: its state changes"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), Context())


@pytest.mark.parametrize("jit", [False, True])
def test_materialized_keeps_the_values_and_lets_a_pruner_run_in_a_loop(jit):
    tx = every(2, materialized(mask_large))
    update = lambda p, s: tx.update(p, s, Context())  # noqa: E731
    update = jax.jit(update) if jit else update
    params = {"w": jnp.array([0.5, 3.0])}
    state = tx.init(params)
    params, state = update(params, state)
    chex.assert_trees_all_equal(params, {"w": jnp.array([0.0, 3.0])})
    params, state = update({"w": jnp.array([0.25, 3.0])}, state)  # not its turn
    chex.assert_trees_all_equal(params, {"w": jnp.array([0.25, 3.0])})


def test_names_needs_and_flags_of_the_transform_are_kept():
    reading = Transform(
        init=lambda p: (),
        update=lambda p, s, c: (p, s),
        needs=lambda params, *, named=False: {"w": frozenset({"gram"})},
        name="reading",
        reads_statistics=True,
        moves_inputs=True,
    )
    for tx in (every(2, reading), between(0, 1, reading), materialized(reading)):
        assert tx.needs({}) == {"w": frozenset({"gram"})}
        assert "reading" in tx.name
        assert (tx.reads_statistics, tx.moves_inputs) == (True, True)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (
            functools.partial(every, 0, add_one),
            ValueError,
            "core.every: k=0 must be a whole number",
        ),
        (functools.partial(every, 1.5, add_one), ValueError, "core.every: k=1.5 must be"),
        (functools.partial(every, 2, lambda p: p), TypeError, "core.every: .* not a transform"),
        (functools.partial(between, 3, 2, add_one), ValueError, "first=3 and last=2 must satisfy"),
        (
            functools.partial(between, -1, 2, add_one),
            ValueError,
            "first=-1 and last=2 must satisfy",
        ),
    ],
)
def test_bad_settings_are_refused_when_the_transform_is_built(build, error, words):
    with pytest.raises(error, match=words):
        build()
