"""Several adapters of one base, read leaf by leaf after all that does not fit was refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.adapt._lora import _placed_like_base
from jaxweights.adapt._merge import _adapters, _replace_adapter
from jaxweights.core import Flat, Params, Path, flatten
from jaxweights.core._paths import fail
from jaxweights.merge._same import same
from jaxweights.weights import LowRank

Others = Literal["require_equal", "first"]
_OTHERS: tuple[Others, ...] = ("require_equal", "first")
_LISTED = 5  # missing or extra paths that one error shows


class RankLoss(NamedTuple):
    """What one leaf's delta lost when it became a product of thin factors."""

    rank: int
    """Width of the factors; 0 for a leaf that got none because nothing changes it."""
    error: jax.Array
    """‖product - delta‖ / ‖delta‖ in the Frobenius norm, float32; 0 for a delta of zeros."""


RankReport = dict[Path, RankLoss]


@dataclasses.dataclass(frozen=True)
class AdapterLeaf:
    """What the adapters do to one leaf.

    Args:
      path: Path of the leaf.
      leaf: The leaf of the first adapter that changes it.
      weights: The low-rank weights of those that change it.
      owners: Their places among the adapters.
    """

    path: Path
    leaf: Any
    weights: tuple[LowRank, ...]
    owners: tuple[int, ...]

    @property
    def rank_sum(self) -> int:
        """Rank that the sum of all deltas fits into."""
        return sum(weight.rank for weight in self.weights)

    def rank_for(self, rank: int | None, *, dense: bool = False) -> int:
        """Rank of the combined delta; `dense` deltas may have a higher one than their sum."""
        wanted = max(weight.rank for weight in self.weights) if rank is None else rank
        view = self.weights[0].view
        most = min(view.in_dim, view.out_dim)
        return min(wanted, most if dense else min(most, self.rank_sum))

    def with_factors(self, down: jax.Array, up: jax.Array) -> Any:
        """The leaf with other factors, spread like its base, whose scaling is 1."""
        scaling = jnp.ones(down.shape[:-2], jnp.float32)
        weight = dataclasses.replace(self.weights[0], down=down, up=up, scaling=scaling)
        return _replace_adapter(self.leaf, _placed_like_base(weight))


@dataclasses.dataclass(frozen=True)
class AdapterTrees:
    """Adapters that belong together.

    Args:
      name: What errors call the function.
      flat: Leaves of the first tree.
      structure: Its structure.
      leaves: What the adapters change, by path.
      labels: What errors call the adapters.
    """

    name: str
    flat: Flat
    structure: Any
    leaves: dict[Path, AdapterLeaf]
    labels: tuple[str, ...]

    def refuse_nonfinite(self, finite: Mapping[Path, jax.Array]) -> None:
        """Raises one error for all leaves whose result is not finite; nothing under tracing."""
        if any(isinstance(x, Tracer) for x in finite.values()):
            return
        fail(self.name, [self._nonfinite(path) for path, good in finite.items() if not good])

    def _nonfinite(self, path: Path) -> str:
        leaf = self.leaves[path]
        bad = [
            f"{field} of {self.labels[i]}"
            for weight, i in zip(leaf.weights, leaf.owners, strict=True)
            for field in ("down", "up", "scaling")
            if not bool(jnp.all(jnp.isfinite(getattr(weight, field))))
        ]
        cause = f"{', '.join(bad)} is not finite" if bad else "the combined factors overflow"
        return f"{path!r}: {cause}. Repair the adapter, or leave it out."


