"""A recipe is checked whole before any work: every fault is named with its line."""

import textwrap
from typing import Literal

import pytest

from jaxweights.core import Transform, stateless
from jaxweights.quantize import Fold, llama_folds
from jaxweights.recipes import RecipeError, load_recipe, parse_recipe
from jaxweights.recipes import _methods as methods_module
from tests._tiny_models import LLAMA


def prune(*, sparsity: float, pattern: tuple[int, int] | None = None) -> Transform:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsify.prune: sparsity={sparsity} must lie in [0, 1).")
    return stateless(lambda params, context: params, name="sparsify.prune", reads_statistics=True)


def round_off(
    *, bits: int, mode: Literal["nearest", "up"] = "nearest", group_size: int | None = None
) -> Transform:
    return stateless(lambda params, context: params, name="quantize.round_off")


def around(quantizer: Transform, *, rank: int = 1) -> Transform:
    return stateless(lambda params, context: params, name=f"quantize.around({quantizer.name})")


def folding(*, folds: Fold | tuple[Fold, ...]) -> Transform:
    return stateless(lambda params, context: params, name=f"quantize.folding({folds})")


@pytest.fixture(autouse=True)
def known_methods(monkeypatch):
    known = {
        "sparsify.prune": prune,
        "quantize.round_off": round_off,
        "quantize.around": around,
        "quantize.folding": folding,
    }
    monkeypatch.setattr(methods_module, "methods", lambda: known)


GOOD = """\
model:
  path: somewhere
calibrate:
  text: pydoc-topics
  sequences: 4
transforms:
  - method: sparsify.prune
    match: .*/mlp/.*
    except: [.*/down/.*, .*/o/.*]
    sparsity: 0.5
    pattern: [2, 4]
  - method: quantize.round_off
    bits: 4
    group_size: null
evaluate:
  perplexity: {text: moby-dick, windows: 2}
output:
  directory: out
  formats: [safetensors]
"""


def refusal(text):
    with pytest.raises(RecipeError) as error:
        parse_recipe(textwrap.dedent(text), name="r.yaml")
    return str(error.value)


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_recipe_gives_its_settings():
    recipe = parse_recipe(GOOD)
    first, second = recipe.steps
    assert first.settings == {"sparsity": 0.5, "pattern": (2, 4)}
    assert first.match == (".*/mlp/.*",)
    assert first.exempt == (".*/down/.*", ".*/o/.*")
    assert second.settings == {"bits": 4, "group_size": None}
    assert recipe.calibrate.sequences == 4
    assert recipe.evaluate.perplexity.windows == 2
    assert recipe.output.formats == ("safetensors",)
    assert recipe.text == GOOD
    assert recipe.transform.reads_statistics


def test_an_integer_serves_where_a_number_is_wanted():
    assert (
        parse_recipe(changed("sparsity: 0.5", "sparsity: 0")).steps[0].settings["sparsity"] == 0.0
    )


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            "sequences: 4",
            "sequence: 4",
            "r.yaml:5: calibrate: unknown key 'sequence'. Did you mean 'sequences'?",
        ),
        (
            "evaluate:",
            "evalute:",
            "r.yaml:15: recipe: unknown key 'evalute'. Did you mean 'evaluate'?",
        ),
        (
            "sparsify.prune",
            "sparsify.prone",
            "r.yaml:7: transforms[0]: there is no method 'sparsify.prone'. The nearest: "
            "sparsify.prune",
        ),
        (
            "sparsify.prune",
            "prune",
            "The nearest: sparsify.prune",
        ),
        (
            "sparsity: 0.5",
            "sparsty: 0.5",
            "r.yaml:10: sparsify.prune: unknown key 'sparsty'. Did you mean 'sparsity'?",
        ),
        (
            "sparsity: 0.5",
            "sparsity: half",
            "r.yaml:10: sparsify.prune.sparsity: is the text 'half'. It must be a number.",
        ),
        (
            "sparsity: 0.5",
            "sparsity: 1.5",
            "r.yaml:7: sparsify.prune: sparsity=1.5 must lie in",
        ),
        (
            "sparsity: 0.5",
            "sparsity: true",
            "is the truth value true. It must be a number",
        ),
        (
            "bits: 4",
            "bits: 4.0",
            "r.yaml:13: quantize.round_off.bits: is the number 4.0. It must be an integer.",
        ),
        (
            "bits: 4",
            "bits: 4\n    mode: neerest",
            "r.yaml:14: quantize.round_off.mode: is the text 'neerest'. It must be one of "
            "'nearest', 'up'. Did you mean 'nearest'?",
        ),
        (
            "    bits: 4\n",
            "",
            "r.yaml:12: quantize.round_off: 'bits' is missing",
        ),
        (
            "pattern: [2, 4]",
            "pattern: [2, 4, 8]",
            "r.yaml:11: sparsify.prune.pattern: is the list [2, 4, 8]. It must be a list "
            "of 2: an integer, an integer or null",
        ),
        (
            ".*/mlp/.*",
            "'*/mlp'",
            "r.yaml:8: sparsify.prune: pattern '*/mlp' is not a regular",
        ),
        (
            "path: somewhere",
            "path: 3",
            "r.yaml:2: model.path: is the integer 3. It must be text",
        ),
        (
            "path: somewhere",
            "path: a\n  package: b",
            "either `path` (a checkpoint) or `package`",
        ),
        (
            "path: somewhere",
            "package: b",
            "'b' is not one of the known packages",
        ),
        (
            "path: somewhere",
            "path: a\n  sha256: b",
            "r.yaml:3: model: `sha256` belongs to",
        ),
        (
            "text: pydoc-topics",
            "text: pydoc",
            "Did you mean 'pydoc-topics'?",
        ),
        (
            "text: pydoc-topics",
            "text: brown\n  file: b",
            "either `text` (a named text) or `file`",
        ),
        (
            "sequences: 4",
            "sequences: 0",
            "r.yaml:5: calibrate: sequences is 0. It must be at least 1",
        ),
        (
            "formats: [safetensors]",
            "formats: [safetensor]",
            "r.yaml:19: output.formats: is the list ['safetensor']. It must be a list of "
            "one of 'orbax', 'safetensors', 'gptq', ",
        ),
        (
            "formats: [safetensors]",
            "formats: []\n  report: false",
            "nothing would be written",
        ),
        (
            "  directory: out\n",
            "",
            "r.yaml:18: output: 'directory' is missing",
        ),
        (
            "transforms:",
            "transforms: []\nothers:",
            "must be a list of steps",
        ),
    ],
)
def test_each_fault_is_named_with_its_line_and_the_nearest_right_name(old, new, words):
    assert words in refusal(changed(old, new))


