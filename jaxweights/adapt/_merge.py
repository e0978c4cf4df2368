"""Merging factors into their base, what that loses, and how to go back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core import (
    Flat,
    Params,
    Path,
    Stats,
    Transform,
    apply,
    flatten,
    partition,
    unflatten,
)
from jaxweights.core._paths import fail, nearest
from jaxweights.quantize._add_deltas import MergeLoss as MergeLoss
from jaxweights.quantize._add_deltas import (
    Rounding,
    check_rounding,
    loss_of,
    requantized_sum,
    why_no_gram,
)
from jaxweights.quantize._requantize import why_not_requantizable
from jaxweights.weights import LowRank, Masked, Weight, is_weight, materialize

MaskPolicy = Literal["mask_delta", "densify", "error"]
_POLICIES: tuple[MaskPolicy, ...] = ("mask_delta", "densify", "error")


Report = dict[Path, MergeLoss]


def merge_adapters(
    params: Params,
    *,
    dequantize: DTypeLike | None = None,
    requantize: Rounding | Transform | None = None,
    stats: Stats | None = None,
    masked: MaskPolicy = "mask_delta",
) -> tuple[Params, Report]:
    r"""Adds every adapter's product to its base, in float32, and rounds once.

    The merged weight is :math:`\mathrm{round}(W + s\,A B)` in the base's dtype. A delta that is
    small beside the base is partly rounded away: of one with rms 1e-4 on bfloat16 weights of rms
    0.02 a third is lost, of 1e-5 nine tenths. The report says so for each leaf.

    Args:
      params: Tree with `LowRank` leaves; other leaves pass through.
      dequantize: Dtype of the merged weight where the base is quantized or otherwise packed.
      requantize: How the merged weight is quantized again where the base is: "nearest" or "gptq" on
        the grid that the base has, as `quantize.add_deltas` does it; or a transform, which gets the
        dense sum. Rounding to nearest loses most of an adapter that is small beside a step;
        "gptq" keeps most of what it does to the outputs. Where neither `dequantize` nor
        `requantize` is given, leaves with such a base are refused.
      stats: Statistics of the inputs, for "gptq", or a transform, and for the report.
      masked: What happens to a masked base: `"mask_delta"` keeps the mask, so that entries
        outside it stay zero; `"densify"` drops it; `"error"` refuses.

    Returns:
      The tree without `LowRank` leaves, and for the path of each its `MergeLoss`. Nothing is
      overwritten: the tree that was passed in still is the unmerged one.

    Raises:
      ValueError: If no leaf has factors, or one has a base that is refused; all are named.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.weights import LowRank
      >>> adapted = {"kernel": LowRank.over(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)))}
      >>> merged, report = merge_adapters(adapted)
      >>> merged["kernel"], float(report["kernel"].survived)
      (Array([[2., 1.],
             [1., 2.]], dtype=float32), 1.0)
    """
    if masked not in _POLICIES:
        raise ValueError(
            f"adapt.merge_adapters: masked={masked!r} is unknown. Choose one of "
            f"{', '.join(_POLICIES)}."
        )
    if dequantize is not None and not jnp.issubdtype(dequantize, jnp.floating):
        raise ValueError(
            f"adapt.merge_adapters: dequantize={dequantize} must be a floating dtype, such as "
            "jnp.bfloat16."
        )
    _check_requantize(dequantize, requantize)
    flat, structure = flatten(params)
    found = {path: weight for path, leaf in flat.items() for weight in _adapters(leaf)}
    if not found:
        raise ValueError(
            "adapt.merge_adapters: no leaf has low-rank factors. Add them with adapt.lora, or do "
            "not merge."
        )
    refusals = (
        _refusal(path, weight, dequantize, requantize, stats, masked)
        for path, weight in found.items()
    )
    fail("adapt.merge_adapters", filter(None, refusals))
    merged, report, failures = dict(flat), {}, []
    for path, weight in found.items():
        if requantize is not None and _packed(weight.base):
            new, report[path], problem = _requantize_leaf(path, weight, requantize, stats, masked)
            merged[path] = _replace_adapter(flat[path], new)
            failures.append(problem)
        else:
            merged[path], report[path] = _merge_leaf(flat[path], dequantize, masked)
    fail("adapt.merge_adapters", filter(None, failures))
    return unflatten(structure, merged), report


def unmerge(params: Params, adapted: Params, *, subtract: bool = False) -> Params:
    """Puts adapters that were merged back beside their base.

    Args:
      params: Merged tree.
      adapted: The tree that was merged, with its `LowRank` leaves.
      subtract: False takes the base from `adapted`, bit for bit. True computes it from the merged
        weight by subtracting the product, which keeps what was done to the merged weight
        since, but is lossy: about one float32 value in fourteen comes back changed in its last
        bit, and in bfloat16 what rounding took is not returned.

    Returns:
      `params` with `LowRank` leaves where `adapted` has them; all others are those of `params`.

    Raises:
      ValueError: If `adapted` has no factors, or `params` lacks one of its leaves or has it in
        another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.weights import LowRank
      >>> adapted = {"kernel": LowRank.over(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)))}
      >>> merged, _ = merge_adapters(adapted)
      >>> unmerge(merged, adapted)["kernel"].base
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    flat, structure = flatten(params)
    wanted = {path: leaf for path, leaf in flatten(adapted)[0].items() if _adapters(leaf)}
    fail("adapt.unmerge", _mismatches(flat, wanted))
    restored = dict(flat)
    for path, leaf in wanted.items():
        restored[path] = _subtract(flat[path], leaf) if subtract else leaf
    return unflatten(structure, restored)


