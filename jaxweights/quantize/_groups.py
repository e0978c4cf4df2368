"""Groups of weights that share a scale: the readers of a fold, or of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._layout import is_float, is_vector
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, Params, Path, flatten
from jaxweights.core._stats import Needs, Statistic
from jaxweights.core._targets import may_be_target, targets_of
from jaxweights.core._transform import Transform, stateless
from jaxweights.quantize._folds import Fold, Site, find_sites, inner, refuse_tied
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._weight import is_weight


class Group(NamedTuple):
    """Weights that share a scale.

    Attributes:
      site: Where the scale is folded into; None where it stays with the weights.
      quantized: Weights that the scale is chosen for.
      views: Their views.
    """

    site: Site | None
    quantized: tuple[Path, ...]
    views: dict[Path, View]

    @property
    def fold(self) -> Fold | None:
        """How the readers repeat what is written."""
        return None if self.site is None else self.site.fold


def group_targets(
    flat: Flat,
    context: Context,
    name: str,
    wanted: frozenset[Statistic],
    refusal: str = "Smooth the dense weight, before it is represented.",
) -> dict[Path, View]:
    """The matrices that a scale is chosen for; vectors that a rule names too are no targets."""
    layout = context.layout
    unclear = dict(layout.unclear)
    matrices = {
        path: leaf
        for path, leaf in flat.items()
        if path in layout
        or path in unclear
        or not (layout.traced or is_vector(path, leaf) or not is_float(leaf))
    }

    def check(path: Path, leaf: Any, view: View) -> str | None:
        del view
        if is_weight(dense := inner(leaf)):
            return f"{path!r}: is already a Masked {type(dense).__name__}. {refusal}"
        return None

    return targets_of(matrices, context, name, (Masked,), refusal, check, wanted)


def find_groups(
    name: str,
    folds: Sequence[Fold],
    flat: Flat,
    context: Context,
    targets: dict[Path, View],
    *,
    shared: bool,
) -> list[Group]:
    """Sorts the targets into groups.

    Args:
      name: What errors call the caller.
      folds: Descriptions; their readers are the first groups. A fold none of whose readers is a
        target, such as that of a head, gives no group.
      flat: The tree.
      context: Its layout and statistics.
      targets: Views of the matrices that a scale is chosen for.
      shared: Whether targets in no fold share one where they read the same input.

    Returns:
      The groups, which hold every target once.
    """
    refuse_tied(name, folds, context.tied)
    groups = []
    left = dict(targets)
    for site in find_sites(name, folds, flat, context.layout, context.stats):
        mine = tuple(path for path in site.readers if path in targets)
        if mine:
            groups.append(Group(site, mine, {path: left.pop(path) for path in mine}))
    owners = dict(context.stats.owners) if shared and context.stats is not None else {}
    rest: dict[Path, list[Path]] = {}
    for path in left:
        rest.setdefault(owners.get(path, path), []).append(path)
    return groups + [
        Group(None, tuple(paths), {path: left[path] for path in paths}) for paths in rest.values()
    ]


def scales_groups(
    update: Callable[[Params, Context], Params], name: str, wanted: frozenset[Statistic]
) -> Transform:
    """A transform that moves scales between weights and those that write their inputs.

    Args:
      update: What it does.
      name: What errors call it.
      wanted: Statistics of its targets; of other matrices it needs a count, which tells who reads
        what.
    """
    count: frozenset[Statistic] = frozenset({"count"})

    def needs(params: Params, *, named: bool = False) -> Needs:
        return {
            path: wanted if may_be_target(path, leaf, named) else count
            for path, leaf in flatten(params)[0].items()
            if may_be_target(path, leaf, True)
        }

    return stateless(
        update,
        name=name,
        needs=needs,
        reads_statistics=True,
        moves_inputs=True,
        scope="block",
    )


def nonfinite_leaves(flat: Flat, finite: dict[Path, jax.Array]) -> list[str]:
    """Complaints about leaves that hold NaN or infinity; none while tracing."""
    if any(isinstance(ok, Tracer) for ok in finite.values()):
        return []
    return [describe_nonfinite(path, flat[path]) for path, ok in finite.items() if not ok]
