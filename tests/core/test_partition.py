"""partition gives every leaf to one rule, and every rule a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, chain, identity, partition
from tests.core._transforms import add, add_noise, counting, matrix, rotate, scale_by_rms


def make_params():
    return {
        "embed": {"embedding": matrix(0, 5, 4)},
        "mlp": {"up": matrix(1, 4, 4), "down": matrix(2, 4, 4), "bias": jnp.ones(4)},
        "head": {"kernel": matrix(3, 4, 5)},
    }


def changes(new, old):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): round(float(jnp.max(a - b)), 5)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True
        )
        if a is not b
    }


def test_the_first_rule_that_matches_wins_and_the_rest_stays():
    params = make_params()
    tx = partition(("mlp/up", add(1)), ("mlp/(up|down)", add(2)))
    assert changes(apply(tx, params), params) == {"mlp/up": 1.0, "mlp/down": 2.0}


def test_the_ellipsis_takes_what_is_left_and_follows_the_default():
    params = make_params()
    tx = partition(("mlp/up", identity()), (..., add(2)))
    assert changes(apply(tx, params), params) == {"mlp/down": 2.0}


def test_a_named_embedding_or_head_is_transformed():
    params = make_params()
    tx = partition(("embed/.*|head/.*", add(1)))
    assert changes(apply(tx, params), params) == {"embed/embedding": 1.0, "head/kernel": 1.0}


def test_names_hold_inside_nested_rules():
    params = make_params()
    inner = partition((..., add(1)))
    tx = partition(("head/.*", chain(inner, partition(("head/kernel", add(2))))))
    assert changes(apply(tx, params), params) == {"head/kernel": 3.0}


def test_a_named_leaf_that_cannot_be_transformed_is_refused():
    with pytest.raises(ValueError, match=r"add: 'mlp/bias': has shape \(4,\), which is no matrix"):
        apply(partition(("mlp/.*", add(1))), make_params())


def test_needs_follow_the_rules():
    params = make_params()
    tx = partition(("head/kernel", scale_by_rms()), ("mlp/up", add(1)), (..., scale_by_rms()))
    assert set(tx.needs(params)) == {"head/kernel", "mlp/down"}
    assert tx.reads_statistics
    assert partition(("head/.*", rotate())).moves_inputs


def test_states_belong_to_rules():
    params = {"a": matrix(0, 2, 2), "b": matrix(1, 2, 2)}
    tx = partition(("a", counting()), ("b", chain(counting(), counting())))
    new = apply(tx, params)
    np.testing.assert_allclose(new["a"], params["a"] + 1, rtol=1e-6)
    np.testing.assert_allclose(new["b"], params["b"] + 2, rtol=1e-6)


def test_adding_a_rule_does_not_change_the_random_numbers_of_others():
    params = make_params()
    key = jax.random.key(0)
    alone = apply(partition(("mlp/up", add_noise())), params, key=key)
    both = apply(partition(("mlp/down", add_noise()), ("mlp/up", add_noise())), params, key=key)
    np.testing.assert_array_equal(alone["mlp"]["up"], both["mlp"]["up"])


def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_paths():
    words = r"partition: pattern 'mpl/up' matches no leaf. The nearest paths: \['mlp/up'"
    with pytest.raises(ValueError, match=words):
        apply(partition(("mpl/up", add(1)), (..., identity())), make_params())


def test_a_rule_in_the_shadow_of_others_is_refused():
    tx = partition(("mlp/.*p", add(1)), ("mlp/up", add(2)))
    words = r"partition: pattern 'mlp/up' takes no leaf: earlier rules took all.*'mlp/up'. Put it"
    with pytest.raises(ValueError, match=words):
        apply(tx, make_params())


def test_all_bad_rules_are_one_message():
    tx = partition(("nothing", add(1)), ("nowhere", add(2)))
    with pytest.raises(
        ValueError, match=r"'nothing' matches no leaf.*\n.*'nowhere' matches no leaf"
    ):
        apply(tx, make_params())


def test_an_ellipsis_may_take_nothing():
    params = {"a": matrix(0, 2, 2)}
    assert changes(apply(partition(("a", add(1)), (..., add(2))), params), params) == {"a": 1.0}


def test_bad_rules_are_refused_when_built():
    with pytest.raises(ValueError, match=r"rule 0: rules behind `...` can match nothing"):
        partition((..., add(1)), ("a", add(2)))
    with pytest.raises(ValueError, match=r"partition: pattern '\*' is not a regular expression"):
        partition(("*", add(1)))
    with pytest.raises(TypeError, match=r"partition: rule 0: 5 is no transform"):
        partition(("a", 5))


@pytest.mark.parametrize("rules", [{"a": add(1)}, "ab", ("a", add(1), add(2))])
def test_a_rule_that_is_no_pair_is_refused_with_the_way_to_write_it(rules):
    with pytest.raises(TypeError, match=r"rule 0: .* is no pair .*partition\(\*rules\.items\(\)\)"):
        partition(rules)


def test_a_pattern_for_a_part_of_a_path_is_told_the_pattern_for_the_whole():
    params = {"params": {"Dense_0": {"kernel": jnp.ones((2, 2))}}}
    words = r"pattern 'Dense_0/kernel' matches no leaf.*whole path; '\.\*Dense_0/kernel' would"
    with pytest.raises(ValueError, match=words):
        apply(partition(("Dense_0/kernel", add(1))), params)
    apply(partition((".*Dense_0/kernel", add(1))), params)
