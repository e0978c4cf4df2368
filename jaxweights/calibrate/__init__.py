"""Calibration: statistics of a model on data, for the methods that need them."""

from jaxweights.calibrate._calibrate import calibrate as calibrate
from jaxweights.calibrate._pipeline import pipeline as pipeline
from jaxweights.core._stats import STATISTICS as STATISTICS
from jaxweights.core._stats import Stats as Stats
from jaxweights.core._stats import merge_stats as merge_stats

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
