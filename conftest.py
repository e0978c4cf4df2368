"""What doctests and tests share: virtual devices and the names that examples use."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Read when JAX is imported. Tests compile much and compute little, so nothing is optimized; a run
# that sets these flags otherwise in XLA_FLAGS tests what users run, in three times the time.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jax").startswith("0.10."):  # later releases do not know the flag and refuse to start
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_given = os.environ.get("XLA_FLAGS", "")
_missing = [flag for flag in _FLAGS if flag.split("=")[0] not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_missing]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Examples and reports draw figures; a test machine has no screen.
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

# A compiled program takes ten memory maps; Linux gives a process 65530, and XLA crashes without.
_MOST_MAPS = 30_000
_TESTS_BETWEEN_LOOKS = 20
_ended = 0


def pytest_runtest_teardown():
    """Forgets compiled programs before a process has too many."""
    global _ended
    _ended += 1
    maps = Path("/proc/self/maps")
    if _ended % _TESTS_BETWEEN_LOOKS or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    """Lets examples use `jax`, `jnp` and `jw` without importing them."""
    import jaxweights as jw

    doctest_namespace.update(jax=jax, jnp=jnp, jw=jw)
