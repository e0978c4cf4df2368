"""Tests of plan."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest

from jaxweights.core import (
    Layout,
    apply,
    chain,
    flatten,
    identity,
    leafwise,
    partition,
    stateless,
)
from jaxweights.core._plan import describe_leaf, leaf_bytes, plan
from jaxweights.merge import mean
from jaxweights.weights import Axes, Masked, Quantized


def to_int8(name="to_int8"):
    """Rounds to integers, one scale per output."""

    def fn(weight):
        scale = jnp.max(jnp.abs(weight), axis=0, keepdims=True) / 127
        return jnp.round(weight / scale).astype(jnp.int8), scale

    def wrap(leaf, result, view):
        codes, scale = result
        return Quantized.from_codes(codes, scale, bits=8, dtype=leaf.dtype, view=view)

    return leafwise(fn, name=name, wrap=wrap)


def abstract(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def model():
    return {
        "embed": {"embedding": abstract(50, 16)},
        "layers": {
            "up": {"kernel": abstract(3, 16, 24)},
            "norm": {"scale": abstract(3, 16)},
        },
        "out": {"kernel": abstract(16, 4), "bias": abstract(4)},
        "step": abstract(dtype="int32"),
    }


LAYOUT = {"layers/up/kernel": Axes()}


def test_a_plan_reads_no_data_and_agrees_with_what_apply_does():
    tree = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model())
    found = plan(to_int8(), model(), layout=LAYOUT)
    done = flatten(apply(to_int8(), tree, layout=LAYOUT))[0]
    before = flatten(tree)[0]
    for leaf in found.leaves:
        assert leaf.changed == (done[leaf.path] is not before[leaf.path]), leaf.path
        assert leaf.bytes_after == leaf_bytes(done[leaf.path])
        assert leaf.bytes_before == before[leaf.path].nbytes
        assert leaf.after == describe_leaf(done[leaf.path])
    assert [leaf.path for leaf in found.changed] == ["layers/up/kernel", "out/kernel"]
    assert found.bytes_after == sum(leaf_bytes(leaf) for leaf in done.values())


def test_every_untouched_leaf_says_why():
    why = {leaf.path: leaf.why for leaf in plan(to_int8(), model(), layout=LAYOUT).leaves}
    assert why == {
        "embed/embedding": "an embedding; name it in `partition` to transform it",
        "layers/norm/scale": "a bias or norm",
        "layers/up/kernel": "",
        "out/bias": "a vector",
        "out/kernel": "",
        "step": "int32, not floating",
    }


def test_leaves_outside_a_traced_layout_are_no_matrices():
    layout = Layout.of({"out/kernel": Axes()}, traced=True)
    why = {leaf.path: leaf.why for leaf in plan(to_int8(), model(), layout=layout).leaves}
    assert why["layers/up/kernel"] == "no matrix of the traced model"
    assert why["out/kernel"] == ""


def test_leaves_that_no_rule_takes_say_so():
    tx = partition(("out/kernel", to_int8()), (..., identity()))
    why = {leaf.path: leaf.why for leaf in plan(tx, model()).leaves}
    assert why["layers/up/kernel"] == "no rule takes it"


def test_what_apply_refuses_for_its_shape_is_refused_in_the_same_words():
    tree = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model())
    with pytest.raises(ValueError) as applied:
        apply(to_int8(), tree)
    with pytest.raises(ValueError, match=r"layers/up/kernel.*is ambiguous") as planned:
        plan(to_int8(), model())
    assert str(planned.value) == str(applied.value)


def test_missing_models_are_asked_for_and_abstract_ones_suffice():
    with pytest.raises(ValueError, match="'models' is missing"):
        plan(mean(), model())
    found = plan(mean(), model(), models=[model(), model()])
    assert {leaf.path for leaf in found.leaves if not leaf.changed} == {"step"}
    assert found.bytes_after == found.bytes_before


def test_statistics_are_made_up_in_the_shapes_that_calibration_would_give():
    shapes = {}

    def fn(weight, **statistics):
        shapes.update({name: x.shape for name, x in statistics.items()})
        return weight

    needs = ("count", "gram", "min", "second_moment", "grad_sq")
    found = plan(leafwise(fn, name="reader", needs=needs), model(), layout=LAYOUT)
    # Inside, each matrix of the stack is by itself.
    assert shapes == {
        "count": (),
        "gram": (16, 16),
        "min": (16,),
        "second_moment": (16,),
        "grad_sq": (16, 4),
    } or shapes["grad_sq"] == (16, 24)
    assert found.needs["out/kernel"] == frozenset(needs)


def test_tied_leaves_are_counted_once():
    shared = abstract(16, 16)
    found = plan(to_int8(), {"a": {"kernel": shared}, "b": {"kernel": shared}})
    first, second = found.leaves
    assert (first.bytes_before, second.bytes_before) == (1024, 0)
    assert second.why == "tied to a/kernel" and second.bytes_after == 0
    assert first.after == second.after == "Quantized(bits=8)"


def test_leaves_that_are_no_arrays_stay_as_they_are():
    found = plan(mean(), {"w": abstract(4), "name": 3.0}, models=[{"w": abstract(4), "name": 3.0}])
    assert [(leaf.path, leaf.changed) for leaf in found.leaves] == [("name", False), ("w", True)]


def test_functions_of_a_module_are_listed_and_take_nothing():
    planned = plan(to_int8(), {"kernel": jnp.ones((2, 2)), "activation": jax.nn.relu})
    row = next(leaf for leaf in planned.leaves if leaf.path == "activation")
    assert (row.changed, row.bytes_before, row.bytes_after) == (False, 0, 0)
    assert "not floating" in row.why


def test_dtypes_and_shapes_after_are_told():
    tx = chain(
        stateless(
            lambda p, c: {path: x[:1].astype(jnp.bfloat16) for path, x in p.items()}, name="shrink"
        )
    )
    (leaf,) = plan(tx, {"w": abstract(4, 2)}).leaves
    assert (leaf.shape, leaf.shape_after) == ((4, 2), (1, 2))
    assert (leaf.dtype, leaf.dtype_after) == ("float32", "bfloat16")
    assert "float32 -> bfloat16" in str(plan(tx, {"w": abstract(4, 2)}))


@pytest.mark.parametrize(
    "dtype, count", [("float32", 60), ("bfloat16", 30), ("int4", 8), ("uint2", 4), ("bool", 15)]
)
def test_bytes_count_narrow_dtypes_as_packed(dtype, count):
    # 15 entries: 60 bits of int4 fill 8 bytes.
    assert leaf_bytes(abstract(3, 5, dtype=dtype)) == count


def test_keys_have_the_bytes_of_their_data():
    assert leaf_bytes(jax.random.key(0)) == 8


def test_representations_are_described_with_their_bases():
    weight = Quantized.from_codes(jnp.ones((8, 4), jnp.int8), jnp.ones((2, 4)), bits=4)
    masked = Masked(weight, jnp.ones((8, 4), bool))
    assert describe_leaf(masked) == "Masked(Quantized(bits=4, group_size=4))"
    assert describe_leaf(jnp.ones(3)) == "dense"


def test_a_representation_may_describe_itself():
    class Spoken(Masked):
        def describe(self):
            return "half of it"

    assert describe_leaf(Spoken(jnp.ones(2), jnp.ones(2, bool))) == "half of it"


def test_the_table_is_aligned_and_has_a_total():
    text = str(plan(to_int8(), model(), layout=LAYOUT))
    name, head, rule, *rows, second_rule, total = text.splitlines()
    assert name == "to_int8"
    assert rule == second_rule and set(rule) == {"-"}
    column = head.index("becomes")
    for row in rows:
        assert row[column - 1] == " " and row[column] != " ", row
    assert re.match(r"2 of 6 leaves change", total)
    assert "3x16x24" in text and "Quantized(bits=8)" in text


def test_json_holds_what_the_table_shows():
    found = plan(to_int8(), model(), layout=LAYOUT)
    content = json.loads(found.to_json())
    assert content["name"] == "to_int8"
    assert content["bytes_after"] == found.bytes_after < content["bytes_before"]
    kernel = next(leaf for leaf in content["leaves"] if leaf["path"] == "layers/up/kernel")
    assert kernel["shape"] == [3, 16, 24] and kernel["after"] == "Quantized(bits=8)"
    assert content["leaves_changed"] == 2


def test_a_tree_in_the_transforms_place_is_told_apart():
    with pytest.raises(TypeError, match=r"^plan: the first argument is a dict, not a transform"):
        plan({"kernel": jnp.ones((4, 4))}, identity())  # type: ignore[arg-type]