def _adapters(leaf: Any) -> list[LowRank]:
    """The low-rank weight of a leaf: the leaf itself or what lies under it."""
    if isinstance(leaf, LowRank):
        return [leaf]
    return _adapters(getattr(leaf, "base", None)) if isinstance(leaf, Weight) else []


def _check_requantize(dequantize: Any, requantize: Any) -> None:
    if requantize is None:
        return
    if dequantize is not None:
        raise ValueError(
            "adapt.merge_adapters: dequantize and requantize contradict each other. Pass one of "
            "them."
        )
    if not isinstance(requantize, Transform):
        if not isinstance(requantize, str):
            raise TypeError(
                f"adapt.merge_adapters: requantize={requantize!r} must be 'nearest', 'gptq' or a "
                "transform, such as quantize.gptq(bits=4, group_size=128)."
            )
        check_rounding("adapt.merge_adapters", requantize, argument="requantize")


def _packed(base: Any) -> bool:
    return is_weight(base.base if isinstance(base, Masked) else base)


def _requantize_leaf(
    path: Path,
    weight: LowRank,
    requantize: Rounding | Transform,
    stats: Stats | None,
    masked: MaskPolicy,
) -> tuple[Any, MergeLoss, str | None]:
    """The quantized sum of a quantized base and its product, the loss, and what went wrong."""
    base, view = weight.base, weight.view
    change = weight.delta.materialize().astype(jnp.float32)
    grid = base
    if isinstance(base, Masked):
        if masked == "mask_delta":
            change = jnp.where(base.mask, change, 0)
        else:
            grid = base.base
    gram = None if stats is None else stats.get(path, "gram")
    if not isinstance(requantize, Transform):
        return requantized_sum(
            path, grid, change, gram, rounding=requantize, before=base, argument="requantize"
        )
    total: Any = _widest(base) + change  # in float32: the transform's rounding is the only one
    pattern = re.escape(path)

    def quantized(total: jax.Array) -> Any:
        leaf: Any = Masked(total, grid.mask) if isinstance(grid, Masked) else total
        tx, layout = partition((pattern, requantize.on(path))), {pattern: view.axes}
        return apply(tx, {path: leaf}, stats=stats, layout=layout)[path]

    new = quantized(total).astype(base.dtype)
    if new is None:  # a representation of one dtype
        new = quantized(total.astype(base.dtype))
    return new, loss_of(base, new, change, gram, view), None


