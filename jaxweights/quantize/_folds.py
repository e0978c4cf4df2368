"""Fold: who writes and who reads one activation, so that a scale can move between them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core._layout import Layout, is_float
from jaxweights.core._paths import Flat, Path, check_pattern, fail, matching, nearest
from jaxweights.core._stats import Stats
from jaxweights.weights._axes import View
from jaxweights.weights._input_changes import InputChange, Rescaled
from jaxweights.weights._masked import Masked
from jaxweights.weights._weight import is_weight

_PATTERNS = ("readers", "writers", "shifts", "biases")
_REMEDY = "or leave this fold out: the scale then stays with the weight, as `Rescaled`"


@dataclasses.dataclass(frozen=True)
class Fold:
    r"""Names the leaves that write one activation and those that read it.

    A network computes the same function after the readers' input rows are multiplied by a vector
    and what the writers write is divided by it. That holds where every writer's outputs are factors
    of the activation, entry by entry: a norm's gain, or a linear layer's columns with nothing or a
    product behind them (`up` of a gated MLP, values of attention), but no GELU; and where nobody
    else reads the activation.

    Patterns are regular expressions that match whole paths. Where they have groups, leaves with the
    same text in the groups belong together: `(layer_\\d+)/mlp/(?:gate|up)/kernel` is read with
    `(layer_\\d+)/norm/scale`, layer by layer. Stacked layers need no groups.

    Args:
      readers: Kernels that read the activation.
      writers: Vectors or kernels whose entries, or output columns, are divided.
      shifts: Vectors that are added behind the writers: a norm's bias, the bias of a kernel.
      biases: Vectors that are added to the readers' products, where a shift may move to.
      one_plus: Whether a writer is a norm's gain stored less one, as Gemma has it.
      repeat: (times, run): readers see every run of `run` entries `times` times in a row, as the
        query heads that share a head of values do.

    Example:
      >>> Fold("layers/mlp/(?:gate|up)/kernel", "layers/mlp_norm/scale").one_plus
      False
    """

    readers: str
    writers: str
    shifts: str | None = None
    biases: str | None = None
    one_plus: bool = False
    repeat: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuses patterns that are none."""
        for name in _PATTERNS:
            if (pattern := getattr(self, name)) is not None:
                check_pattern(f"quantize.Fold: {name}", pattern)
        if self.repeat is not None and (len(self.repeat) != 2 or min(self.repeat) < 1):
            raise ValueError(
                f"quantize.Fold: repeat={self.repeat} must be (times, run), both at least 1."
            )

    def spread(self, vector: jax.Array) -> jax.Array:
        """A vector `(*stack, written)` as the readers see it, `(*stack, in)`."""
        if self.repeat is None:
            return vector
        times, run = self.repeat
        parts = vector.reshape(*vector.shape[:-1], -1, 1, run)
        parts = jnp.broadcast_to(parts, (*parts.shape[:-2], times, run))
        return parts.reshape(*vector.shape[:-1], -1)

    def gather(self, vector: jax.Array, combine: Callable[..., jax.Array]) -> jax.Array:
        """What readers know of each entry, `(*stack, in)`, combined for what is written."""
        if self.repeat is None:
            return vector
        times, run = self.repeat
        return combine(vector.reshape(*vector.shape[:-1], -1, times, run), axis=-2).reshape(
            *vector.shape[:-1], -1
        )


class Site(NamedTuple):
    """The leaves of one place of a `Fold`."""

    fold: Fold
    readers: tuple[Path, ...]
    writers: tuple[Path, ...]
    shifts: tuple[Path, ...]
    biases: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the scale of {' and '.join(map(repr, self.readers))}"


def check_folds(asker: str, folds: Any) -> tuple[Fold, ...]:
    """The folds as a tuple, refused where they are none."""
    if not isinstance(folds, Fold | Sequence):
        raise TypeError(
            f"{asker}: folds={folds!r} must be a `Fold` or a sequence of them, such as "
            "llama_folds(config)."
        )
    folds = (folds,) if isinstance(folds, Fold) else tuple(folds)
    fail(
        asker,
        [
            f"folds[{i}] is a {type(fold).__name__}. Pass `Fold`s, such as llama_folds(config)."
            for i, fold in enumerate(folds)
            if not isinstance(fold, Fold)
        ],
        TypeError,
    )
    return folds


def refuse_tied(asker: str, folds: Sequence[Fold], tied: Iterable[tuple[Path, Path]]) -> None:
    """Refuses folds into an array that the model uses elsewhere, too: it would change there.

    Args:
      asker: What errors call the caller.
      folds: The descriptions.
      tied: As in `Context`.
    """
    patterns = [p for fold in folds for name in _PATTERNS if (p := getattr(fold, name)) is not None]
    fail(
        asker,
        [
            f"cannot fold: {first!r} is one array with {other!r}, which would change as well. Give "
            f"the tree a copy of its own at one path, such as jnp.copy(leaf), {_REMEDY}."
            for first, other in tied
            if any(matching(pattern, (first, other)) for pattern in patterns)
        ],
    )


