"""Provenance comes back as it was written, and nothing else is taken for it."""

import json
import platform

import jax
import pytest

from jaxweights.checkpoint import Provenance

MADE = Provenance(
    recipe={"chain": [{"wanda": {"sparsity": 0.5}}, "gptq"], "seed": None, "keep": True},
    versions={"jax": "0.10.2"},
    source="sha256:00",
    errors={"mlp/kernel": {"relative_error": 0.25, "zeros": 3}},
    timestamp="2026-11-22T10:00:00Z",
)


def test_every_field_comes_back():
    assert Provenance.from_json(MADE.to_json()) == MADE
    assert Provenance.from_json(Provenance().to_json().encode()) == Provenance()
    assert MADE.to_json() == Provenance.from_json(MADE.to_json()).to_json()


def test_collecting_notes_what_is_running_and_no_time_unless_given():
    made = Provenance.collect(recipe={"a": 1}, errors={"w": {"error": 1}})
    assert made.versions["jax"] == jax.__version__
    assert made.versions["python"] == platform.python_version()
    assert made.timestamp is None and made.errors == {"w": {"error": 1.0}}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"recipe": {"f": float("nan")}}, "'recipe/f' is nan, which JSON cannot hold"),
        ({"recipe": {"x": [1, {2: 3}]}}, "'recipe/x/1' is dict, which JSON cannot hold"),
        ({"recipe": {"f": print}}, "'recipe/f' is builtin_function_or_method"),
        ({"recipe": []}, "'recipe' is list, not an object"),
        ({"versions": {"jax": 1}}, "'versions/jax' is 1, not text"),
        ({"source": 3, "timestamp": 4}, "'source' is 3, not text; 'timestamp' is 4, not text"),
        ({"errors": {"w": {"e": float("inf")}}}, "'errors/w/e' is inf"),
        ({"errors": {"w": {"e": "big"}}}, "'errors/w' is .*not numbers by name"),
        ({"errors": {"w": 1.0}}, "'errors/w' is 1.0, not numbers by name"),
    ],
)
def test_what_json_would_lose_is_refused_by_place(fields, words):
    with pytest.raises(ValueError, match=f"Provenance: .*{words}"):
        Provenance(**fields)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 2}, "has format 2; this library reads 1"),
        ({"more": 1}, "'more' is unknown"),
        ({"recipe": None}, "'recipe' is NoneType, not an object"),
        ({"versions": {"jax": None}}, "'versions/jax' is None, not text"),
        ({"errors": {"w": {"e": True}}}, "'errors/w' is .*not numbers"),
    ],
)
def test_a_changed_file_is_refused_field_by_field(change, words):
    text = json.dumps(json.loads(MADE.to_json()) | change)
    with pytest.raises(ValueError, match=f"here: .*{words}"):
        Provenance.from_json(text, where="here")


def test_missing_fields_and_other_values_are_refused():
    fields = json.loads(MADE.to_json())
    del fields["source"], fields["errors"]
    with pytest.raises(ValueError, match="'source' is missing; 'errors' is missing"):
        Provenance.from_json(json.dumps(fields))
    for text in ("[]", "3", "null"):
        with pytest.raises(ValueError, match="must be a JSON object"):
            Provenance.from_json(text)
    with pytest.raises(ValueError, match="not valid UTF-8 JSON"):
        Provenance.from_json(MADE.to_json()[:-5])
