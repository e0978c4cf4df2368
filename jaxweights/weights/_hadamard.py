"""Hadamard matrices, and products with them in n log n steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.weights._matrix_weight import wide_dtype

_RADIX = 16  # passes multiply by matrices of this order: few passes, and no work worth a name
_LARGEST_CORE = 256  # a core is multiplied by as a dense matrix


def hadamard_matrix(order: int) -> np.ndarray:
    r"""A matrix of ones and minus ones whose rows are orthogonal, :math:`H H^\top = n I`.

    Args:
      order: Number of rows, 1, 2 or a multiple of 4.

    Returns:
      `(order, order)` float32: Sylvester's matrix where the order is a power of two, else the
      Kronecker product of the smallest one that Paley's constructions give and a power of two.

    Raises:
      ValueError: If neither construction gives this order, such as 92, 116, 156 or 172.

    Example:
      >>> h = hadamard_matrix(12)
      >>> bool((h @ h.T == 12 * np.eye(12)).all())
      True

    Source: Sylvester 1867; Paley 1933, constructions I and II, for prime q and squares of primes.
    """
    if hadamard_order(order) != order:
        raise ValueError(
            f"hadamard_matrix: order={order} is neither a power of two nor a power of two times "
            f"an order q + 1 or 2 (q + 1) of Paley's. Use blocks of order {hadamard_order(order)}."
        )
    factors = _factors(order)
    return functools.reduce(np.kron, factors, np.ones((1, 1), np.float32))


def hadamard_order(length: int) -> int:
    """The largest order of `hadamard_transform`'s blocks for an axis of some length.

    Args:
      length: At least 1.

    Returns:
      `length` where there is a construction of that order, else the largest power of two that
      divides it: the transform then mixes only within blocks of it.

    Example:
      >>> hadamard_order(4096), hadamard_order(11008), hadamard_order(14336), hadamard_order(6)
      (4096, 256, 14336, 2)
    """
    if length < 1:
        raise ValueError(f"hadamard_order: length={length} must be at least 1.")
    power = length & -length
    return length if _core_order(length) is not None else power


def hadamard_transform(
    x: jax.Array, *, order: int | None = None, transposed: bool = False
) -> jax.Array:
    r"""Multiplies the last axis by an orthogonal matrix, :math:`x H^\top / \sqrt{n}`.

    Runs in n log n: `H`, that of `hadamard_matrix`, is a Kronecker product of small ones.

    Args:
      x: `(..., n)`, floating.
      order: Length of the blocks that are mixed; None gives `hadamard_order(n)`.
      transposed: Whether to multiply by `H` instead, which undoes the transform.

    Returns:
      An array like `x`, computed in float32 or wider.

    Example:
      >>> x = jnp.arange(12.0)
      >>> y = hadamard_transform(x)
      >>> bool(jnp.allclose(hadamard_transform(y, transposed=True), x, atol=1e-5))
      True

    Source: the fast transform of Ashkboos et al. 2024, arXiv:2404.00456, section 3.
    Differs: orders without a power-of-two factor come from Paley's constructions, not from a table.
    """
    length = x.shape[-1]
    order = hadamard_order(length) if order is None else order
    if order < 1 or length % order or hadamard_order(order) != order:
        raise ValueError(
            f"hadamard_transform: order={order} for an axis of length {length}. It must divide the "
            f"length and have a construction; {hadamard_order(length)} does."
        )
    return kronecker_transform(x, [f.T if transposed else f for f in _factors(order)])


def kronecker_transform(x: jax.Array, factors: list[np.ndarray]) -> jax.Array:
    """`x @ kron(*factors).T / sqrt(n)` along the last axis, in blocks of the factors' product."""
    wide = wide_dtype(x.dtype)
    sizes = [len(f) for f in factors]
    order = int(np.prod(sizes, dtype=np.int64))
    y = x.astype(wide).reshape(-1, *sizes)
    for axis, factor in enumerate(factors, start=1):
        matrix = jnp.asarray(factor, wide)
        y = jnp.moveaxis(
            jnp.tensordot(y, matrix, axes=((axis,), (1,)), precision="highest"), -1, axis
        )
    return (y * jnp.asarray(order**-0.5, wide)).reshape(x.shape).astype(x.dtype)


def _core_order(order: int) -> int | None:
    """The order of the smallest factor that is not Sylvester's, or 1; None if none is known."""
    core = order // (order & -order)
    if core == 1:
        return 1
    while core <= min(order, _LARGEST_CORE):
        if core % 4 == 0 and _paley_parameter(core) is not None:
            return core
        core *= 2
    return None


@functools.cache
def _factors(order: int) -> list[np.ndarray]:
    """Small Hadamard matrices whose Kronecker product has the given order."""
    core = _core_order(order)
    assert core is not None
    factors = [_paley(core)] if core > 1 else []
    rest = order // core
    while rest > 1:
        size = min(rest, _RADIX)
        two = np.array([[1, 1], [1, -1]], np.float32)
        factors.append(functools.reduce(np.kron, [two] * (size.bit_length() - 1)))
        rest //= size
    return factors


def _paley_parameter(order: int) -> tuple[int, bool] | None:
    """The field size q of Paley's construction and whether it is the second one."""
    if _root_of_field(order - 1) and (order - 1) % 4 == 3:
        return order - 1, False
    half = order // 2 - 1
    if _root_of_field(half) and half % 4 == 1:
        return half, True
    return None


def _root_of_field(q: int) -> int | None:
    """The prime p with q = p or q = p², or None."""
    is_prime = lambda n: n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))  # noqa: E731
    root = round(max(q, 0) ** 0.5)
    if is_prime(q):
        return q
    return root if root * root == q and is_prime(root) else None


def _paley(order: int) -> np.ndarray:
    parameter = _paley_parameter(order)
    assert parameter is not None
    q, second = parameter
    jacobsthal = _jacobsthal(q)
    border = np.zeros((q + 1, q + 1), np.float32)
    border[0, 1:], border[1:, 0] = 1, (1 if second else -1)
    border[1:, 1:] = jacobsthal
    identity = np.eye(q + 1, dtype=np.float32)
    if not second:
        return border + identity
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(border, plus) + np.kron(identity, minus)).astype(np.float32)


def _jacobsthal(q: int) -> np.ndarray:
    """Entry (a, b) is 1 where a - b is a nonzero square of the field of q elements, -1 where not.

    Elements of a field of p² are a + b t with t² a number that is no square modulo p.
    """
    p = _root_of_field(q)
    assert p is not None
    a, b = np.divmod(np.arange(q), p) if q != p else (np.zeros(q, int), np.arange(q))
    squares = {x * x % p for x in range(p)}
    unit = next((x for x in range(p) if x not in squares), 0)
    # (a t + b)² = 2ab t + (unit a² + b²)
    square = (2 * a * b % p) * p + (unit * a * a + b * b) % p
    sign = np.full(q, -1.0, np.float32)
    sign[square] = 1
    sign[0] = 0
    difference = ((a[:, None] - a) % p) * p + (b[:, None] - b) % p
    return sign[difference]
