import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core._map_over_stack import map_over_stack


def product_and_trace(operands):
    """Of a matrix (2, 3) and a vector (3,), given under names."""
    matrix, vector = operands["matrix"], operands["vector"]
    assert matrix.shape == (2, 3) and vector.shape == (3,)
    return matrix @ vector, {"corner": matrix[0, 0]}


@pytest.mark.parametrize("mapping", ["map", "vmap"])
@pytest.mark.parametrize("stack", [(), (4,), (2, 2), (1, 4)])
def test_every_matrix_meets_its_own_operands(stack, mapping):
    rng = np.random.default_rng(0)
    matrix = rng.integers(-9, 9, (*stack, 2, 3)).astype(np.float32)  # sums of integers are exact
    vector = rng.integers(-9, 9, (*stack, 3)).astype(np.float32)
    operands = {"matrix": jnp.asarray(matrix), "vector": jnp.asarray(vector)}
    product, rest = map_over_stack(product_and_trace, operands, stack, mapping)
    assert np.array_equal(product, np.einsum("...io,...o->...i", matrix, vector))
    assert np.array_equal(rest["corner"], matrix[..., 0, 0])


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_an_empty_stack_has_empty_results(mapping):
    found = map_over_stack(jnp.trace, jnp.zeros((0, 3, 2, 2)), (0, 3), mapping)
    assert found.shape == (0, 3)


def test_map_holds_one_matrix_at_a_time_and_vmap_all():
    loops = {
        mapping: "scan"
        in str(
            jax.make_jaxpr(lambda x, m=mapping: map_over_stack(jnp.trace, x, (4,), m))(
                jnp.zeros((4, 2, 2))
            )
        )
        for mapping in ("map", "vmap")
    }
    assert loops == {"map": True, "vmap": False}
