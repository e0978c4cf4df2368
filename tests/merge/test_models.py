"""Tests of what is checked before models are merged."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, identity, partition
from jaxweights.merge import mean, task_arithmetic, ties
from jaxweights.weights import Masked
from tests.merge._trees import copy, tree

BASE = tree(0)


def change(model, **leaves):
    dense = {**model["dense"], **leaves}
    return {**model, "dense": {name: x for name, x in dense.items() if x is not None}}


def test_all_mismatches_are_one_message():
    models = [
        change(BASE, bias=None),
        change(BASE, kernel=jnp.ones((7, 6))),
        change(BASE, bias=jnp.ones(5, jnp.int32)),
    ]
    with pytest.raises(ValueError) as error:
        apply(mean(names=["math", "code", "chat"]), BASE, models=models)
    for words in (
        "merge.mean: models[0] ('math') lacks ['dense/bias']",
        "'dense/kernel': is (7, 6) in models[1] ('code') but (7, 5) in the base",
        "'dense/bias': is int32 in models[2] ('chat') but float32 in the base",
    ):
        assert words in str(error.value)


def test_a_longer_vocabulary_is_told_to_resize():
    base, model = ({"embedding": jnp.ones((n, 4))} for n in (10, 12))
    with pytest.raises(ValueError, match="resize the embedding to the base's rows"):
        apply(mean(), base, models=[model])


def test_many_missing_leaves_are_counted():
    base = {str(i): jnp.ones(1) for i in range(8)}
    with pytest.raises(ValueError, match=r"lacks \['0', '1', '2', '3', '4'\] and 3 more"):
        apply(mean(), base, models=[{}])


def test_leaves_that_only_a_model_has_are_refused():
    with pytest.raises(ValueError, match=r"models\[1\] has \['dense/extra'\], which params lacks"):
        apply(mean(), BASE, models=[BASE, change(BASE, extra=jnp.ones(1))])


def test_a_rule_may_merge_the_part_that_the_models_share():
    part = {"dense": {"kernel": BASE["dense"]["kernel"] + 1}}
    tx = partition(("dense/kernel", mean()), (..., identity()))
    got = apply(tx, BASE, models=[part])
    np.testing.assert_array_equal(got["dense"]["kernel"], part["dense"]["kernel"])
    assert got["dense"]["bias"] is BASE["dense"]["bias"]


def test_no_models_and_missing_models_are_refused():
    with pytest.raises(ValueError, match=r"merge.ties: models is empty"):
        apply(ties(), BASE, models=[])
    with pytest.raises(ValueError, match=r"merge.ties: 'models' is missing: pass models"):
        apply(ties(), BASE)


@pytest.mark.parametrize(
    "tx, words",
    [
        (mean(weights=[1, 2]), "weights has 2 entries, but 3 models were given"),
        (ties(density=[0.2, 0.3]), "density has 2 entries, but 3 models were given"),
        (mean(names=["a"]), "names has 1 entries, but 3 models were given"),
    ],
)
def test_settings_per_model_must_count_the_models(tx, words):
    with pytest.raises(ValueError, match=words):
        apply(tx, BASE, models=[tree(i) for i in (1, 2, 3)])


def test_the_base_among_the_models_is_refused_where_deltas_are_merged():
    models = [tree(1), BASE]
    with pytest.raises(ValueError, match=r"models\[1\] is the base itself, so its delta is zero"):
        apply(task_arithmetic(), BASE, models=models)
    apply(task_arithmetic(), BASE, models=[tree(1), copy(BASE)])  # equal values are no mistake
    apply(mean(), BASE, models=models)  # a mean may well include it


def test_represented_weights_are_refused_with_a_remedy():
    masked = change(BASE, kernel=Masked(BASE["dense"]["kernel"], jnp.ones((7, 5), bool)))
    with pytest.raises(ValueError, match=r"is a Masked in models\[0\].*jaxweights.materialize"):
        apply(mean(), BASE, models=[masked])
    with pytest.raises(ValueError, match="is a Masked, and merging needs dense weights"):
        apply(mean(), masked, models=[BASE])


@pytest.mark.parametrize("tx", [mean(), task_arithmetic(), ties(density=0.1)])
def test_values_that_are_not_finite_are_refused_by_leaf_and_model(tx):
    # TIES would drop a NaN in a small delta, or keep it: either way it is refused.
    bad = tree(1)["dense"]["kernel"].at[2, 3].set(jnp.nan)
    models = [tree(2), change(tree(1), kernel=bad, bias=jnp.full(5, jnp.inf))]
    with pytest.raises(ValueError) as error:
        apply(tx, BASE, models=models)
    text = str(error.value)
    assert "'dense/kernel': 1 of 35 values of models[1] are not finite" in text
    assert "the first at [2, 3]" in text
    assert "'dense/bias': 5 of 5 values of models[1] are not finite" in text


def test_a_base_that_is_not_finite_is_refused_too():
    bad = change(BASE, bias=jnp.full(5, jnp.nan))
    with pytest.raises(ValueError, match="values of the base are not finite"):
        apply(task_arithmetic(), bad, models=[tree(1)])


def test_results_that_overflow_say_so():
    base = {"w": jnp.zeros(2, jnp.float16)}
    model = {"w": jnp.full(2, 6e4, jnp.float16)}
    with pytest.raises(ValueError, match=r"overflow float16. Pass out_dtype=float32"):
        apply(task_arithmetic(scale=2.0), base, models=[model])


def test_tied_leaves_are_merged_once_and_stay_tied():
    shared, other = jnp.ones((4, 3)), jnp.full((4, 3), 3.0)
    got = apply(mean(), {"in": shared, "out": shared}, models=[{"in": other, "out": other}])
    assert got["in"] is got["out"]
    equal = {"in": other, "out": jnp.array(other)}  # loaded twice, the same values
    assert apply(mean(), {"in": shared, "out": shared}, models=[equal])["out"][0, 0] == 3
    untied = {"in": other, "out": 2 * other}
    with pytest.raises(ValueError, match=r"'out': is tied to 'in' in params, but models\[0\]"):
        apply(mean(), {"in": shared, "out": shared}, models=[untied])


def test_empty_and_scalar_leaves_are_merged():
    base = {"a": jnp.zeros(()), "b": jnp.zeros((0, 3)), "c": jnp.zeros((2, 2))}
    model = {"a": jnp.ones(()), "b": jnp.zeros((0, 3)), "c": jnp.ones((2, 2))}
    for tx in (mean(), ties(density=0.5), ties(density=0.5, scope="leaf")):
        got = apply(tx, base, models=[model])
        assert got["b"].shape == (0, 3) and float(got["a"]) == 1
