"""Fixtures that the tests of checkpoints share."""

import resource
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxweights.checkpoint import save_tree
from tests.checkpoint._orbax import quantized


@pytest.fixture
def file_limit():
    """Makes the system refuse to write files longer than 16 KiB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved tree of a quantized weight and a plain array."""
    save_tree(tmp_path / "out", {"q": quantized(), "w": jnp.arange(600.0)}, config={"a": 1})
    return tmp_path / "out"
