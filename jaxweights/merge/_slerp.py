"""SLERP: the arc between two models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._paths import Path, fail
from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    check_choice,
)
from jaxweights.merge._sphere import Measuring, Vectors, arcs, slerp_factors
from jaxweights.merge._spherical import SphereMerge, spherical

Antipodal = Literal["error", "lerp"]
Norm = Literal["blend", "interpolate"]

# Where mergekit takes two tensors for parallel.
_MERGEKIT_COSINE = 0.9995


def slerp(
    *,
    t: float | jax.Array = 0.5,
    norm: Norm = "blend",
    antipodal: Antipodal | None = None,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Interpolates between the tree and one model along the arc between them.

    The tree that is transformed is the point t = 0, the one model given to `apply` the point t = 1.
    With the angle :math:`\Omega` between a leaf's two vectors, every leaf becomes

    .. math:: \frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b

    Each layer and expert of a stacked leaf has an angle of its own. Fine-tunes of one base are so
    nearly parallel that the result is their linear interpolation to about one part in ten thousand;
    where that is not wanted, interpolate their deltas: `nuslerp(deltas=True)`.

    Args:
      t: Place on the arc, in [0, 1]; may be traced.
      norm: `"blend"` applies the two factors to the vectors as they are; `"interpolate"` to their
        directions, and gives the result the norm :math:`(1-t)\|a\| + t\|b\|`.
      antipodal: What happens to vectors that point in opposite directions, between which there is
        no single arc: an `"error"`, or linear interpolation (`"lerp"`; always so under `jit`, where
        values cannot be looked at). None takes that of `compat`.
      compat: `"paper"`, or `"mergekit"`, which interpolates linearly where |cos Ω| > 0.9995.
      names: What errors call the model.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`; the base is the tree.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is out of range, the number of models is not one, or vectors are
        antipodal.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> first, second = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> merged = jw.apply(jw.merge.slerp(t=0.5), first, models=[second])
      >>> [round(x, 3) for x in merged["w"].tolist()]
      [0.707, 0.707]

    Source: Shoemake 1985, Animating rotation with quaternion curves; for language models Lu, Luu
    and Buehler 2024, arXiv:2409.03444.
    Differs: (1) angles are exact near 0, so that nothing falls back to linear interpolation there.
    (2) Antipodal vectors are an error.
    """
    name = "merge.slerp"
    check_unit_interval(name, "t", t)
    check_choice(name, "norm", norm, ("blend", "interpolate"))
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    check_choice(name, "antipodal", antipodal, (None, "error", "lerp"))
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    strict = (antipodal or ("error" if compat == "paper" else "lerp")) == "error"

    def factors(vectors: Vectors) -> Measuring[tuple[jax.Array, jax.Array]]:
        found = yield from arcs(vectors)
        return slerp_factors(
            found,
            t,
            interpolate_norm=norm == "interpolate",
            lerp_cosine=_MERGEKIT_COSINE if compat == "mergekit" else None,
        )

    merge = SphereMerge(
        name,
        factors,
        output,
        tree_is_model=True,
        most=1,
        remedy="The tree is t = 0 and the model t = 1; `karcher` merges more than two.",
        report=functools.partial(refuse_antipodal, name) if strict else None,
    )
    return spherical(merge, names=names)


def check_unit_interval(name: str, argument: str, value: Any) -> None:
    """Refuses numbers outside of [0, 1]; traced ones are taken as they come."""
    if not isinstance(value, Tracer) and not (np.ndim(value) == 0 and 0 <= value <= 1):
        raise ValueError(f"{name}: {argument}={value} must be one number in [0, 1].")


def refuse_antipodal(name: str, paths: list[Path]) -> None:
    """One error for all leaves between whose vectors there is no single arc."""
    fail(
        name,
        [
            f"{path!r}: the two vectors point in opposite directions, so that no single arc joins "
            "them. Pass antipodal='lerp' to interpolate linearly there, or give this weight to "
            "`mean` ('linear' in a configuration)."
            for path in paths
        ],
    )
