"""Says what a recipe would do, before anything is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxweights.core import Layout, chain, flatten
from jaxweights.core._plan import Plan, plan_and_leaves
from jaxweights.lift import infer_layout
from jaxweights.recipes._download import Progress
from jaxweights.recipes._model import Model, check_fit, load_model
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._write import (
    check_formats_of_shapes,
)
from jaxweights.recipes._yaml import RecipeError


def plan_recipe(recipe: Recipe, *, progress: Progress | None = None) -> Plan:
    """Says what a recipe would do to which leaf; loads the model, changes nothing.

    Args:
      recipe: A checked recipe.
      progress: Called with (task, done, total).

    Returns:
      The plan, which prints as a table.

    Raises:
      RecipeError: If a pattern matches no leaf, or a method does not suit one.

    Example:
      >>> import json, tempfile
      >>> from pathlib import Path
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> config = jw.models.LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> folder = Path(tempfile.mkdtemp())
      >>> jw.checkpoint.write_safetensors(
      ...     folder / "model",
      ...     jw.models.checkpoint_from_params(params, config),
      ...     files={"config.json": json.dumps(jw.models.config_to_dict(config))},
      ... )
      >>> recipe = jw.recipes.parse_recipe(f'''
      ... model: {{path: {folder}/model}}
      ... transforms: [{{method: quantize.round_to_nearest, bits: 4, group_size: 32}}]
      ... output: {{directory: {folder}/small, formats: [safetensors], report: false}}
      ... ''')
      >>> len(plan_recipe(recipe).changed)
      7
    """
    report = progress or (lambda task, done, total: None)
    model = load_model(recipe.model, progress=report)
    others = tuple(load_model(m, progress=report).params for m in recipe.models)
    check_fit(recipe, model)
    recipe = recipe.for_model(model.pretrained.config)
    return plan_steps(recipe, model, others)[1]


def plan_steps(recipe: Recipe, model: Model, others: tuple[Any, ...]) -> tuple[Layout, Plan]:
    """Reads the layout off the model's trace, and tries all steps on shapes."""
    flat = flatten(model.params)[0]
    problems = []
    for step in recipe.steps:
        try:
            step.transform.init(flat)
        except ValueError as error:
            problems += [f"{recipe.name}:{step.line}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(problems))
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    layout = infer_layout(model.forward, model.params, tokens)
    # Whether statistics are still true was settled with the recipe: here shapes alone count.
    steps = [dataclasses.replace(step.transform, moves_inputs=False) for step in recipe.steps]
    try:
        found, leaves = plan_and_leaves(
            chain(*steps), model.params, layout=layout, models=others or None
        )
        check_formats_of_shapes(recipe.output.formats, model.pretrained.config, leaves)
    except ValueError as error:
        lines = [_with_line(line, recipe) for line in str(error).splitlines()]
        raise RecipeError("\n".join(lines)) from error
    return layout, found


def _with_line(message: str, recipe: Recipe) -> str:
    """Puts the line of the step that a message is from before it."""
    for step in recipe.steps:
        if message.startswith(f"{step.method}:"):
            return f"{recipe.name}:{step.line}: {message}"
    return f"{recipe.name}: {message}"
