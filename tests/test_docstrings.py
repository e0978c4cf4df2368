"""What every public name says of itself, so that `help` answers and each example runs."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pydoc
import re
import textwrap
import types
from pathlib import Path

import pytest

import jaxweights

ROOT = Path(jaxweights.__file__).parent
PACKAGES = sorted(
    ".".join(("jaxweights", *file.parent.relative_to(ROOT).parts))
    for file in ROOT.rglob("__init__.py")
)


def public(package):
    """What a package lists, by name."""
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in module.__all__}


def is_function(value):
    """Whether a value is a function, jitted or not."""
    return inspect.isfunction(value) or (callable(value) and hasattr(value, "__wrapped__"))


OBJECTS = {
    f"{value.__module__}.{value.__qualname__}": value
    for package in PACKAGES
    for value in public(package).values()
    if is_function(value) or (inspect.isclass(value) and value.__module__ != "builtins")
}
OF_FLAX = {"parent", "name"}  # fields of every linen module
FUNCTIONS = {name: value for name, value in OBJECTS.items() if not inspect.isclass(value)}
CLASSES = {name: value for name, value in OBJECTS.items() if inspect.isclass(value)}


def entries(docstring, section):
    """Names that a section of a docstring explains, such as the arguments under `Args:`."""
    found = re.search(rf"^{section}:\n((?:  .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    lines = found.group(1) if found else ""
    return {name.strip("*") for name in re.findall(r"^  (\*{0,2}\w+):", lines, re.MULTILINE)}


def fields_of(cls):
    """Names of the fields of a dataclass or a named tuple."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return getattr(cls, "_fields", ())


def described(cls):
    """Fields that a class explains: in its docstring, or by a string of their own below them."""
    if not cls.__module__.startswith("jaxweights"):
        return set()
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    in_place = {
        before.target.id
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(getattr(after.value, "value", None), str)
    }
    docstring = inspect.cleandoc(cls.__doc__ or "")
    return in_place | entries(docstring, "Args") | entries(docstring, "Attributes")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_explains_its_arguments_and_result_and_has_an_example(name):
    function = FUNCTIONS[name]
    docstring = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    assert set(signature.parameters) <= entries(docstring, "Args")
    silent = signature.return_annotation in (None, "None")
    assert silent or re.search(r"^(Returns|Yields):$", docstring, re.MULTILINE)
    assert re.search(r"^Example:\n(  .*\n|\n)*  >>> ", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_explains_every_field_of_it(name):
    cls = CLASSES[name]
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    told = set().union(*map(described, cls.__mro__))
    fields = {*fields_of(cls)} - OF_FLAX
    assert {field for field in fields if not field.startswith("_")} <= told


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_shows_what_it_lists_and_nothing_else(package):
    module, names = importlib.import_module(package), public(package)
    families = {file.parent.name for file in Path(module.__file__).parent.glob("*/__init__.py")}
    assert {name for name in dir(module) if not name.startswith("_")} - families <= {*names}
    assert {name for name in names if isinstance(names[name], types.ModuleType)} <= families
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_nothing_of_other_libraries(package):
    known = {"jaxweights", "builtins", "typing", "types", "collections", ""}
    names = public(package)
    modules = {name: getattr(names[name], "__module__", "") or "" for name in names}
    assert {module.split(".")[0] for module in modules.values()} <= known
    assert "Any" not in names
