"""Recipes and models for the tests of runs."""

from jaxweights.recipes import parse_recipe

DECODER = """\
model: {{path: "{model}"}}
calibrate:
  text: pydoc-topics
  sequences: 4
  length: 32
  batch: 2
transforms:
  - method: sparsify.wanda
    match: layers/mlp/.*/kernel
    sparsity: 0.5
  - method: quantize.round_to_nearest
    except: .*/o/kernel
    bits: 8
evaluate:
  perplexity: {{text: pydoc-topics, windows: 3, length: 32}}
output:
  directory: "{output}"
"""


# No measures and no report: for what happens before and around them.
QUICK = """\
model: {{path: "{model}"}}
transforms:
  - method: quantize.round_to_nearest
    bits: 4
    group_size: 16
output: {{directory: "{output}", formats: [safetensors], report: false}}
"""


def recipe_of(template, model, output, **changes):
    text = template.format(model=model, output=output)
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_recipe(text, name="r.yaml")


EXPORT = """\
model: {{path: "{model}"}}
transforms:
  - method: quantize.round_to_nearest
    bits: {bits}
    group_size: 32
output:
  directory: "{output}"
  formats: [compressed-tensors, gguf]
"""


FLAT = QUICK.replace("report: false", "report: true, flat: true")


DISTILLED = """\
model: {{path: "{model}"}}
calibrate: {{text: pydoc-topics, sequences: 4, length: 32, batch: 4}}
transforms:
  - {{method: quantize.round_to_nearest, bits: 2, group_size: 16}}
distill: {{steps: 24, code_rate: 0.02}}
output: {{directory: "{output}", formats: [safetensors]}}
"""