def find_sites(
    asker: str, folds: Sequence[Fold], flat: Flat, layout: Layout, stats: Stats | None = None
) -> list[Site]:
    """The places that the folds name in a tree, after everything wrong with them was reported.

    Args:
      asker: What errors call the caller.
      folds: The descriptions.
      flat: The tree.
      layout: Axes of its matrices.
      stats: Statistics, which tell who else reads an input.

    Returns:
      One site for every set of leaves that belong together.

    Raises:
      ValueError: If a pattern takes no leaf, a writer is missing, has another length, is no dense
        array or belongs to two folds, or somebody else reads the activation too.
    """
    sites: list[Site] = []
    problems: list[str] = []
    for fold in folds:
        found = {name: _by_groups(getattr(fold, name), flat) for name in _PATTERNS}
        problems += [
            f"pattern {getattr(fold, name)!r} of a fold's {name} matches no leaf. The nearest "
            f"paths: {nearest(getattr(fold, name), flat)}."
            for name in _PATTERNS
            if getattr(fold, name) is not None and not found[name]
        ]
        for key, readers in found["readers"].items():
            pick = lambda name: tuple(found[name].get(key, ()))  # noqa: B023, E731
            sites.append(
                Site(fold, tuple(readers), pick("writers"), pick("shifts"), pick("biases"))
            )
    fail(asker, problems)
    for site in sites:
        problems += _misfits(site, flat, layout)
        problems += _other_readers(site, stats)
    for kind in ("readers", "writers"):
        problems += _named_twice(sites, kind)
    fail(asker, problems)
    return sites


def _by_groups(pattern: str | None, flat: Flat) -> dict[tuple[str, ...], list[Path]]:
    found: dict[tuple[str, ...], list[Path]] = {}
    if pattern is not None:
        for path in flat:
            if match := re.fullmatch(pattern, path):
                found.setdefault(match.groups(), []).append(path)
    return found


def _misfits(site: Site, flat: Flat, layout: Layout) -> list[str]:
    if not site.writers:
        return [
            f"cannot fold {site.name}: no leaf {site.fold.writers!r} goes with it. Name its "
            f"writer, {_REMEDY}."
        ]
    problems = []
    for path in (*site.readers, *site.writers, *site.shifts, *site.biases):
        leaf = flat[path]
        dense = inner(leaf) if path in site.readers else leaf
        if path in site.readers and _is_mixed(leaf):
            problems.append(
                f"cannot fold {site.name}: {path!r} is {type(leaf).__name__}, which mixes its "
                f"inputs. Fold before you rotate, {_REMEDY}."
            )
        if is_weight(dense) or not is_float(leaf):
            kind = type(dense).__name__ if is_weight(dense) else getattr(leaf, "dtype", type(leaf))
            problems.append(
                f"cannot fold {site.name}: {path!r} is {kind}, no dense floating array. Fold "
                f"before you quantize, {_REMEDY}."
            )
    unclear = [path for path in site.readers if path not in layout]
    problems += [
        f"cannot fold {site.name}: the layout does not say which axes of {path!r} are its inputs. "
        "Pass layout=infer_layout(fn, params, *inputs)."
        for path in unclear
    ]
    if problems:
        return problems
    wanted = {_scale_shape(site, flat[path], layout[path]) for path in site.readers}
    for path in (*site.writers, *site.shifts):
        shape = _written_shape(flat[path], layout, path)
        sizes = {shape} if path in layout else {_unstacked(shape, want) for want in wanted}
        if sizes != wanted:
            problems.append(
                f"cannot fold {site.name} into {path!r}: it writes {shape}, but they read "
                f"{sorted(wanted)[0]} (layers, features). State how readers repeat features with "
                f"Fold(repeat=(times, run)), {_REMEDY}."
            )
    return problems


