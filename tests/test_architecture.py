"""Which package may import which: the order in which the library is built up and can be read."""

import ast
import graphlib
from pathlib import Path

import pytest

import jaxweights

ROOT = Path(jaxweights.__file__).parent

# What importing a package imports besides. Representations know no trees, trees know no models, and
# only the last rows know files, recipes and the terminal.
IMPORTS = {
    "weights": set(),
    "core": {"weights"},
    "lift": {"core", "weights"},
    "calibrate": {"core", "lift", "weights"},
    "sparsify": {"core", "weights"},
    "quantize": {"core", "lift", "weights"},
    "merge": {"core", "weights"},
    "analyze": {"core", "merge", "weights"},
    "adapt": {"core", "merge", "quantize", "weights"},
    "align": {"analyze", "core", "lift", "merge", "weights"},
    "checkpoint": {"core", "weights"},
    "models": {"core", "lift", "weights"},
    "stream": {"checkpoint", "core", "merge", "weights"},
    "recipes": {
        *("calibrate", "checkpoint", "core", "lift", "merge", "models", "quantize", "stream"),
        "weights",
    },
    "cli": set(),
}
# What single functions import when they are called, and type hints name: what most users of the
# package never need.
IMPORTS_WHEN_CALLED = {
    "merge": {"calibrate", "quantize"},
    "quantize": {"align", "models"},
    "align": {"models"},
    "checkpoint": {"", "quantize"},  # the version of the library itself
    "models": {"checkpoint"},
    "cli": {"analyze", "checkpoint", "core", "models", "recipes", "stream", "weights"},
}


def imports_of(package):
    """Packages that a package imports at once, and those of functions and hints; "" is the root."""
    at_once, when_called = set(), set()
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = {id(n) for f in ast.walk(tree) if is_put_off(f) for n in ast.walk(f)}
        for node in ast.walk(tree):
            found = {parts[1] for name in imported(node) if (parts := f"{name}.".split("."))}
            (when_called if id(node) in inner else at_once).update(found - {package})
    return at_once, when_called - at_once


def is_put_off(node):
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imported(node):
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "jaxweights":
        packages = {path.name for path in ROOT.iterdir() if path.is_dir()}
        known = [alias.name for alias in node.names]
        names = [f"jaxweights.{name}" if name in packages else "jaxweights" for name in known]
    else:
        names = [getattr(node, "module", None) or ""]
    return [name for name in names if name.split(".")[0] == "jaxweights"]


def test_every_package_has_its_place():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(IMPORTS)


@pytest.mark.parametrize("package", IMPORTS)
def test_a_package_imports_what_is_below_it_and_nothing_else(package):
    at_once, when_called = imports_of(package)
    assert at_once == IMPORTS[package]
    assert when_called == IMPORTS_WHEN_CALLED.get(package, set())


def test_no_package_needs_itself_to_be_imported():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())
    assert order[0] == "weights"