def _refusal(
    path: Path,
    weight: LowRank,
    dequantize: DTypeLike | None,
    requantize: Rounding | Transform | None,
    stats: Stats | None,
    masked: MaskPolicy,
) -> str | None:
    base = weight.base
    if isinstance(base, Masked):
        if masked == "error":
            return (
                f"{path!r}: has a masked base, and the product would fill its zeros. Pass "
                "masked='mask_delta' to keep them zero, or 'densify' to fill them."
            )
        base = base.base
    if not is_weight(base) or dequantize is not None:
        return None
    if requantize is None:
        return (
            f"{path!r}: has a {type(base).__name__} base; rounding the sum to the same grid again "
            "would erase most of the adapter. Pass dequantize=jnp.bfloat16 to merge into a dense "
            "weight, requantize='gptq' with stats to stay on the grid and keep the outputs right, "
            "or keep the factors apart."
        )
    if isinstance(requantize, Transform):
        return None
    if reason := why_not_requantizable(base):
        return f"{path!r}: {reason}"
    if requantize != "gptq":
        return None
    return why_no_gram(path, base, stats, argument="requantize")


def _merge_leaf(
    leaf: Any, dequantize: DTypeLike | None, masked: MaskPolicy
) -> tuple[Any, MergeLoss]:
    if not isinstance(leaf, LowRank):
        base, loss = _merge_leaf(leaf.base, dequantize, masked)
        return dataclasses.replace(leaf, base=base), loss
    mask = leaf.base.mask if isinstance(leaf.base, Masked) and masked == "mask_delta" else None
    dtype = dequantize if _packed(leaf.base) else leaf.dtype
    merged, loss = _merge_arrays(leaf, mask, jnp.dtype(dtype).name)
    return (merged if mask is None else Masked(merged, mask)), loss


@jax.jit(static_argnames=("dtype",))
def _merge_arrays(
    weight: LowRank, mask: jax.Array | None, dtype: str
) -> tuple[jax.Array, MergeLoss]:
    base = _widest(weight.base)
    delta = weight.delta.materialize().astype(base.dtype)
    # A masked base is zero where the delta is taken away, so the sum is, too.
    total = base + (delta if mask is None else jnp.where(mask, delta, 0))
    # Not by casting there and back, which XLA may leave out as excess precision.
    info = jnp.finfo(dtype)
    rounded = lambda x: jax.lax.reduce_precision(x, info.nexp, info.nmant)  # noqa: E731
    lost = (rounded(total) - rounded(base)) - delta
    norm = jnp.sqrt(jnp.sum(jnp.square(delta)))
    survived = 1 - jnp.sqrt(jnp.sum(jnp.square(lost))) / jnp.where(norm > 0, norm, 1)
    rms = norm / max(delta.size, 1) ** 0.5
    loss = MergeLoss(rms.astype(jnp.float32), survived.astype(jnp.float32))
    return total.astype(dtype), loss


def _widest(base: Any) -> jax.Array:
    """The dense base in float32 or wider, unrounded where its representation allows that."""
    wide = np.promote_types(base.dtype, np.float32)
    cast = base.astype(wide)
    return materialize(base).astype(wide) if cast is None else materialize(cast)


def _mismatches(flat: Flat, wanted: Flat) -> list[str]:
    if not wanted:
        return ["no leaf of `adapted` has low-rank factors. Pass the tree that was merged."]
    problems = []
    for path, leaf in wanted.items():
        if path not in flat:
            problems.append(
                f"{path!r}: is not in the merged tree. The nearest paths: {nearest(path, flat)}. "
                "Pass trees of one model."
            )
        elif tuple(flat[path].shape) != tuple(leaf.shape):
            problems.append(
                f"{path!r}: has shape {tuple(flat[path].shape)} in the merged tree but "
                f"{tuple(leaf.shape)} in `adapted`. Pass trees of one model."
            )
    return problems


def _subtract(merged: Any, leaf: Any) -> Any:
    weight = _adapters(leaf)[0]
    dense = materialize(merged)
    wide = np.promote_types(dense.dtype, np.float32)
    base: Any = (dense.astype(wide) - weight.delta.materialize().astype(wide)).astype(dense.dtype)
    if isinstance(weight.base, Masked):
        base = Masked(base, weight.base.mask)
    return _replace_adapter(leaf, dataclasses.replace(weight, base=base))


def _replace_adapter(leaf: Any, weight: LowRank) -> Any:
    if isinstance(leaf, LowRank):
        return weight
    return dataclasses.replace(leaf, base=_replace_adapter(leaf.base, weight))
