"""Runs mergekit's merge configurations, streaming: read a slice, merge it, write it."""

from jaxweights.recipes.mergekit._config import MergeConfig as MergeConfig
from jaxweights.recipes.mergekit._config import load_merge_config as load_merge_config
from jaxweights.recipes.mergekit._evaluate import Evaluation as Evaluation
from jaxweights.recipes.mergekit._evaluate import Scores as Scores
from jaxweights.recipes.mergekit._run import Merged as Merged
from jaxweights.recipes.mergekit._run import explain_merge as explain_merge
from jaxweights.recipes.mergekit._run import run_merge as run_merge

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
