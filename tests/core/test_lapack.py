"""Decompositions of stacks: what they give, and that no kernel gets a stack to wait for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import _lapack
from tests.contract._trees import cases, context_of, make_params, run

SQUARE = jax.random.normal(jax.random.key(0), (3, 2, 24, 24))
POSITIVE = SQUARE @ jnp.swapaxes(SQUARE, -1, -2) + jnp.eye(24)
RIGHT = jax.random.normal(jax.random.key(1), (3, 2, 24, 5))
LOWER = jnp.tril(SQUARE, -1) / 24 + jnp.eye(24)
CALLS = {
    "svd": (SQUARE,),
    "singular_values": (SQUARE,),
    "qr": (SQUARE,),
    "eigh": (POSITIVE,),
    "eigenvalues": (POSITIVE,),
    "cholesky": (POSITIVE,),
    "cholesky_of_symmetric": (POSITIVE,),
    "solve": (SQUARE, RIGHT),
    "solve_factored": (jnp.linalg.cholesky(POSITIVE), RIGHT),
    "solve_unit_lower": (LOWER, RIGHT),
}
functions = pytest.mark.parametrize("name", CALLS)


def waited_for(program):
    """LAPACK calls of a lowered program that get stacks too large to be computed in place."""
    found = []
    for name, operands in re.findall(r"@(lapack_\w+)\(.*?: \((tensor<[^)]*)\) ->", program):
        shape = re.match(r"tensor<([\dx]*)x[a-z]", operands)
        *stack, rows, columns = map(int, shape[1].split("x"))
        count = int(np.prod(stack))
        if count > 1 and count * 32 * max(rows, columns) ** 3 > 200_000:
            found.append(f"{name} {shape[1]}")
    return found


def lowered(fn, *args):
    return jax.jit(fn).lower(*args).as_text()


def test_a_kernel_that_gets_a_stack_is_found():
    assert waited_for(lowered(jnp.linalg.svd, SQUARE)) == ["lapack_sgesdd_ffi 3x2x24x24"]
    assert not waited_for(lowered(jnp.linalg.svd, SQUARE[0, 0]))


@functions
def test_stacks_are_handed_over_in_pieces(name):
    fn, operands = getattr(_lapack, name), CALLS[name]
    twice = jax.vmap(jax.vmap(fn))
    for call in (fn, jax.vmap(fn), twice):
        program = lowered(call, *operands)
        assert "lapack" in program
        assert not waited_for(program)


@functions
def test_results_are_those_of_each_matrix(name):
    fn, operands = getattr(_lapack, name), CALLS[name]
    ways = fn(*operands), jax.vmap(jax.vmap(fn))(*operands), jax.vmap(fn, 1, 1)(*operands)
    for i, j in np.ndindex(3, 2):
        one = fn(*(x[i, j] for x in operands))
        for way in ways:
            same = lambda x, y: np.testing.assert_allclose(x[i, j], y, rtol=1e-4, atol=1e-4)  # noqa: B023, E731
            jax.tree.map(same, way, one)


@functions
def test_gradients_are_those_of_each_matrix(name):
    fn, operands = getattr(_lapack, name), CALLS[name]
    leaf_sum = lambda *x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(*x)))  # noqa: E731
    slopes = (
        jax.grad(leaf_sum)(*operands),
        jax.grad(lambda *x: jax.vmap(leaf_sum)(*x).sum())(*operands),
    )
    one = jax.grad(leaf_sum)(*(x[2, 1] for x in operands))
    for slope in slopes:
        np.testing.assert_allclose(slope[2, 1], one, rtol=1e-3, atol=1e-3 * np.abs(one).max())


def test_factors_of_symmetric_matrices_are_read_off_their_lower_triangles():
    found = _lapack.cholesky_of_symmetric(jnp.tril(POSITIVE))
    np.testing.assert_allclose(found, _lapack.cholesky(POSITIVE), atol=1e-5)


def test_equations_are_solved():
    product = lambda a, b: np.einsum("...ij,...jk->...ik", a, b)  # noqa: E731
    for name, matrix in {"solve": SQUARE, "solve_unit_lower": LOWER}.items():
        found = getattr(_lapack, name)(matrix, RIGHT)
        np.testing.assert_allclose(product(matrix, found), RIGHT, atol=1e-3)
    found = _lapack.solve_factored(CALLS["solve_factored"][0], RIGHT)
    np.testing.assert_allclose(product(POSITIVE, found), RIGHT, atol=1e-3)


def test_small_and_empty_stacks_are_taken():
    assert _lapack.svd(jnp.zeros((0, 3, 2)))[1].shape == (0, 2)
    assert _lapack.singular_values(jnp.ones((40, 2, 2))).shape == (40, 2)


@cases(lambda case: case.traceable)
def test_no_transform_hands_a_stack_to_a_kernel(case):
    params, context = make_params(), context_of(case)
    assert not waited_for(lowered(lambda p, c: run(case, p, **c), params, context))
