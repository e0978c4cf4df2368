"""The command line: jaxweights quantize, run, merge, plan, inspect, compare, convert."""

from jaxweights.cli._main import main as main

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
