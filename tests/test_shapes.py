"""Shapes that signatures state are true: they are checked while the functions run."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from jaxweights.core import kth_smallest, largest, magnitude_bits, smallest
from jaxweights.quantize import Grid, decode, gptq_matrix, quantize_matrix
from jaxweights.sparsify import n_of_m_mask, wanda_scores

WEIGHT = jax.random.normal(jax.random.key(0), (8, 4))
INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
CODES = quantize_matrix(WEIGHT, Grid(bits=4, group_size=None, kind="affine"))

# A call that fits the signature, and one that does not.
CALLS = {
    gptq_matrix: (
        lambda f: f(WEIGHT, INPUTS.T @ INPUTS, bits=4, mask=WEIGHT > 0),
        lambda f: f(WEIGHT, INPUTS, bits=4),
    ),
    quantize_matrix: (
        lambda f: f(WEIGHT, Grid(bits=4, group_size=4, kind="narrow")),
        lambda f: f(WEIGHT[0], Grid(bits=4, group_size=4, kind="narrow")),
    ),
    decode: (
        lambda f: f(*CODES),
        lambda f: f(CODES.codes, jnp.ones((1, 5)), None),
    ),
    n_of_m_mask: (lambda f: f(WEIGHT, keep=2, of=4), lambda f: f(WEIGHT > 0, keep=2, of=4)),
    wanda_scores: (lambda f: f(WEIGHT, jnp.ones(8)), lambda f: f(WEIGHT, jnp.ones(4))),
    kth_smallest: (lambda f: f(WEIGHT, 3), lambda f: f(WEIGHT > 0, 3)),
    smallest: (lambda f: f(WEIGHT, 3), lambda f: f(WEIGHT > 0, 3)),
    largest: (lambda f: f(WEIGHT, 2, axis=0), lambda f: f(WEIGHT > 0, 2)),
    magnitude_bits: (lambda f: f(WEIGHT), lambda f: f(WEIGHT > 0)),
}
functions = pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)


@functions
def test_a_call_that_fits_the_signature_passes_the_shape_check(function):
    fits, _ = CALLS[function]
    fits(jaxtyped(typechecker=beartype)(inspect.unwrap(function)))


@functions
def test_a_call_that_does_not_fit_is_refused_by_the_shape_check(function):
    _, unfit = CALLS[function]
    with pytest.raises(TypeCheckError, match=function.__name__):
        unfit(jaxtyped(typechecker=beartype)(inspect.unwrap(function)))


@functions
def test_every_array_argument_states_its_shape(function):
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation != "jax.Array"
