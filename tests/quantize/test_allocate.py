"""Allocation: measured as it says, within the budget to the byte, carried out as planned."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.calibrate import calibrate
from jaxweights.core import Stats, apply, identity, partition, partition_by
from jaxweights.core._plan import leaf_bytes
from jaxweights.quantize import (
    allocate,
    allocation_figure,
    allocation_needs,
    gptq,
    low_rank_residual,
    output_error,
    packed_bytes,
    round_to_nearest,
)
from jaxweights.weights import Axes


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gram_of(in_dim, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    x = scale * rng.normal(size=(128, 5)) @ rng.normal(size=(5, in_dim))
    x = x + 0.3 * rng.normal(size=(128, in_dim))
    return jnp.asarray(x.T @ x, jnp.float32)


def model_of_four():
    params = {"a": draw(1, 32, 16), "b": draw(2, 16, 32), "c": draw(3, 32, 24), "bias": jnp.ones(4)}
    grams = {"a": gram_of(32), "b": gram_of(16, 1, 8.0), "c": gram_of(32, 2, 0.2)}
    values = {path: {"gram": g, "count": jnp.asarray(128, jnp.int32)} for path, g in grams.items()}
    return params, Stats(values)


CANDIDATES = {
    "int2": round_to_nearest(bits=2, group_size=16),
    "int3": gptq(bits=3, group_size=16),
    "int4": gptq(bits=4, group_size=8),
    "int8": round_to_nearest(bits=8),
}


def test_every_budget_is_kept_to_the_byte_and_used_as_well_as_can_be():
    params, stats = model_of_four()
    full = allocate(params, CANDIDATES, budget=10**6, stats=stats)
    options = [list(leaf.options.values()) for leaf in full.leaves]
    assert {leaf.choice for leaf in full.leaves} == {"int8"}
    for budget in range(full.front[0].bytes, full.front[-1].bytes + 100, 211):
        found = allocate(params, CANDIDATES, budget=budget, stats=stats)
        best = min(
            sum(error for _, error in chosen)
            for chosen in itertools.product(*options)
            if sum(size for size, _ in chosen) <= budget
        )
        assert found.bytes <= budget
        assert found.error == pytest.approx(best, rel=1e-6)
        assert 0 <= found.gap < 1e-4
        done = apply(found.transform, params, stats=stats)
        assert sum(leaf_bytes(done[path]) for path in "abc") == found.bytes
        assert done["bias"] is params["bias"]


@pytest.mark.parametrize("measure", ["relative", "output", "weight"])
def test_errors_are_those_of_the_weights_that_come_out(measure):
    params, stats = model_of_four()
    found = allocate(params, CANDIDATES, budget=2200, measure=measure, stats=stats)
    done = apply(found.transform, params, stats=stats)
    for leaf in found.leaves:
        old, new = params[leaf.path], done[leaf.path].materialize()
        gram = stats.get(leaf.path, "gram") if measure != "weight" else jnp.eye(old.shape[0])
        expected = output_error(old, new, gram, relative=measure != "output")
        expected = expected / 128 if measure == "output" else expected
        np.testing.assert_allclose(leaf.error, expected, rtol=1e-4)


def test_large_outputs_get_more_bits_where_outputs_are_summed():
    params, stats = model_of_four()
    budget = 1500
    relative = allocate(params, CANDIDATES, budget=budget, stats=stats).choices
    output = allocate(params, CANDIDATES, budget=budget, stats=stats, measure="output").choices
    assert output["b"] == "int8" and output["c"] == "int2"
    assert relative != output
    urged = allocate(params, CANDIDATES, budget=budget, stats=stats, importance={"c": 1e6}).choices
    assert urged["c"] == "int8"


def test_the_fisher_measure_estimates_the_increase_of_the_loss():
    params = {"a": draw(1, 16, 8), "b": draw(2, 8, 4)}
    model = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    loss = lambda p, x: jnp.mean(jnp.square(model(p, x) - 1.0))  # noqa: E731
    rounded = {"int3": round_to_nearest(bits=3), "int8": round_to_nearest(bits=8)}
    needs = allocation_needs(params, rounded, measure="fisher")
    stats = calibrate(model, params, [draw(i, 1, 16) for i in range(4)], needs=needs, loss=loss)
    found = allocate(params, rounded, budget=150, measure="fisher", stats=stats)
    new = apply(found.transform, params)
    for leaf in found.leaves:
        change = new[leaf.path].materialize() - params[leaf.path]
        grads = [jax.grad(loss)(params, draw(i, 1, 16))[leaf.path] for i in range(4)]
        expected = np.mean([np.sum(np.square(g * change)) for g in grads])
        np.testing.assert_allclose(leaf.error, expected, rtol=1e-4)


def test_stacks_and_heads_count_all_their_matrices():
    axes = Axes(inputs=(-3,), outputs=(-2, -1))
    params = {"heads": draw(1, 2, 16, 3, 4)}
    grams = jnp.stack([gram_of(16), gram_of(16, 1)])
    stats = Stats({"heads": {"gram": grams, "count": jnp.full(2, 128, jnp.int32)}})
    rounded = {"int3": round_to_nearest(bits=3)}
    found = allocate(params, rounded, budget=10**4, stats=stats, layout={"heads": axes})
    new = apply(found.transform, params, layout={"heads": axes})["heads"].materialize()
    each = [
        float(
            output_error(
                params["heads"][i].reshape(16, 12), new[i].reshape(16, 12), grams[i], relative=True
            )
        )
        for i in range(2)
    ]
    np.testing.assert_allclose(found.error, sum(each), rtol=1e-5)


def test_candidates_are_any_transforms_and_those_that_do_not_fit_are_not_offered():
    params, stats = model_of_four()
    candidates = {
        "g32": round_to_nearest(bits=3, group_size=32),
        "low rank": low_rank_residual(round_to_nearest(bits=3), rank=2),
        "float": identity(),
    }
    found = allocate(params, candidates, budget=10**5, stats=stats)
    assert set(found.choices.values()) == {"float"} and found.error == 0
    assert found.bytes == sum(params[path].nbytes for path in "abc")
    (narrow,) = (leaf for leaf in found.leaves if leaf.path == "b")
    assert set(narrow.options) == {"low rank", "float"}
    assert "group_size=32 does not divide" in narrow.unfit["g32"]
    small = allocate(params, candidates, budget=found.front[0].bytes, stats=stats)
    assert small.bytes == found.front[0].bytes and small.choices["b"] == "low rank"


def test_codes_of_three_bits_may_be_counted_as_packed():
    params, stats = model_of_four()
    stored = allocate(params, {"int3": CANDIDATES["int3"]}, budget=10**5, stats=stats)
    packed = allocate(
        params, {"int3": CANDIDATES["int3"]}, budget=10**5, stats=stats, size="packed"
    )
    new = apply(packed.transform, params, stats=stats)
    entries = sum(params[path].size for path in "abc")
    zero_points = sum(new[path].zero_point.size for path in "abc")
    # Codes share a byte in twos, zero points have one each.
    assert stored.bytes - packed.bytes == entries * (4 - 3) // 8 + zero_points * (8 - 3) // 8
    assert packed.bytes == sum(packed_bytes(new[path]) for path in "abc")


def test_it_survives_json_and_prints_and_draws():
    params, stats = model_of_four()
    found = allocate(params, CANDIDATES, bits_per_weight=6.0, stats=stats)
    assert found.budget == 6 * sum(params[path].size for path in "abc") // 8
    content = json.loads(found.to_json())
    again = apply(partition_by(content["choices"], CANDIDATES), params, stats=stats)
    first = apply(found.transform, params, stats=stats)
    for path in "abc":
        np.testing.assert_array_equal(first[path].codes, again[path].codes)
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "choice", "bytes", "error"]
    assert lines[-1].split()[-2] == str(found.bytes)
    figure = allocation_figure(found)
    assert {text.get_text() for text in figure.axes[0].texts} == set(CANDIDATES)
    assert len(figure.axes[0].lines[0].get_xdata()) == len(found.front)


def test_what_cannot_be_allocated_is_refused_by_its_words():
    params, stats = model_of_four()
    rounded = {"int4": round_to_nearest(bits=4)}
    with pytest.raises(ValueError, match=r"candidate 'gptq' fits no leaf. .*'stats' is missing"):
        allocate(params, rounded | {"gptq": gptq(bits=4)}, budget=10**6, measure="weight")
    with pytest.raises(ValueError, match=r"candidates is empty"):
        allocate(params, {}, budget=1)
    with pytest.raises(TypeError, match=r"candidate 'int4' is 4, no transform"):
        allocate(params, {"int4": 4}, budget=1)
    with pytest.raises(ValueError, match=r"budget=None and bits_per_weight=None: give one"):
        allocate(params, rounded)
    with pytest.raises(ValueError, match=r"measure='best' is unknown. Choose one of relative"):
        allocate(params, rounded, budget=1, measure="best")
    with pytest.raises(ValueError, match=r"measure='best' is unknown. Choose one of relative"):
        allocation_needs(params, rounded, measure="best")
    with pytest.raises(ValueError, match=r"size='small' is unknown"):
        allocate(params, rounded, budget=1, size="small")
    with pytest.raises(ValueError, match=r"measure='relative' reads .* needs=allocation_needs\("):
        allocate(params, rounded, budget=1)
    with pytest.raises(ValueError, match=r"'a': the statistic 'gram' is missing"):
        allocate(params, rounded, budget=1, stats=Stats({"b": stats.values["b"]}))
    with pytest.raises(ValueError, match=r"budget of 1 bytes is below 1184, which the smallest"):
        allocate(params, rounded, budget=1, measure="weight")
    with pytest.raises(ValueError, match=r"'b': no candidate fits.*group_size=32 does not divide"):
        bad = {"g32": round_to_nearest(bits=4, group_size=32)}
        allocate(params, bad, budget=10**5, measure="weight")
    with pytest.raises(ValueError, match=r"no candidate changes any leaf"):
        allocate(params, {"float": identity()}, budget=10**5, measure="weight")
    with pytest.raises(ValueError, match=r"importance: pattern 'z' matches no leaf"):
        allocate(params, rounded, budget=10**5, measure="weight", importance={"z": 1.0})
    with pytest.raises(ValueError, match=r"'a': 'int5' is no transform. The nearest: \['int4'\]"):
        partition_by({"a": "int5"}, rounded)


def test_leaves_that_a_candidate_names_are_allocated():
    params, _ = model_of_four()
    named = {f"int{b}": partition(("a", round_to_nearest(bits=b))) for b in (2, 4)}
    found = allocate(params, named, budget=400, measure="weight")
    assert found.choices == {"a": "int4"}


@pytest.mark.parametrize("budget", [np.int64(150), 150.5])
def test_a_budget_may_be_a_share_of_a_size(budget):
    params = {"kernel": jnp.ones((16, 8))}
    rounded = {"int8": round_to_nearest(bits=8), "int4": round_to_nearest(bits=4)}
    found = allocate(params, rounded, budget=budget, measure="weight")
    assert (found.budget, found.choices) == (150, {"kernel": "int4"})
