"""What mergekit itself made of its configurations, reproduced from the same files."""

import json

import numpy as np
import pytest

from jaxweights.recipes.mergekit import run_merge
from tests._fixtures import fixture, fixture_exists
from tests.recipes.mergekit._checkpoints import read, write_config, write_models

# Share of the entries that may differ: those next to a threshold that both compute in float32.
FILES = {
    "linear": 0.0,
    "passthrough": 0.0,
    "task_arithmetic": 0.0,
    "ties": 0.0,
    "dare_linear": 0.0,
    "dare_ties": 0.0,
    "breadcrumbs": 0.0,
    "breadcrumbs_ties": 0.0,
}


def _cases():
    if not fixture_exists("merge/linear.npz"):
        return [pytest.param(None, None, marks=pytest.mark.skip("the fixtures are not here"))]
    found = []
    for file in FILES:
        meta = json.loads(str(fixture(f"merge/{file}.npz")["meta"]))
        found += [pytest.param(file, case, id=f"{file}-{case}") for case in meta["cases"]]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("file, case", _cases())
def test_a_configuration_gives_what_mergekit_gave(folder, file, case):
    stored = fixture(f"merge/{file}.npz")
    config = json.loads(str(stored["meta"]))["cases"][case]
    path = write_config(folder, config, f"{file}-{case}.yml")
    out = folder / f"{file}-{case}"
    run_merge(path, out, compat="mergekit")
    merged = read(out)
    expected = {k.split("/", 1)[1]: v for k, v in stored.items() if k.startswith(f"{case}/")}
    assert expected
    for name, want in expected.items():
        wrong = np.abs(merged[name] - want) > 1e-6
        assert wrong.mean() <= FILES[file], name


def test_bfloat16_results_differ_from_mergekits_by_its_roundings_on_the_way(folder):
    stored = fixture("merge/ties_bfloat16.npz")
    meta = json.loads(str(stored["meta"]))
    config = meta["cases"]["default"]
    out = folder / "bfloat16"
    run_merge(write_config(folder, config, "bfloat16.yml"), out)
    merged = read(out)
    for key, want in stored.items():
        if key.startswith("default/"):
            ours = merged[key.split("/", 1)[1]]
            assert str(ours.dtype) == "bfloat16"
            # mergekit rounds the inputs, the deltas, their sums and quotients: four half steps.
            size = np.maximum(np.abs(want.astype(np.float32)), 0.05)
            gap = np.abs(ours.astype(np.float32) - want.astype(np.float32)) / size
            assert np.quantile(gap, 0.9) < 2**-6
