"""jaxweights run: a recipe, from its model to its report."""

from __future__ import annotations

import argparse
from typing import Any

SUMMARY = "run a recipe: load, measure, change, measure again, write"
DESCRIPTION = """\
Runs a recipe. Loads its model (downloading a pinned package once), measures it, calibrates,
changes the weights, measures again, and writes the result and a report.

Nothing appears at the destination before all of it is written. An existing destination is
refused, unless --overwrite is given."""
EXAMPLES = """\
examples:
  jaxweights run configs/quickstart.yaml
  jaxweights run configs/smollm2.yaml --output runs/second --json

The folder that is written holds
  report.html      what changed and what it cost, in one page
  result.json      the same for programs
  recipe.yaml      the recipe, word for word
  orbax/           the weights as they are represented, for jaxweights
  safetensors/     the weights as dense arrays, for other tools
or a folder for each of the formats that the recipe names"""

# How the words of the library's errors are said in a recipe.
WORDS = ((r"`partition`", "what stays as it is is named by `except` in the step"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as those in configs/")
    parser.add_argument("--output", metavar="FOLDER", help="write here, not where the recipe says")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where a killed run of a recipe with `memory` stopped",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder, at the end"
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.cli._progress import show_progress
    from jaxweights.recipes import load_recipe, run_recipe

    recipe = load_recipe(options.recipe)
    with show_progress(options.quiet) as progress:
        result = run_recipe(
            recipe,
            output=options.output,
            overwrite=options.overwrite,
            resume=options.resume,
            progress=progress,
        )
    summary = {"directory": str(result.directory)} | result.summary
    return summary, _text(summary, recipe.output.report)


def _text(summary: dict[str, Any], has_report: bool) -> str:
    from jaxweights.recipes._html import megabytes
    from jaxweights.recipes._report import measured

    size = summary["size"]
    rows = [("Size of the weights", megabytes(size["before"]), megabytes(size["after"]))]
    for label, spec, before, after, *_ in measured(summary):
        rows.append((label, format(before, spec), format(after, spec)))
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{'':<{width}}  {'before':>10}  {'after':>10}"]
    lines += [f"{label:<{width}}  {old:>10}  {new:>10}" for label, old, new in rows]
    written = summary["directory"]
    lines += ["", f"Written to {written}" + (f"; read {written}/report.html" if has_report else "")]
    return "\n".join(lines)
