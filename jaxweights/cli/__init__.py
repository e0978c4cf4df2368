"""The command line: jaxweights run, plan, inspect, compare, convert."""

from jaxweights.cli._main import main as main