def test_a_method_that_reads_statistics_asks_for_calibration():
    start, end = GOOD.index("calibrate:"), GOOD.index("transforms:")
    message = refusal(GOOD[:start] + GOOD[end:])
    assert "r.yaml:4: sparsify.prune reads statistics" in message
    assert "no `calibrate` section" in message


def test_all_faults_come_in_one_message_in_the_order_of_the_file():
    text = changed("sequences: 4", "sequences: many").replace("bits: 4", "bts: 4")
    lines = refusal(text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["5", "12", "13"]


def test_sections_that_are_missing_are_named():
    message = refusal("seed: 3\n")
    assert "'model', 'transforms', 'output' is missing" in message


def test_a_recipe_that_is_a_list_is_refused():
    assert "r.yaml:1: a recipe is a mapping" in refusal("- 1\n")


def test_a_file_that_is_missing_or_binary_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "weights.yaml")


def test_a_folder_and_a_merge_configuration_are_told_where_they_belong(tmp_path):
    with pytest.raises(RecipeError, match=r"is a folder\. A recipe is a YAML file"):
        load_recipe(tmp_path)
    message = refusal("merge_method: ties\nbase_model: a\nmodels: []\n")
    assert message.splitlines() == [
        "r.yaml:1: is a merge configuration, no recipe. Run it with `jaxweights merge r.yaml OUT`."
    ]


NESTED = """\
model:
  path: somewhere
transforms:
  - method: quantize.around
    rank: 4
    quantizer:
      method: quantize.round_off
      bits: 3
output:
  directory: out
"""


def test_a_method_around_another_takes_it_as_a_step_of_its_own():
    (step,) = parse_recipe(NESTED).steps
    assert step.plain.name == "quantize.around(quantize.round_off)"
    assert step.settings == {
        "rank": 4,
        "quantizer": {"method": "quantize.round_off", "bits": 3},
    }


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("bits: 3", "bitts: 3", r"r.yaml:8: quantize.round_off: unknown key 'bitts'"),
        ("round_off", "round_of", r"r.yaml:7: quantize.around.quantizer: there is no method"),
        (
            "quantizer:\n      method: quantize.round_off\n      bits: 3",
            "quantizer: 3",
            "a step is a",
        ),
        (
            "quantizer:\n      method: quantize.round_off\n      bits: 3",
            "",
            "'quantizer' is missing",
        ),
    ],
)
def test_what_is_wrong_with_the_inner_method_is_named_with_its_line(old, new, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe(NESTED.replace(old, new), name="r.yaml")


def test_the_folds_of_the_model_are_given_once_it_is_known_inside_methods_too():
    recipe = parse_recipe(
        textwrap.dedent("""\
            model: {path: weights}
            transforms:
              - method: quantize.around
                quantizer: {method: quantize.folding, folds: model}
              - {method: quantize.folding, folds: {readers: up, writers: norm}}
            output: {directory: out}
            """)
    )
    assert recipe.steps[0].transform.name == "quantize.around(quantize.folding(()))"
    given = recipe.for_model(LLAMA)
    assert (
        given.steps[0].transform.name == f"quantize.around(quantize.folding({llama_folds(LLAMA)}))"
    )
    assert given.steps[1] is recipe.steps[1]  # its own


def test_folds_that_no_model_has_are_refused():
    with pytest.raises(RecipeError, match=r"folds: is the text 'mine'\. It must be 'model'"):
        parse_recipe(
            "model: {path: x}\ntransforms: [{method: quantize.folding, folds: mine}]\n"
            "output: {directory: y}"
        )
