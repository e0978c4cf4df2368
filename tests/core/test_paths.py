"""Paths are the one name of a leaf."""

import dataclasses
from collections import namedtuple

import jax
import jax.numpy as jnp
import pytest

from jaxweights.core import flatten, path_key, unflatten
from jaxweights.core._paths import check_pattern, fail, matching, nearest
from jaxweights.weights import Masked


def test_every_container_gives_readable_paths():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        kernel: int
        layers: list

    tree = {"model": Module(1, [2, (3,)]), "point": namedtuple("Point", "x")(4), "none": None}
    flat, treedef = flatten(tree)
    assert flat == {"model/kernel": 1, "model/layers/0": 2, "model/layers/1/0": 3, "point/x": 4}
    assert unflatten(treedef, {path: leaf + 1 for path, leaf in flat.items()})["model"].layers == [
        3,
        (4,),
    ]


def test_a_tree_is_rebuilt_whatever_order_its_leaves_come_in():
    tree = {"layers": list(range(12))}
    flat, structure = flatten(tree)
    # Both sort dicts by their keys as text, so that layer 10 comes before layer 2.
    for leaves in (jax.tree.map(lambda x: x, flat), jax.jit(lambda x: x)(flat)):
        assert list(leaves) != list(flat)
        assert unflatten(structure, leaves) == tree


def test_represented_weights_are_leaves_and_a_flat_tree_keeps_its_paths():
    weight = Masked(jnp.ones((2, 2)), jnp.ones((2, 2), bool))
    flat, _ = flatten({"a": {"b": weight}})
    assert flat == {"a/b": weight}
    assert list(flatten(flat)[0]) == ["a/b"]


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"core.flatten: 'a/b': two leaves have this path.*rename"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_keys_depend_on_the_path_alone():
    key = jax.random.key(0)
    bits = {path: int(jax.random.bits(path_key(key, path))) for path in ("a/kernel", "b/kernel")}
    assert bits["a/kernel"] != bits["b/kernel"]
    # CRC-32 of the path, pinned: results of released recipes must not change.
    expected = jax.random.fold_in(key, 2894466353)
    assert int(jax.random.bits(expected)) == bits["a/kernel"]


def test_patterns_match_whole_paths():
    paths = ["mlp/kernel", "mlp/kernel_norm", "attn/mlp/kernel"]
    assert matching("mlp/kernel", paths) == ["mlp/kernel"]
    assert matching(".*/kernel", paths) == ["mlp/kernel", "attn/mlp/kernel"]


@pytest.mark.parametrize(
    "pattern, error", [("*/kernel", ValueError), (3, TypeError), (None, TypeError)]
)
def test_bad_patterns_are_refused_before_a_tree_is_seen(pattern, error):
    with pytest.raises(
        error, match=r"partition: pattern .*(not a regular expression|must be a string)"
    ):
        check_pattern("partition", pattern)


def test_the_nearest_names_come_first():
    assert nearest("mpl/kernel", ["attn/q", "mlp/kernel", "mlp/bias"])[0] == "mlp/kernel"
    assert nearest("zzz", ["a", "b"]) == ["a", "b"]


def test_all_problems_are_one_message():
    with pytest.raises(ValueError, match="f: one\nf: two"):
        fail("f", ["one", "two"])
    fail("f", [])
