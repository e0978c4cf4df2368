"""stochastic_rounding: up or down at random, right on average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._grid import (
    Codes,
    GridKind,
    GroupSize,
    Pad,
    find_scale,
    join_groups,
    make_grid,
    split_groups,
)
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    finite_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.weights._axes import View
from jaxweights.weights._divide import divide
from jaxweights.weights._masked import Masked

_NAME = "quantize.stochastic_rounding"


def stochastic_rounding(
    *,
    bits: int,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind = "narrow",
    scale_dtype: DTypeLike = jnp.float32,
) -> Transform:
    r"""Rounds every entry to one of its two neighbouring levels, so that the mean is the entry.

    :math:`q = \lfloor w/s + u \rfloor` with :math:`u` uniform in [0, 1): up with a probability of
    how far the entry lies above the level below it, in steps. Errors of many steps then cancel,
    where rounding to the nearest would lose every update smaller than half a step. Needs a key; the
    draws of a leaf depend on its path, not on what else is in the tree.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output channel, "tensor" one per
        matrix.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        refuses such a matrix.
      grid: As in `Grid`. "narrow" and "full" clip nothing; the ends of the other grids do, and the
        mean is off there.
      scale_dtype: Dtype that scales are stored in.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `round_to_nearest`, and
        without a key.

    Example:
      >>> params = {"kernel": jnp.full((1000, 1), 0.3).at[0].set(1.0)}
      >>> tx = jw.quantize.stochastic_rounding(bits=2)
      >>> rounded = jw.materialize(jw.apply(tx, params, key=jax.random.key(0)))["kernel"]
      >>> sorted(set(rounded.ravel().tolist())), bool(abs(rounded.mean() - 0.3) < 0.05)
      ([0.0, 1.0], True)

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
    """
    settings = make_grid(
        _NAME, bits=bits, group_size=group_size, pad=pad, grid=grid, scale_dtype=scale_dtype
    )

    def quantize(weight: jax.Array, key: jax.Array) -> Codes:
        groups = split_groups(weight.astype(jnp.float32), settings)  # (rows, group, out)
        scale, zero = find_scale(groups, settings)
        # Draws lie in [0, 1), so that an entry on a level stays there.
        draws = jax.random.uniform(key, groups.shape, jnp.float32)
        steps = jnp.floor(divide(groups, scale) + draws)
        if zero is not None:
            steps = steps + zero.astype(jnp.float32)
        codes = jnp.clip(steps, *settings.code_range).astype(jnp.int32)
        codes = join_groups(codes, weight.shape)
        found = Codes(codes, scale[:, 0], None if zero is None else zero[:, 0])
        return pack(found, settings)

    def wrap(leaf: Any, codes: Codes, view: View) -> Any:
        return replace_leaf(leaf, codes, view, settings)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_leaf(leaf, view, settings)
        return problem and f"{path!r}: {problem}"

    return leafwise(
        quantize,
        name=_NAME,
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        randomized=True,
        check=check,
        verify=describe_bad_scales,
        sound=finite_scales,
    )
