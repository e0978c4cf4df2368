"""Functions of arrays and settings compile once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core._compiled import compiled


def counted():
    """A function that counts how often it is traced."""
    traces = []

    @compiled
    def scale(x, *, by=1, offset=None, table=()):
        """Times and plus."""
        traces.append(by)
        if not isinstance(by, int):
            raise TypeError(f"by={by}")
        return x * by + (0 if offset is None else offset) + sum(table)

    return scale, traces


def test_it_is_traced_once_for_each_choice_of_settings_and_shape():
    scale, traces = counted()
    for _ in range(3):
        assert scale(jnp.float32(2), by=3) == 6
        assert scale(jnp.float32(2), by=3, offset=jnp.float32(1)) == 7
        assert scale(jnp.float32(2), by=5) == 10
    assert traces == [3, 3, 5]
    assert scale.__name__ == "scale"
    assert scale.__doc__ == "Times and plus."


def test_an_equal_setting_of_another_type_is_another_setting():
    scale, _ = counted()
    assert scale(jnp.float32(2), by=3) == 6
    with pytest.raises(TypeError, match=r"by=3\.0"):
        scale(jnp.float32(2), by=3.0)


def test_settings_that_cannot_be_hashed_are_taken_as_they_are():
    scale, traces = counted()
    assert scale(np.float32(2), table=[1, 2]) == 5
    assert scale(np.float32(2), table=[1, 2]) == 5
    assert len(traces) == 2


def test_methods_of_one_matrix_compile_no_more_than_once():
    weight, gram = jnp.ones((8, 4)), jnp.eye(8)
    settings = {"bits": 4, "group_size": 4}
    calls = (
        lambda: jw.quantize.gptq_matrix(weight, gram, **settings),
        lambda: jw.quantize.awq_matrix(weight, gram, jnp.ones(8), **settings),
        lambda: jw.quantize.hqq_matrix(weight, **settings),
        lambda: jw.quantize.power_matrix(weight, **settings),
    )
    for call in calls:
        jax.block_until_ready(call())
        with jax.no_tracing():
            call()
