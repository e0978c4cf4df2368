"""Specs say what is wrong with them, and with trees that they do not describe."""

import jax.numpy as jnp
import pytest

from jaxweights import quantize
from jaxweights.align import PermutationSpec
from jaxweights.core import apply

AXES = {"up": (None, "hidden"), "bias": ("hidden",), "down": ("hidden", None)}
PARAMS = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
STACKED = {
    "embed": (None, "residual"),
    "up": ("layers", "residual", "mlp"),
    "v": ("layers", "residual", ("heads", "values")),
}


def test_lengths_are_read_off_a_tree_also_where_an_axis_holds_several():
    params = {
        "embed": jnp.ones((9, 6)),
        "up": jnp.ones((2, 6, 10)),
        "v": jnp.ones((2, 6, 12)),
    }
    spec = PermutationSpec.of(
        params,
        STACKED,
        stacks=("layers",),
        over={"mlp": ("layers",), "heads": ("layers",), "values": ("layers", "heads")},
        sizes={"heads": 3},
    )
    assert spec.sizes == {"heads": 3, "residual": 6, "mlp": 10, "values": 4}
    assert spec.stacks == {"layers": 2}
    assert spec.shape_of("values") == (2, 3, 4)
    assert spec.names.index("heads") < spec.names.index("values")
    assert spec.leaves_of("residual") == ("embed", "up", "v")


def test_fixed_permutations_leave_the_axes_they_were_on():
    spec = PermutationSpec(
        STACKED,
        sizes={"residual": 6, "mlp": 10, "heads": 3, "values": 4},
        stacks={"layers": 2},
        over={"mlp": ("layers",), "values": ("layers", "heads")},
    )
    fewer = spec.without("residual", "heads")
    assert fewer.axes["embed"] == (None, None)
    assert fewer.axes["v"] == ("layers", None, ("heads", "values"))
    assert fewer.stacks == {"layers": 2, "heads": 3}  # values still differ along heads
    none = spec.without(*spec.names)
    assert not none.names and none.axes["v"] == ("layers", None, None)
    with pytest.raises(ValueError, match=r"'head' is no permutation of the spec.*'heads'"):
        spec.without("head")


def test_all_that_is_wrong_with_a_spec_is_one_message():
    with pytest.raises(ValueError) as error:
        PermutationSpec(
            {"a": ("p", "p"), "b": ("q",), "c": ("r", None)},
            sizes={"p": 3, "r": 0, "unused": 2, "s": 2},
            over={"p": ("t",), "s": ("s",)},
        )
    text = str(error.value)
    for words in (
        "'a': carries 'p' on two axes, so its match is no linear assignment",
        "'b': 'q' has no length",
        "'r' has length 0",
        "'unused' is on no leaf",
        "'p' differs along 't', which is neither a permutation nor a stack",
        "'s' differs along itself",
        "'a': carries 'p', which differs along 't', but has no axis 't'",
    ):
        assert words in text, (words, text)


def test_axes_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"'a': axis 1 is 3\.5\. It must be None, a name"):
        PermutationSpec({"a": ("p", 3.5)}, sizes={"p": 2})  # type: ignore[dict-item]


def test_all_that_a_tree_lacks_is_one_message():
    spec = PermutationSpec.of(PARAMS, AXES)
    quantized = apply(quantize.round_to_nearest(bits=8), {"down": jnp.ones((8, 2))})
    tree = {"up": jnp.ones((3, 7)), "odd": jnp.ones(4), "scalar": jnp.ones(()), **quantized}
    with pytest.raises(ValueError) as error:
        spec.check(tree)
    text = str(error.value)
    for words in (
        "the tree lacks ['bias'], which the spec describes",
        "the spec does not describe ['odd']. Give each leaf one entry an axis",
        "'up': axis 1 has length 7, but 'hidden' has 8",
        "'down': is a Quantized, and only dense weights are permuted",
    ):
        assert words in text, (words, text)
    with pytest.raises(ValueError, match=r"'bias': has shape \(1, 8\), but the spec describes 1"):
        spec.check(PARAMS | {"bias": jnp.ones((1, 8))})
