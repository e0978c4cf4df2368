"""truncate: each matrix as the product of thin factors that is nearest to it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.adapt._adapters import check_factor_dtype, check_rank
from jaxweights.adapt._factors import balanced
from jaxweights.core import Transform, leafwise
from jaxweights.core._lapack import svd
from jaxweights.weights import Factored, View

Form = Literal["factors", "dense"]
_NAME = "adapt.truncate"


def truncate(
    *,
    rank: int | None = None,
    energy: float | None = None,
    form: Form = "factors",
    dtype: DTypeLike | None = None,
) -> Transform:
    r"""Cuts every matrix after its largest singular values.

    :math:`W \approx U_r \Sigma_r V_r^\top`: no matrix of that rank comes closer, and the error is
    :math:`\sqrt{\sum_{i>r}\sigma_i^2}`. Factors take `rank * (in + out)` numbers in place of
    `in * out`, so that a rank below `in * out / (in + out)` saves memory and work.

    Args:
      rank: Highest rank, cut at what a matrix can have.
      energy: Share of the sum of squared singular values to keep, in (0, 1]: each matrix gets the
        lowest rank that keeps it, but at most `rank`.
      form: `"factors"` gives `Factored` leaves, as wide as the widest matrix of a stack needs
        (under `jit`, as wide as `rank` allows, with zeros); `"dense"` the product.
      dtype: Dtype of the factors; None takes the leaf's. Arithmetic is in float32 or wider.

    Returns:
      The transform.

    Raises:
      ValueError: If a setting is out of range, neither `rank` nor `energy` is given, or a leaf is
        not finite.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> params = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.0]))}
      >>> cut = jw.apply(jw.adapt.truncate(energy=0.6), params)["kernel"]
      >>> cut.rank, float(jnp.abs(cut.materialize() - params["kernel"]).max())
      (1, 3.0)

    Source: Eckart and Young 1936, theorem 1.
    """
    check_rank(_NAME, rank)
    if rank is None and energy is None:
        raise ValueError(
            f"{_NAME}: neither rank nor energy is given. Pass rank=64 for factors of that width, "
            "or energy=0.95 to keep that share of each matrix."
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"{_NAME}: energy={energy} must lie in (0, 1].")
    if form not in get_args(Form):
        raise ValueError(f"{_NAME}: form={form!r} must be 'factors' or 'dense'.")
    if dtype is not None:
        check_factor_dtype(_NAME, dtype)

    def cut(weight: jax.Array) -> Any:
        down, up, kept = _cut(weight, rank, energy)
        if form == "dense":
            return jnp.matmul(down, up, precision="highest").astype(weight.dtype)
        factor = weight.dtype if dtype is None else jnp.dtype(dtype)
        return down.astype(factor), up.astype(factor), kept

    def wrap(leaf: Any, result: Any, view: View) -> Any:
        if form == "dense":
            return _placed(leaf, view.from_matrix(result))
        down, up, kept = result
        if not isinstance(kept, Tracer | jax.ShapeDtypeStruct) and kept.size:
            width = max(int(np.max(kept)), 1)
            down, up = down[..., :width], up[..., :width, :]
        return _placed(leaf, Factored.of(down, up, leaf.dtype, view=view))

    return leafwise(
        cut,
        name=_NAME,
        wrap=wrap,
        mapping="map",  # a decomposition at a time
        refusal="Truncate the dense weight first, and represent what is left.",
    )


def _placed(leaf: Any, new: Any) -> Any:
    """Spreads what was computed over devices as the leaf is; nothing to do under tracing."""
    if isinstance(leaf, Tracer) or not isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return new
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    specs = spec if isinstance(new, jax.Array) else new.partition(spec, mesh)
    if specs is None or isinstance(leaf, jax.ShapeDtypeStruct):
        return new
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    return jax.tree.map(place, new, specs)


def _cut(
    weight: Float[Array, "in out"], rank: int | None, energy: float | None
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"], jax.Array]:
    """Balanced factors in float32 or wider, zero beyond the rank that is kept, and that rank."""
    wide = weight.astype(np.promote_types(weight.dtype, np.float32))
    most = min(weight.shape)
    width = most if rank is None else min(rank, most)
    u, values, vt = svd(wide)
    kept = jnp.int32(width)
    if energy is not None:
        kept = jnp.minimum(width, _rank_of(values, energy, max(weight.shape)))
        values = jnp.where(jnp.arange(most) < kept, values, 0)
    return *balanced(u, values, vt, width), kept


def _rank_of(values: jax.Array, energy: float, longest: int) -> jax.Array:
    """The lowest rank that keeps a share of the squared singular values."""
    largest = jnp.max(values, initial=0)
    unit = values / jnp.where(largest > 0, largest, 1)
    # What the rounding of the decomposition leaves of zeros does not count.
    squares = jnp.where(unit > longest * jnp.finfo(values.dtype).eps, jnp.square(unit), 0)
    lost = jnp.cumsum(squares[::-1])[::-1]  # at rank 0, 1, ...
    return jnp.sum(lost > (1 - energy) * lost[0], dtype=jnp.int32)
