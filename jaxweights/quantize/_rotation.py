"""Rotations of a named width: orthogonal maps, and how they turn every leaf that carries it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxweights.core._lapack import qr
from jaxweights.core._paths import Flat
from jaxweights.quantize._settings import check_count, is_word
from jaxweights.weights._hadamard import hadamard_transform

if TYPE_CHECKING:
    from jaxweights.align import PermutationSpec

RotationKind = Literal["hadamard", "orthogonal", "centred"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal map of a width: signs and a Hadamard transform, or a dense matrix.

    Args:
      signs: `(n,)`, ones and minus ones, for the transform; else None.
      matrix: `(n, n)`, orthogonal; else None.
    """

    signs: jax.Array | None = None
    matrix: jax.Array | None = None

    @property
    def size(self) -> int:
        """Length of the width."""
        part = self.signs if self.signs is not None else self.matrix
        assert part is not None
        return part.shape[0]

    def __call__(self, rows: jax.Array, *, transposed: bool = False) -> jax.Array:
        """`rows @ Q` for rows `(..., n)`, or `rows @ Q.T`; computed in float32, dtype kept."""
        x = rows.astype(jnp.float32)
        if self.matrix is not None:
            matrix = self.matrix.T if transposed else self.matrix
            x = jnp.matmul(x, matrix, precision="highest")
        elif transposed:
            x = hadamard_transform(x, transposed=True) * self._along(x)
        else:
            x = hadamard_transform(x * self._along(x))
        return x.astype(rows.dtype)

    def dense(self) -> jax.Array:
        """Q, `(n, n)` float32."""
        return self(jnp.eye(self.size))

    def _along(self, x: jax.Array) -> jax.Array:
        assert self.signs is not None
        return self.signs.reshape((1,) * (x.ndim - 1) + (-1,))


def random_rotation(key: jax.Array, size: int, kind: RotationKind = "hadamard") -> Rotation:
    """Draws an orthogonal map.

    Args:
      key: Randomness.
      size: Length of the width.
      kind: "hadamard" is random signs and a Hadamard transform, in blocks of `hadamard_order(size)`
        where that is shorter; "orthogonal" is uniform over all orthogonal matrices; "centred"
        uniform over those that keep the mean, for the residual stream of models with LayerNorm.

    Returns:
      The rotation.

    Example:
      >>> q = random_rotation(jax.random.key(0), 12).dense()
      >>> bool(jnp.allclose(q @ q.T, jnp.eye(12), atol=1e-6))
      True

    Source: Ashkboos et al. 2024, arXiv:2404.00456, section 3 (random signs before the transform).
    """
    check_kind("quantize.random_rotation", kind)
    check_count("quantize.random_rotation", "size", size)
    if kind == "hadamard":
        return Rotation(signs=jax.random.rademacher(key, (size,), jnp.float32))
    if kind == "orthogonal":
        return Rotation(matrix=_uniform(key, size))
    # A reflection that takes the mean's direction to the first axis, a turn of the others, back.
    toward = jnp.full(size, size**-0.5) - jnp.eye(1, size)[0]
    norm = jnp.sum(jnp.square(toward))
    reflect = jnp.eye(size) - jnp.where(norm > 0, 2 / jnp.where(norm > 0, norm, 1), 0) * jnp.outer(
        toward, toward
    )
    turn = jnp.eye(size).at[1:, 1:].set(_uniform(key, size - 1))
    with jax.default_matmul_precision("highest"):
        return Rotation(matrix=reflect @ turn @ reflect)


def check_spec(asker: str, spec: Any) -> None:
    """Refuses what is no `PermutationSpec`.

    Raises:
      TypeError: If it is none.
    """
    from jaxweights.align import PermutationSpec  # which imports this package

    if not isinstance(spec, PermutationSpec):
        raise TypeError(
            f"{asker}: spec={spec!r} must be a PermutationSpec, such as "
            "PermutationSpec.of(params, axes)."
        )


def check_rotations(asker: str, argument: str, rotations: Any) -> dict[str, Rotation]:
    """The rotations as a dict, empty for None.

    Raises:
      TypeError: If it maps no names to rotations.
    """
    given = {} if rotations is None else rotations
    if not isinstance(given, Mapping) or not all(isinstance(r, Rotation) for r in given.values()):
        raise TypeError(
            f"{asker}: {argument}={rotations!r} must map names of widths to `Rotation`s, such as "
            "random_rotation(key, size)."
        )
    return dict(given)


def check_kind(asker: str, kind: Any) -> None:
    """Refuses an unknown kind of rotation."""
    if not is_word(kind, get_args(RotationKind)):
        raise ValueError(
            f"{asker}: kind={kind!r} is unknown. Choose one of {get_args(RotationKind)}."
        )


def _uniform(key: jax.Array, size: int) -> jax.Array:
    q, r = qr(jax.random.normal(key, (size, size)))
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)[None]


def rotate_flat(
    spec: PermutationSpec,
    flat: Flat,
    rotations: Mapping[str, Rotation],
    *,
    transposed: bool = False,
) -> Flat:
    """Turns every axis of a rotated name; writers and readers of a width turn alike."""
    new = dict(flat)
    for path, leaf in flat.items():
        if path in spec.axes:
            factors = [f for axis in spec.factors(path, leaf.shape) for f in axis]
            for axis, factor in enumerate(factors):
                if factor.name is not None and factor.name in rotations:
                    sizes = tuple(f.size for f in factors)
                    new[path] = _rotate_axis(
                        new[path], rotations[factor.name], axis, sizes, transposed
                    )
    return new


def _turn(
    leaf: jax.Array, rotation: Rotation, axis: int, sizes: tuple[int, ...], transposed: bool
) -> Any:
    rows = jnp.moveaxis(leaf.reshape(sizes), axis, -1)
    turned = rotation(rows, transposed=transposed)
    return jnp.moveaxis(turned, -1, axis).reshape(leaf.shape)


_rotate_axis = jax.jit(_turn, static_argnames=("axis", "sizes", "transposed"))
