"""Models and settings for the tests of jaxweights quantize."""

import dataclasses

from tests._tiny_models import LLAMA

# Two outputs of 32 and more everywhere: GPTQ's packing needs them.
WIDE = dataclasses.replace(
    LLAMA, hidden_size=64, num_kv_heads=4, head_dim=16, intermediate_size=128
)


DATA = ("--calibration", "pydoc-topics", "--samples", 6, "--length", 24, "--batch", 2)
