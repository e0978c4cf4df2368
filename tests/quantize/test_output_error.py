import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import output_error
from jaxweights.quantize._output_error import output_errors


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)) @ rng.normal(size=(4, 12)) + 0.2 * rng.normal(size=(100, 12))
    return x, rng.normal(size=(12, 7)), rng.normal(size=(12, 7))


@pytest.mark.parametrize("relative", [False, True])
def test_it_is_the_squared_change_of_the_outputs(relative):
    x, weight, other = problem()
    expected = np.sum((x @ weight - x @ other) ** 2)
    if relative:
        expected /= np.sum((x @ weight) ** 2)
    arrays = (jnp.asarray(a, jnp.float32) for a in (weight, other, x.T @ x))
    assert float(output_error(*arrays, relative=relative)) == pytest.approx(expected, rel=1e-5)


def test_it_is_accumulated_in_float32_for_bfloat16_weights():
    x, weight, other = problem()
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (weight, other)]
    gram = jnp.asarray(x.T @ x, jnp.float32)
    error = jax.jit(output_error)(*narrow, gram)
    wide = [np.asarray(a, np.float64) for a in narrow]
    assert error.dtype == jnp.float32
    assert float(error) == pytest.approx(np.sum((x @ (wide[0] - wide[1])) ** 2), rel=1e-5)


def test_inputs_that_never_came_excuse_every_change():
    gram = jnp.diag(jnp.array([1.0, 0.0]))
    weight = jnp.array([[3.0], [5.0]])
    assert float(output_error(weight, weight.at[1].set(-9.0), gram, relative=True)) == 0
    assert float(output_error(weight, jnp.zeros((2, 1)), 0 * gram, relative=True)) == 0


def test_the_relative_error_does_not_depend_on_the_number_of_tokens():
    x, weight, other = problem()
    arrays = [jnp.asarray(a, jnp.float32) for a in (weight, other, x.T @ x)]
    once, often = (output_error(*arrays[:2], arrays[2] * n, relative=True) for n in (1, 1024))
    assert float(once) == float(often)


@pytest.mark.parametrize("shape", [(700, 3), (2, 300, 3), (2, 5, 1), (0, 2)])
def test_blocks_of_a_symmetric_gram_matrix_stand_for_two(shape):
    rng = np.random.default_rng(1)
    change = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(*shape[:-2], 9, shape[-2])).astype(np.float32)
    gram = np.swapaxes(x, -1, -2) @ x
    expected = np.square(x.astype(np.float64) @ change).sum(-2)
    np.testing.assert_allclose(jax.jit(output_errors)(change, gram), expected, rtol=1e-4)
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    expected = (np.square(change, dtype=np.float64) * diagonal[..., None]).sum(-2)
    np.testing.assert_allclose(output_errors(change, diagonal), expected, rtol=1e-5)