def read_adapters(
    name: str, adapters: Sequence[Params], *, others: Others, names: Sequence[str] | None
) -> AdapterTrees:
    """Checks that adapters belong together.

    Args:
      name: What errors call the function.
      adapters: Trees with `LowRank` leaves.
      others: As in `combine_adapters`.
      names: What errors call the adapters.

    Returns:
      Them, leaf by leaf.

    Raises:
      ValueError: If they do not; every misfit is listed.
    """
    if others not in _OTHERS:
        raise ValueError(f"{name}: others={others!r} is not one of 'require_equal', 'first'.")
    if not isinstance(adapters, list | tuple):
        raise TypeError(
            f"{name}: adapters is a {type(adapters).__name__}. Pass a list of trees, one each."
        )
    if not adapters:
        raise ValueError(f"{name}: adapters is empty. Pass at least one tree with LowRank leaves.")
    if names is not None and len(names) != len(adapters):
        raise ValueError(
            f"{name}: names has {len(names)} entries for {len(adapters)} adapters. Pass one each."
        )
    labels = tuple(
        f"adapters[{i}]" + (f" ({names[i]!r})" if names is not None else "")
        for i in range(len(adapters))
    )
    flats = [flatten(tree)[0] for tree in adapters]
    fail(name, _other_paths(flats, labels))
    leaves: dict[Path, AdapterLeaf] = {}
    problems: list[str] = []
    for path, first in flats[0].items():
        column = [flat[path] for flat in flats]
        found = [(i, weight) for i, leaf in enumerate(column) for weight in _adapters(leaf)]
        problem = _unlike(path, column, [i for i, _ in found], labels, others)
        if problem:
            problems.append(problem)
        elif found:
            owners = tuple(i for i, _ in found)
            weights = tuple(weight for _, weight in found)
            leaf = first if owners[0] == 0 else column[owners[0]]
            leaves[path] = AdapterLeaf(path, leaf, weights, owners)
    fail(name, problems)
    used = {i for leaf in leaves.values() for i in leaf.owners}
    fail(
        name,
        [
            f"{labels[i]} has no leaf with low-rank factors. Pass the adapted tree, before its "
            "factors were merged."
            for i in range(len(adapters))
            if i not in used
        ],
    )
    return AdapterTrees(name, flats[0], flatten(adapters[0])[1], leaves, labels)


def check_rank(name: str, rank: Any) -> None:
    """Refuses what is no rank; None is one."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"{name}: rank={rank!r} must be an integer.")
    if rank < 1:
        raise ValueError(f"{name}: rank={rank} must be at least 1.")


def check_factor_dtype(name: str, dtype: DTypeLike) -> None:
    """Refuses a dtype that cannot hold factors."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: dtype={dtype} cannot hold factors. Choose a floating dtype, such as "
            "jnp.float32."
        )


def _other_paths(flats: list[Flat], labels: tuple[str, ...]) -> list[str]:
    problems = []
    for flat, label in zip(flats[1:], labels[1:], strict=True):
        lacking = [path for path in flats[0] if path not in flat]
        extra = [path for path in flat if path not in flats[0]]
        for verb, paths in (("lacks", lacking), ("has", extra)):
            if paths:
                whose = f", which {labels[0]} {'has' if verb == 'lacks' else 'lacks'}"
                more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
                problems.append(
                    f"{label} {verb} {paths[:_LISTED]}{more}{whose}. Pass adapters of one model."
                )
    return problems


def _unlike(
    path: Path, column: list[Any], owners: list[int], labels: tuple[str, ...], others: Others
) -> str | None:
    """Why the leaves at one path do not belong together."""
    shapes = [tuple(np.shape(leaf)) for leaf in column]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            return (
                f"{path!r}: is {shape} in {labels[i]} but {shapes[0]} in {labels[0]}. Pass "
                "adapters of one model."
            )
    views = [_adapters(column[i])[0].view.axes for i in owners]
    for i, view in zip(owners, views, strict=True):
        if view != views[0]:
            return (
                f"{path!r}: has factors for {view} in {labels[i]} but for {views[0]} in "
                f"{labels[owners[0]]}. Adapt all of them with one layout."
            )
    bases = [_without_factors(leaf) for leaf in column]
    for i, base in enumerate(bases):
        if same(base, bases[0]):
            continue
        if owners:
            return (
                f"{path!r}: has another base in {labels[i]} than in {labels[0]}. Factors belong to "
                "the base that they were trained on; pass adapters of one base."
            )
        if others == "require_equal":
            return (
                f"{path!r}: has no factors and differs in {labels[i]} from {labels[0]}: it was "
                "trained beside the factors. Merge such leaves first, for example with merge.mean, "
                "or pass others='first' to keep those of the first adapter."
            )
    return None


def _without_factors(leaf: Any) -> Any:
    if not _adapters(leaf):
        return leaf
    if isinstance(leaf, LowRank):
        return leaf.base
    return dataclasses.replace(leaf, base=_without_factors(leaf.base))
