"""jaxweights plan: what a recipe would do to which weight, without doing it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxweights.cli._run import WORDS as WORDS

SUMMARY = "show what a recipe would do to which weight, without doing it"
DESCRIPTION = """\
Shows what a recipe would do: which step acts on which weight, and its size before and after.
Checks the recipe completely: every pattern must match, every group size must fit. Loads the
model's weights for their shapes (downloading a pinned package once); computes nothing."""
EXAMPLES = """\
example:
  jaxweights plan configs/quickstart.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as those in configs/")


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.cli._progress import show_progress
    from jaxweights.recipes import load_recipe, plan_recipe

    recipe = load_recipe(options.recipe)
    with show_progress(options.quiet) as progress:
        plan = plan_recipe(recipe, progress=progress)
    return json.loads(plan.to_json()), str(plan)
