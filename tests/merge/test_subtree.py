"""merge_subtree: what is merged, and whose everything else is."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, identity, partition
from jaxweights.merge import interpolate, mean, merge_subtree, task_arithmetic, ties
from jaxweights.weights import Axes
from tests.merge._trees import assert_same_bits


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def language(seed):
    return {
        "embed": {"embedding": draw(seed, (9, 6))},
        "layers": {"kernel": draw(seed + 1, (3, 6, 6)), "norm": {"scale": draw(seed + 2, (3, 6))}},
        "step": jnp.asarray(seed, jnp.int32),
    }


def vision(seed):
    return {"patch": {"kernel": draw(seed, (4, 6))}, "step": jnp.asarray(seed, jnp.int32)}


SAFE = {"llm": language(10)}
TASK = {"llm": language(20), "projector": {"kernel": draw(30, (6, 6))}, "vision": vision(40)}
LAYERS = {"llm/layers/kernel": Axes()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_safe_tower_is_merged_into_a_model_that_sees(alpha):
    got = merge_subtree(interpolate(alpha=alpha), SAFE, [TASK], pattern="llm/.*")
    assert jax.tree.structure(got) == jax.tree.structure(TASK)
    for name in ("projector", "vision"):
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(TASK[name]), strict=True)
        assert all(ours is theirs for ours, theirs in pairs)
    want = apply(interpolate(alpha=alpha), SAFE["llm"], models=[TASK["llm"]])
    assert_same_bits(got["llm"], want)


def test_the_ends_of_the_path_are_the_models_bit_for_bit():
    floats = lambda tree: {k: tree["llm"][k] for k in ("embed", "layers")}  # noqa: E731
    task = merge_subtree(interpolate(alpha=1.0), SAFE, [TASK], pattern="llm/.*")
    safe = merge_subtree(interpolate(alpha=0.0), SAFE, [TASK], pattern="llm/.*")
    assert_same_bits(floats(task), floats(TASK))
    assert_same_bits(floats(safe), floats(SAFE))


def test_layers_may_have_weights_of_their_own():
    tx = partition(
        (".*/layers/.*", interpolate(alpha=1.0)), (".*/embedding", interpolate(alpha=0.5))
    )
    got = merge_subtree(tx, SAFE, [TASK], pattern="llm/(embed|layers)/.*")["llm"]
    np.testing.assert_array_equal(got["layers"]["kernel"], TASK["llm"]["layers"]["kernel"])
    table = (SAFE["llm"]["embed"]["embedding"] + TASK["llm"]["embed"]["embedding"]) / 2
    np.testing.assert_allclose(got["embed"]["embedding"], table, rtol=1e-6)
    assert got["step"] is SAFE["llm"]["step"]  # outside of the pattern: the base's


def test_trees_of_one_structure_give_what_partition_gives():
    base, models = language(1), [language(2), language(3)]
    tx = ties(density=0.5, scope="leaf")
    layout = {"layers/kernel": Axes()}
    got = merge_subtree(tx, base, models, pattern="layers/.*", layout=layout)
    both = partition(("layers/.*", tx), (..., identity()))
    assert_same_bits(got, apply(both, base, models=models, layout=layout))
    assert got["embed"]["embedding"] is base["embed"]["embedding"]


def test_leaves_outside_are_the_owners():
    base, models = (
        {"a": jnp.zeros(2), "b": jnp.zeros(2)},
        [
            {"a": jnp.ones(2), "b": jnp.ones(2)},
            {"a": jnp.full(2, 4.0), "b": jnp.full(2, 2.0)},
        ],
    )
    for owner, tree in ((None, base), (0, models[0]), (1, models[1])):
        got = merge_subtree(mean(), base, models, pattern="a", owner=owner)
        assert got["b"] is tree["b"]
        assert float(got["a"][0]) == 2.5


def test_parts_of_several_models_come_together():
    """No tree has all leaves: the result has."""
    one = {"llm": {"w": jnp.zeros(2)}, "vision": {"w": jnp.ones(2)}}
    two = {"llm": {"w": jnp.ones(2)}, "audio": [{"w": jnp.full(2, 2.0)}, {"w": jnp.full(2, 3.0)}]}
    got = merge_subtree(interpolate(alpha=0.5), one, [two], pattern="llm/.*")
    want = {"llm": {"w": jnp.full(2, 0.5)}, "vision": one["vision"], "audio": two["audio"]}
    chex.assert_trees_all_equal(got, want)
    assert got["audio"][1]["w"] is two["audio"][1]["w"]


def test_missing_leaves_under_the_pattern_are_taken_or_refused():
    base, model = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": jnp.ones(2), "c": jnp.ones(2)}
    got = merge_subtree(interpolate(alpha=0.5), base, [model], pattern=".*")
    assert float(got["a"][0]) == 0.5
    assert got["b"] is base["b"]
    assert got["c"] is model["c"]
    with pytest.raises(ValueError) as error:
        merge_subtree(interpolate(), base, [model], pattern=".*", missing="error", names=["m"])
    assert "merge.merge_subtree: 'b': is missing in models[0] ('m')" in str(error.value)
    assert "merge.merge_subtree: 'c': is missing in the base" in str(error.value)


def test_a_leaf_that_the_owner_lacks_must_be_clear():
    base, extra = {"a": jnp.zeros(2)}, {"a": jnp.ones(2), "x": jnp.ones(2)}
    equal = {"a": jnp.ones(2), "x": jnp.ones(2)}
    assert merge_subtree(mean(), base, [extra, equal], pattern="a")["x"] is extra["x"]
    other = {"a": jnp.ones(2), "x": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"'x': differs between models\[0\], models\[1\], and"):
        merge_subtree(mean(), base, [extra, other], pattern="a")
    assert merge_subtree(mean(), base, [extra, other], pattern="a", owner=1)["x"] is other["x"]


def test_stochastic_rounding_and_jit_work_inside():
    tx = task_arithmetic(scale=0.5, out_dtype=jnp.bfloat16, rounding="stochastic")
    got = merge_subtree(tx, SAFE, [TASK], pattern="llm/layers/.*", key=jax.random.key(0))
    assert got["llm"]["layers"]["kernel"].dtype == jnp.bfloat16
    run = lambda a, b: merge_subtree(interpolate(alpha=0.3), a, [b], pattern="llm/.*")  # noqa: E731
    chex.assert_trees_all_close(jax.jit(run)(SAFE, TASK), run(SAFE, TASK), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pattern": "lm/.*"}, r"pattern='lm/.\*' matches no leaf. The nearest paths"),
        ({"pattern": "vision/.*"}, "none of which all trees have, so that nothing is merged"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"owner": 1}, "owner=1 is no place in models, of which there are 1"),
        ({"missing": "ignore"}, "missing='ignore' is not one of"),
        ({"names": ["a", "b"]}, "names has 2 entries, but 1 model"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=f"merge.merge_subtree: .*{words}"):
        merge_subtree(mean(), SAFE, [TASK], **{"pattern": "llm/.*"} | options)
    with pytest.raises(ValueError, match="models is empty"):
        merge_subtree(mean(), SAFE, [], pattern="llm/.*")
