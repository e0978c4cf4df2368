"""Analyses of weights; they return arrays, and print and plot nothing."""

from jaxweights.analyze._compare import Comparison as Comparison
from jaxweights.analyze._compare import compare as compare
from jaxweights.analyze._deltas import Deltas as Deltas
from jaxweights.analyze._deltas import deltas as deltas
from jaxweights.analyze._report import Report as Report
from jaxweights.analyze._spectrum import Spectrum as Spectrum
from jaxweights.analyze._spectrum import spectrum as spectrum

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
