"""What doctests and tests share: virtual devices and the names that examples use."""

import os

# Read when JAX is imported.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Examples and reports draw figures; a test machine has no screen.
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    """Lets examples use `jax`, `jnp` and `jw` without importing them."""
    import jaxweights as jw

    doctest_namespace.update(jax=jax, jnp=jnp, jw=jw)
