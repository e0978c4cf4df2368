"""What two processes hold together is transformed as one process would."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One of each way in which a transform looks at values outside of its compiled program.
NAMES = [
    "calibrate",
    "refuse",
    "quantize.round_to_nearest",
    "quantize.nf4 double",
    "quantize.gptq",
    "quantize.awq",
    "quantize.adadim",
    "quantize.adaround",
    "quantize.int8_static",
    "sparsify.magnitude",
    "sparsify.wanda",
    "adapt.lora",
    "merge.ties",
    "merge.dare_linear",
    "merge.slerp",
    "merge.model_stock",
]


@pytest.mark.slow
def test_transforms_of_a_tree_that_two_processes_hold_equal_those_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # Of two devices each, which divide every split axis; without optimization, as all tests.
    flags = re.sub(r"(device_count=)\d+", r"\g<1>2", os.environ["XLA_FLAGS"])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
    }
    program = [sys.executable, "-m", "tests.contract._one_of_two_processes"]
    processes = [
        subprocess.Popen(
            [*program, str(index), address, *NAMES],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Before it stand the lines of the library that connects them.
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [{}, {}]