def _scale_shape(site: Site, leaf: Any, axes: Any) -> tuple[int, ...]:
    view = View.of(leaf.shape, axes)
    stack = tuple(leaf.shape[a] for a in view.stack_axes(len(leaf.shape)))
    times = 1 if site.fold.repeat is None else site.fold.repeat[0]
    whole = view.in_dim % (times * (site.fold.repeat or (1, 1))[1]) == 0
    return (*stack, view.in_dim // times if whole else -1)


def _written_shape(leaf: Any, layout: Layout, path: Path) -> tuple[int, ...]:
    if path not in layout:
        return tuple(leaf.shape)
    view = View.of(leaf.shape, layout[path])
    return (*(leaf.shape[a] for a in view.stack_axes(len(leaf.shape))), view.out_dim)


def _unstacked(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The wanted shape where a vector `(*stack, *features)` has its entries, else its own."""
    stack = wanted[:-1]
    features = 1
    for length in shape[len(stack) :]:
        features *= length
    return (*shape[: len(stack)], features)


def _other_readers(site: Site, stats: Stats | None) -> list[str]:
    if stats is None:
        return []
    owners = dict(stats.owners)
    mine = {owners.get(path, path) for path in site.readers}
    others = [p for p in stats.paths if owners.get(p, p) in mine and p not in site.readers]
    return [
        f"cannot fold {site.name} into {site.writers[0]!r}: also read by {other!r}. Add it to the "
        f"fold's readers, {_REMEDY}."
        for other in others
    ]


def _named_twice(sites: Iterable[Site], kind: str) -> list[str]:
    seen: dict[Path, Site] = {}
    problems = []
    for site in sites:
        for path in getattr(site, kind):
            if path in seen:
                problems.append(
                    f"{path!r}: is among the {kind} of two folds, for {seen[path].name} and "
                    f"{site.name}. Name all readers of an activation in one fold."
                )
            seen[path] = site
    return problems


def _is_mixed(leaf: Any) -> bool:
    """Whether the inputs of a leaf are changed by more than a vector."""
    while isinstance(leaf, Rescaled | Masked):
        leaf = leaf.base
    return isinstance(leaf, InputChange)


def inner(leaf: Any) -> Any:
    """The dense array of a leaf whose inputs are changed, or that is masked."""
    while isinstance(leaf, InputChange | Masked):
        leaf = leaf.base
    return leaf


def with_inner(leaf: Any, array: jax.Array) -> Any:
    """The leaf with another dense array in it."""
    if not isinstance(leaf, InputChange | Masked):
        return array
    return dataclasses.replace(leaf, base=with_inner(leaf.base, array))  # type: ignore[type-var]


Change = Callable[[jax.Array], jax.Array]  # of a dense leaf; keeps shape and dtype


def fold_scale(
    flat: Flat,
    site: Site,
    scale: jax.Array,
    layout: Layout,
    later: Mapping[Path, list[Change]] | None = None,
) -> Flat:
    """Multiplies the readers' rows and divides what the writers write.

    Args:
      flat: The tree.
      site: Its place.
      scale: `(*stack, written)`, positive, float32.
      layout: Axes of the matrices.
      later: Leaves that stay as they are, with the changes that the caller is to make; those of
        this fold are appended. So several folds round a leaf once, and none is copied before.

    Returns:
      The tree with the site's leaves replaced; dtypes stay, each value is rounded once.
    """
    new, later = dict(flat), {} if later is None else later

    def change(path: Path, function: Change) -> None:
        if path in later:
            later[path].append(function)
        else:
            new[path] = with_inner(new[path], function(inner(new[path])))

    for path in site.readers:
        view = View.of(flat[path].shape, layout[path])
        rows = site.fold.spread(scale)
        change(path, functools.partial(multiply_rows, scale=rows, view=view))
    for path in site.writers:
        view = View.of(flat[path].shape, layout[path]) if path in layout else None
        one_plus = site.fold.one_plus
        change(path, functools.partial(_divide, scale=scale, view=view, one_plus=one_plus))
    for path in site.shifts:
        new[path] = _divide(new[path], scale, view=None, one_plus=False)
    return new


def keep_scale(leaf: Any, scale: jax.Array, view: View, later: list[Change] | None = None) -> Any:
    """Multiplies the rows of a leaf and its inputs by the inverse, which stays before it.

    Where there is a list of changes to make later, that of the rows is appended to it instead.
    """
    if isinstance(leaf, Rescaled):
        base = _with_rows(leaf.base, scale, view, later)
        return dataclasses.replace(leaf, base=base, scale=leaf.scale / scale[..., None])
    if isinstance(leaf, InputChange):
        base = keep_scale(leaf.base, scale, view, later)
        return dataclasses.replace(leaf, base=base)  # type: ignore[type-var]
    return Rescaled(_with_rows(leaf, scale, view, later), (1 / scale)[..., None], view)


def _with_rows(leaf: Any, scale: jax.Array, view: View, later: list[Change] | None) -> Any:
    change = functools.partial(multiply_rows, scale=scale, view=view)
    if later is None:
        return with_inner(leaf, change(inner(leaf)))
    later.append(change)
    return leaf


@functools.partial(jax.jit, static_argnames="view")
def multiply_rows(leaf: jax.Array, scale: jax.Array, *, view: View) -> jax.Array:
    """Input rows of a dense leaf times a vector `(*stack, in)`."""
    matrix = view.to_matrix(leaf).astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return view.from_matrix(matrix).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnames=("view", "one_plus"))
def _divide(leaf: jax.Array, scale: jax.Array, *, view: View | None, one_plus: bool) -> jax.Array:
    """Output columns of a matrix, or entries of a vector, divided by `(*stack, written)`."""
    if view is not None:
        matrix = view.to_matrix(leaf).astype(jnp.float32) / scale[..., None, :]
        return view.from_matrix(matrix).astype(leaf.dtype)
    wide, scale = leaf.astype(jnp.float32), scale.reshape(leaf.shape)
    return ((1 + wide) / scale - 1 if one_plus else wide / scale).astype(leaf.dtype)
