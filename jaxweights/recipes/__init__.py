"""Recipes: a file that says what to change, a run that does it, a report of what it cost."""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from jaxweights.recipes._download import DownloadError as DownloadError
    from jaxweights.recipes._fetch import cache_folder as cache_folder
    from jaxweights.recipes._fetch import fetch as fetch
    from jaxweights.recipes._methods import methods as methods
    from jaxweights.recipes._packages import MODELS as MODELS
    from jaxweights.recipes._packages import TEXTS as TEXTS
    from jaxweights.recipes._packages import Package as Package
    from jaxweights.recipes._perplexity import PerplexityScore as PerplexityScore
    from jaxweights.recipes._perplexity import perplexity as perplexity
    from jaxweights.recipes._perplexity import relative_change as relative_change
    from jaxweights.recipes._plan_recipe import plan_recipe as plan_recipe
    from jaxweights.recipes._recipe import Recipe as Recipe
    from jaxweights.recipes._recipe import load_recipe as load_recipe
    from jaxweights.recipes._recipe import parse_recipe as parse_recipe
    from jaxweights.recipes._retrieval import RetrievalScore as RetrievalScore
    from jaxweights.recipes._retrieval import embed as embed
    from jaxweights.recipes._retrieval import passages as passages
    from jaxweights.recipes._retrieval import retrieval as retrieval
    from jaxweights.recipes._run import RunResult as RunResult
    from jaxweights.recipes._run import run_recipe as run_recipe
    from jaxweights.recipes._texts import Text as Text
    from jaxweights.recipes._texts import load_text as load_text
    from jaxweights.recipes._texts import read_text_file as read_text_file
    from jaxweights.recipes._texts import reflow_paragraphs as reflow_paragraphs
    from jaxweights.recipes._tokens import sequences as sequences
    from jaxweights.recipes._tokens import windows as windows
    from jaxweights.recipes._yaml import RecipeError as RecipeError
    from jaxweights.recipes.onload import transform_in_blocks as transform_in_blocks

# Loaded when first used: merging checkpoints needs none of them, and they take as long to import as
# everything that it needs.
_LAZY = {
    "_download": ("DownloadError",),
    "_fetch": ("cache_folder", "fetch"),
    "_methods": ("methods",),
    "_packages": ("MODELS", "TEXTS", "Package"),
    "_perplexity": ("PerplexityScore", "perplexity", "relative_change"),
    "_recipe": ("Recipe", "load_recipe", "parse_recipe"),
    "_plan_recipe": ("plan_recipe",),
    "_retrieval": ("RetrievalScore", "embed", "passages", "retrieval"),
    "_run": ("RunResult", "run_recipe"),
    "_texts": ("Text", "load_text", "read_text_file", "reflow_paragraphs"),
    "_tokens": ("sequences", "windows"),
    "_yaml": ("RecipeError",),
    "onload": ("transform_in_blocks",),
}
_PLACES = {name: module for module, names in _LAZY.items() for name in names}


__all__ = list(_PLACES)  # what help() lists; type checkers read the imports  # pyright: ignore


def __getattr__(name: str) -> _typing.Any:
    if name in _PLACES:
        return getattr(_importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
