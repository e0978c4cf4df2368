"""Arrays that public implementations computed, for comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = (_ROOT / "tests" / "fixtures", _ROOT.parent / "shared" / "fixtures")


def fixture_exists(name: str) -> bool:
    """Whether a fixture is here."""
    return any((folder / name).is_file() for folder in _FOLDERS)


def fixture_path(name: str) -> Path:
    """Path of a fixture such as `quantize/gptq.npz`; skips the test where it is absent."""
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"the fixture {name} is not here")


def fixture(name: str) -> dict[str, np.ndarray]:
    """Arrays of a fixture such as `quantize/gptq.npz`; skips the test where it is absent."""
    with np.load(fixture_path(name), allow_pickle=False) as file:
        return dict(file)
