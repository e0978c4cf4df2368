"""Values keep their lines, and YAML's traps do not bite."""

import pytest

from jaxweights.recipes._yaml import RecipeError, parse_yaml


def plain(text):
    return parse_yaml(text, name="r.yaml").plain()


@pytest.mark.parametrize(
    "text, value",
    [
        ("2:4", "2:4"),  # 124 in YAML 1.1
        ("no", "no"),  # False in YAML 1.1
        ("1e-5", 1e-5),  # text in PyYAML
        ("2026-01-01", "2026-01-01"),  # a date in YAML 1.1
        ("0.5", 0.5),
        ("4", 4),
        ("-1", -1),
        ("1_000", 1000),
        ("010", 10),  # 8 in YAML 1.1
        ("true", True),
        ("null", None),
        ("", None),
        ("'4'", "4"),
        (".inf", float("inf")),
        ("3.", 3.0),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = plain(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_knows_its_line():
    root = parse_yaml("# comment\na:\n  - 1\n  - b: 2\n", name="r.yaml")
    assert root.keys == {"a": 2}
    items = root.value["a"].value
    assert [item.line for item in items] == [3, 4]
    assert items[1].value["b"].line == 4


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: 2\na: 3\n", r"r.yaml:3: the key 'a' is here for the second time.*line 1"),
        ("a: &x 1\nb: *x\n", r"r.yaml:1: .*no anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", r"r.yaml:1: the tag .*is not allowed"),
        ("a: !mine 3\n", r"r.yaml:1: the tag '!mine' is not allowed"),
        ("a: [1,\nb: 2", r"r.yaml:2: is not valid YAML"),
        ("a:\n\t- 1\n", r"r.yaml:2: is not valid YAML"),
        ("a: 1\n---\nb: 2\n", r"r.yaml:3: a second document begins"),
        ("", r"r.yaml: is empty"),
        ("? [a, b]\n: 1\n", r"r.yaml:1: a key must be a word"),
        ("a: \x00", r"r.yaml: is not valid YAML"),
        ("[" * 5000, r"r.yaml: is (nested too deeply|not valid YAML)"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text, words):
    with pytest.raises(RecipeError, match=words):
        plain(text)


def test_all_duplicate_keys_are_listed_at_once():
    with pytest.raises(RecipeError) as error:
        plain("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n")
    assert len(str(error.value).splitlines()) == 2
