"""Decompositions of matrices and stacks of them, which never wait for each other.

jaxlib's LAPACK kernels for CPUs hand the matrices of a stack to the threads that they themselves
run on, and wait. As many of them at once as there are cores, and all wait for ever (seen with
jaxlib 0.10.2: two solvers of triangular systems in independent loops, on two cores). So on CPUs
stacks go to a kernel in pieces that it computes in place; accelerators get them whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Kernels hand work on where they expect more than 200,000 operations; none takes more than this
# times the cube of the larger side.
_WORK_IN_PLACE = 200_000
_MOST_WORK_PER_CUBE = 32


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition of `(*stack, m, n)`, the largest values first."""
    return _in_place(_svd)(matrix)


def singular_values(matrix: jax.Array) -> jax.Array:
    """Singular values of `(*stack, m, n)`, the largest first."""
    return _in_place(_singular_values)(matrix)


def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reduced QR decomposition of `(*stack, m, n)`."""
    return _in_place(_qr)(matrix)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of symmetric `(*stack, n, n)`."""
    return _in_place(_eigh)(matrix)


def eigenvalues(matrix: jax.Array) -> jax.Array:
    """Eigenvalues of symmetric `(*stack, n, n)`, ascending."""
    return _in_place(jnp.linalg.eigvalsh)(matrix)


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower factors of positive definite `(*stack, n, n)`; NaN where there is none."""
    return _in_place(jnp.linalg.cholesky)(matrix)


def cholesky_of_symmetric(matrix: jax.Array) -> jax.Array:
    """As `cholesky`, of which the lower triangles alone are read.

    LAPACK's matrices run along columns: on CPUs nothing is copied where the transpose of an array
    is given, and the transpose of the result taken. The copies that `cholesky` makes, to add a
    matrix and its transpose, take as long as the factorization of a matrix of 1024 rows.
    """
    return _in_place(_cholesky_of_symmetric)(matrix)


def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions X of `matrix @ X = right`, `(*stack, n, n)` and `(*stack, n, k)`."""
    return _in_place(jnp.linalg.solve)(matrix, right)


def solve_factored(factor: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions X of `factor @ factor.T @ X = right` for lower `(*stack, n, n)` factors."""
    return _in_place(_solve_factored)(factor, right)


def solve_unit_lower(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions X of `matrix @ X = right` for lower matrices with ones on the diagonal."""
    return _in_place(_solve_unit_lower)(matrix, right)


def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _singular_values(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.svd(matrix, compute_uv=False)


def _qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(matrix)
    return q, r


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


def _cholesky_of_symmetric(matrix: jax.Array) -> jax.Array:
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


def _solve_factored(factor: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), right)


def _solve_unit_lower(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(
        matrix, right, left_side=True, lower=True, unit_diagonal=True
    )


@functools.cache
def _in_place(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of stacks hand them over in pieces on CPUs, under `vmap` too."""

    @jax.custom_batching.custom_vmap
    def call(*stacks: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *stacks, cpu=functools.partial(_by_pieces, decompose), default=decompose
        )

    @call.def_vmap
    def _(size: int, batched: list[bool], *stacks: jax.Array) -> Any:
        whole = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(stacks, batched, strict=True)
        ]
        results = call(*whole)
        return results, jax.tree.map(lambda _: True, results)

    # What `vmap` is told of a function, reverse differentiation cannot read.
    differentiable = jax.custom_jvp(call)
    differentiable.defjvp(functools.partial(jax.jvp, decompose))
    return differentiable


def _by_pieces(decompose: Callable[..., Any], *stacks: jax.Array) -> Any:
    stack = stacks[0].shape[:-2]
    count, side = math.prod(stack), max(stacks[0].shape[-2:])
    if count <= 1:
        return decompose(*stacks)
    flat = [x.reshape(count, *x.shape[-2:]) for x in stacks]
    each = min(count, max(1, _WORK_IN_PLACE // (_MOST_WORK_PER_CUBE * max(side, 1) ** 3)))
    results = jax.lax.map(lambda one: decompose(*one), flat, batch_size=each)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), results)
