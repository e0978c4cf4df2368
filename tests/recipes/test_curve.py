"""The loss on the line to the other model of a merge."""

import json

import numpy as np
import pytest

from jaxweights.recipes import RecipeError, parse_recipe, run_recipe
from tests._tiny_models import LLAMA, write_tiny

RECIPE = """\
model: {{path: "{folder}/base"}}
models: [{{path: "{folder}/tuned"}}]
transforms:
  - method: merge.interpolate
    alpha: 0.5
evaluate:
  perplexity: {{text: pydoc-topics, windows: 2, length: 16}}
  curve: 3
output:
  directory: "{folder}/out"
  formats: [safetensors]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    write_tiny(folder / "base", LLAMA)
    write_tiny(folder / "tuned", LLAMA, seed=1)
    return folder


def test_the_curve_begins_at_the_model_and_passes_the_merge(folder):
    run_recipe(parse_recipe(RECIPE.format(folder=folder)))
    result = json.loads((folder / "out" / "result.json").read_text())
    curves, scores = result["curves"], result["evaluation"]["perplexity"]
    assert curves["alphas"] == [0.0, 0.5, 1.0]
    [line] = curves["perplexity"].values()
    np.testing.assert_allclose(line[0], scores["before"]["perplexity"], rtol=1e-6)
    np.testing.assert_allclose(line[1], scores["after"]["perplexity"], rtol=1e-6)
    assert abs(line[2] - line[0]) > 1e-3
    page = (folder / "out" / "report.html").read_text()
    assert "On the way to the other models" in page and "models[0]: the loss rises" in page


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("curve: 3", "curve: 2", "evaluate: curve is 2. It must be at least 3"),
        ("  perplexity: {text: pydoc-topics, windows: 2, length: 16}\n", "", "Add `perplexity`"),
        ("models: [", "seed: 1 #", "on the way to `models`, but the recipe has none"),
    ],
)
def test_a_curve_that_cannot_be_measured_is_refused(old, new, words):
    text = RECIPE.format(folder="x")
    assert old in text
    with pytest.raises(RecipeError, match=words):
        parse_recipe(text.replace(old, new))
