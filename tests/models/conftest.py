"""Released and dense models, for the tests of quantized checkpoints."""

import json

import jax.numpy as jnp
import pytest

from jaxweights.checkpoint import write_safetensors
from jaxweights.models import load_pretrained
from tests.models._quantized_checkpoints import (
    CONFIG,
    GPTQ,
    released,
)


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "model"
    tensors, dense = released("gptq")
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": GPTQ})}
    write_safetensors(folder, tensors, files=files)
    return folder, tensors, dense


@pytest.fixture(scope="module")
def dense_model(gptq_folder):
    return load_pretrained(gptq_folder[0], dequantize=True, dtype=jnp.float32)
