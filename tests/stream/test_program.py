"""Programs for slices are compiled for workers that each have a core."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxweights.stream import _program, _workers
from jaxweights.stream._program import slice_program


def test_a_program_keeps_static_arguments_and_its_name():
    @slice_program
    def double(x):
        """Twice as much."""
        return 2 * x

    def power(x, *, n):
        return x**n

    assert double.__doc__ == "Twice as much."
    np.testing.assert_array_equal(double(np.arange(3.0)), [0, 2, 4])
    np.testing.assert_array_equal(
        slice_program(power, static_argnames="n")(np.arange(3.0), n=2), [0, 1, 4]
    )


@pytest.mark.parametrize("cores, divides", [(4, False), (64, True)])
def test_work_is_divided_among_threads_only_where_cores_have_no_worker(monkeypatch, cores, divides):
    monkeypatch.setattr(_workers, "cores", lambda: cores)
    monkeypatch.setattr(_program, "cores", lambda: cores)
    options = _program._options()
    assert ("xla_disable_hlo_passes" not in options) == divides


def test_other_devices_compile_as_ever(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _program._options() is None


def test_flags_that_later_releases_may_not_know_are_not_given_to_them(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert "xla_cpu_use_fusion_emitters" not in _program._options()


_SCRIPT = """
import threading, jax, numpy as np
from jaxweights.stream._program import run_where_called, slice_program
run_where_called()
program = slice_program(lambda x: jax.numpy.sin(x) * jax.numpy.cos(x) + 1)
x = jax.block_until_ready(jax.numpy.ones(1 << 20))
np.asarray(program(x))
import time
before, all_before = time.thread_time(), time.process_time()
for _ in range(100):
    np.asarray(program(x))
print((time.thread_time() - before) / (time.process_time() - all_before))
"""


def test_the_thread_that_calls_a_program_runs_it():
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) > 0.9
