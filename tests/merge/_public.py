"""The checkpoints and results of public implementations that the merging tests compare with."""

from __future__ import annotations

import json

import numpy as np

from tests._fixtures import fixture

NAMES = ("ft1", "ft2", "ft3")
# Where leaves are merged by themselves, three shapes prove as much as all, and compile faster.
LEAVES = ("self_attn.k_proj.weight", "mlp.down_proj.weight", "norm.weight")


def whole_checkpoint(name: str) -> dict[str, np.ndarray]:
    """`base`, `ft1`, `ft2` or `ft3`, as a flat tree in torch's orientation."""
    arrays = fixture(f"merge/inputs_{name}.npz")
    return {path: array for path, array in arrays.items() if path != "meta"}


def checkpoint(name: str) -> dict[str, np.ndarray]:
    """Some leaves of a checkpoint."""
    arrays = whole_checkpoint(name)
    return {path: array for path, array in arrays.items() if path.endswith(LEAVES)}


def results(
    file: str, leaves: tuple[str, ...] = LEAVES
) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """Merged tensors by case and path, and the settings of each case."""
    arrays = fixture(f"merge/{file}.npz")
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        case, _, path = key.partition("/")
        if path and path.endswith(leaves):
            cases.setdefault(case, {})[path] = array
    return cases, json.loads(str(arrays["meta"]))["cases"]


def settings(case: dict, *names: str) -> dict[str, list]:
    """Per-model settings of a case, in the order of its models."""
    return {name: [m["parameters"][name] for m in case["models"]] for name in names}


def models(case: dict) -> list[dict[str, np.ndarray]]:
    """The checkpoints of a case."""
    return [checkpoint(m["model"]) for m in case["models"]]


def assert_merged(got: dict, expected: dict, atol: float) -> None:
    """Every stored tensor is reproduced."""
    assert expected
    for path, want in expected.items():
        np.testing.assert_allclose(np.asarray(got[path]), want, rtol=0, atol=atol, err_msg=path)
