"""What cannot be done block by block is refused before any work."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.core import partition
from jaxweights.models import (
    load_pretrained,
)
from jaxweights.quantize import gptq, round_to_nearest
from jaxweights.recipes import transform_in_blocks
from jaxweights.sparsify import magnitude
from tests.recipes._onload import GPTQ, QUICK, tokens

RTN = round_to_nearest(bits=4, group_size=32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"transforms": magnitude(sparsity=0.5, group="global")},
         r"looks at all layers together .*Run it in memory"),
        ({"transforms": []}, "transforms must be a transform or a sequence"),
        ({"form": "orbax"}, r"form='orbax' \(native\) stacks all layers of a leaf"),
        ({"form": "zip"}, "form='zip' is unknown"),
        ({"again": "always"}, "again='always' is unknown"),
        ({"batches": []}, "there is no batch to calibrate on"),
        ({"memory": 10**6}, "memory=1MB does not suffice: one block needs .*Give .* batches"),
        ({"transforms": gptq(bits=4, group_size=48)}, "group_size=48 does not divide"),
        ({"transforms": partition(("embed/.*", RTN), (..., RTN)), "batches": []},
         "'embed/embedding': lies outside the layers"),
        ({"form": "awq", "transforms": gptq(bits=8, group_size=32)}, "8 bits|bits=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(folder, tmp_path, changes, message):
    given = {"transforms": gptq(**GPTQ), "batches": tokens()} | changes
    with pytest.raises(
        (ValueError, TypeError), match=f"(?s)recipes.transform_in_blocks|{message}"
    ) as error:
        transform_in_blocks(folder / "llama", tmp_path / "out", **given)
    assert re.search(message, str(error.value), re.DOTALL)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_and_stacked_trees_are_refused(folder, tmp_path):
    tx = round_to_nearest(bits=4, group_size=32)
    small = transform_in_blocks(folder / "llama", tmp_path / "small", tx)
    with pytest.raises(ValueError, match="is quantized already"):
        transform_in_blocks(small, tmp_path / "out", tx)
    again = transform_in_blocks(small, tmp_path / "out", tx, dequantize=True)
    assert load_pretrained(again).params["layers"]["mlp"]["up"]["kernel"].bits == 4


def test_a_full_disk_is_told_before_the_tokens_are_embedded(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    from jaxweights.recipes.onload import _run

    monkeypatch.setattr(_run.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match=r"takes \d+ bytes, but only 100000 are free"):
        transform_in_blocks(folder / "llama", tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    source = open_checkpoint(folder / "llama")
    tensors = {name: np.array(tensor) for name, tensor in source.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    config = json.dumps(source.config)
    write_safetensors(tmp_path / "bad", tensors, files={"config.json": config})
    with pytest.raises(ValueError, match=r"mlp/up/kernel of layer 1.*\[2, 3\]"):
        transform_in_blocks(tmp_path / "bad", tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
