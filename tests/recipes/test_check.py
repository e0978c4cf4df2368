"""A method's own signature says what a recipe may give it."""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, Unpack

import pytest
from jax.typing import DTypeLike

from jaxweights.core import Transform
from jaxweights.recipes import methods
from jaxweights.recipes._check import MISSING, Problems, read, settings_of, spell
from jaxweights.recipes._yaml import RecipeError, parse_yaml


def value_of(text, annotation):
    problems = Problems("r.yaml")
    node = parse_yaml(f"key: {text}", name="r.yaml").value["key"]
    value = read(node, annotation, "key", problems)
    if value is MISSING:
        problems.check()
    return value


@pytest.mark.parametrize(
    "text, annotation, value",
    [
        ("3", int | float, 3),
        ("3", float, 3.0),
        ("3", float | None, 3.0),
        ("null", int | None, None),
        ("[1, 2]", tuple[int, int], (1, 2)),
        ("[1, 2]", Sequence[float], (1.0, 2.0)),
        ("[1, 2.5]", float | Sequence[float], (1.0, 2.5)),
        ("[a]", list[str], ["a"]),
        ("bfloat16", DTypeLike, "bfloat16"),
        ("tensor", int | Literal["tensor"] | None, "tensor"),
        ("{a: 1}", dict[str, int], {"a": 1}),
        ("0.5", float | Callable[[int], float], 0.5),
    ],
)
def test_values_become_what_the_annotation_asks_for(text, annotation, value):
    found = value_of(text, annotation)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text, annotation, words",
    [
        ("true", int, "is the truth value true. It must be an integer."),
        ("1", bool, "is the integer 1. It must be true or false."),
        ("1", Literal[True, "auto"], "is the integer 1. It must be one of True, 'auto'."),
        ("1.5", int | None, "is the number 1.5. It must be an integer or null."),
        ("x", float | Callable[[int], float], "is the text 'x'. It must be a number."),
        ("", str, "is empty. It must be text."),
        ("[1, b]", tuple[int, ...], "is the list [1, 'b']. It must be a list of an integer each."),
        ("{a: 1}", str, "is a mapping. It must be text."),
        ("tensr", int | Literal["tensor"], "an integer or 'tensor'. Did you mean 'tensor'?"),
    ],
)  # fmt: skip
def test_other_values_are_refused_in_the_authors_words(text, annotation, words):
    with pytest.raises(RecipeError) as error:
        value_of(text, annotation)
    assert str(error.value).startswith("r.yaml:1: key: ")
    assert words in str(error.value)


class Settings(TypedDict, total=False):
    scale: float


def factory(*, rank: int, alpha: float | None = None, **settings: Unpack[Settings]) -> Transform:
    raise NotImplementedError


def test_settings_passed_on_as_a_typed_dict_are_settings_too():
    annotations, required = settings_of(factory)
    assert annotations == {"rank": int, "alpha": float | None, "scale": float}
    assert required == ["rank"]


def test_every_method_of_the_library_can_be_named_and_described():
    found = methods()
    assert {"sparsify.wanda", "quantize.gptq", "adapt.lora", "merge.ties"} <= set(found)
    for name, method in found.items():
        annotations, _ = settings_of(method)
        for setting, annotation in annotations.items():
            words = spell(annotation)
            # Words of the author, not of Python's typing.
            assert not set("[]<>") & set(words), (name, setting, words)
