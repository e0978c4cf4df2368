"""Layout: which axes of each leaf are stacked, contracted and produced."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxweights.core._paths import Params, Path, flatten
from jaxweights.weights._axes import CONV_HWIO, CONV_OIHW, EMBEDDING, OUTPUTS_FIRST, Axes

# Segments of a path that say a leaf is no matrix to transform unless a rule names it. A block that
# is called after what it holds (`multi_head_attention`, `PreNormBlock_0`) is no head and no norm: a
# norm holds its leaf itself, and has no `kernel`.
_NOT_A_TARGET = re.compile(
    r"(?:^|.*[/_.])(?:"
    r"(?:\w*_)?embed(?:ding|dings|der)?(?:_\w+)?|wte|wpe|lm_head|(?<!multi_)head(?!_att)|router|gate_logits"
    r")(?:[/_.].*|$)"
    r"|(?:.*[/.])?(?:\w*norm\w*|ln_\w+)(?:[/.](?!(?:kernel|w)(?:/value)?$)[^/.]+)?(?:/value)?",
    re.IGNORECASE,
)
_VECTOR_NAMES = re.compile(
    r"(?:.*/)?(?:bias|scale|beta|gamma|\w*norm\w*)(?:/value)?", re.IGNORECASE
)
_EMBEDDING_NAMES = re.compile(
    r"(?:.*/)?(?:embedding|embeddings|wte|wpe)(?:/value)?"
    r"|(?:.*[/_.])?(?:embed(?:ding)?s?(?:_\w+)?|\w+_embeddings?|wte|wpe)[/.]weight",
    re.IGNORECASE,
)
# Torch and Equinox call a matrix `weight` and put its outputs first; Flax says `kernel`.
_OUTPUTS_FIRST_NAMES = re.compile(r"(?:.*[/.])?weight(?:/value)?")


@dataclasses.dataclass(frozen=True)
class Layout(Mapping[Path, Axes]):
    """Axes of the leaves that are matrices; vectors and scalars have no entry.

    A frozen, hashable mapping, so that it can be static under `jit`.

    Args:
      entries: Pairs of path and axes.
      traced: Whether it was read off a model's trace, so that a leaf without an entry is known
        not to be a matrix of the model.
      unclear: Pairs of path and reason for matrices whose axes the trace leaves open.
      seen: Every leaf of the traced model, matrix or not; empty where nobody says.

    Example:
      >>> Layout.of({"attn/q/kernel": Axes(inputs=(-3,), outputs=(-2, -1))})["attn/q/kernel"].inputs
      (-3,)
    """

    entries: tuple[tuple[Path, Axes], ...] = ()
    traced: bool = False
    unclear: tuple[tuple[Path, str], ...] = ()
    seen: tuple[Path, ...] = ()

    @classmethod
    def of(cls, axes: Mapping[Path, Axes], *, traced: bool = False) -> Layout:
        """Builds a layout from a mapping."""
        return cls(tuple(axes.items()), traced)

    def __getitem__(self, path: Path) -> Axes:
        """Axes of a leaf."""
        return self._index[path]

    def __iter__(self) -> Iterator[Path]:
        """Paths, in tree order."""
        return iter(self._index)

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self.entries)

    def with_stated(self, stated: Mapping[Path, Axes]) -> Layout:
        """The layout in which stated axes win."""
        unclear = tuple(item for item in self.unclear if item[0] not in stated)
        entries = tuple((dict(self) | dict(stated)).items())
        return Layout(entries, self.traced, unclear, self.seen)

    def __str__(self) -> str:
        """A line per matrix."""
        found = "traced" if self.traced else "conventional or stated"
        lines = [
            f"{path}  inputs={axes.inputs} outputs={axes.outputs}"
            + (f" {axes.kind}" if axes.kind != "linear" else "")
            for path, axes in self.entries
        ]
        lines += [f"{path}  unclear: {reason}" for path, reason in self.unclear]
        return "\n".join([f"Layout of {len(self)} matrices, {found}", *lines])

    @property
    def _index(self) -> dict[Path, Axes]:
        cached = self.__dict__.get("_cached_index")
        if cached is None:
            cached = dict(self.entries)
            object.__setattr__(self, "_cached_index", cached)
        return cached


def conventional_layout(params: Params) -> Layout:
    """Reads the layout off names and ranks, where there is no model to trace.

    Float leaves of rank 2 are `(in, out)`, tables named like an embedding are `(vocab, dim)`,
    kernels of rank 4 under a path with `conv` are HWIO. Leaves called `weight`, as torch and
    Equinox have them, are `(out, in)`, and OIHW under a path with `conv`. A leaf of rank 3 or more
    that is none of these gets no entry: it is ambiguous, and a transform that wants it says so.

    Args:
      params: Tree of arrays, abstract arrays or represented weights.

    Returns:
      The layout.

    Example:
      >>> layout = conventional_layout({"kernel": jnp.ones((4, 3)), "weight": jnp.ones((3, 4))})
      >>> layout["kernel"].inputs, layout["weight"].inputs
      ((-2,), (-1,))
    """
    axes: dict[Path, Axes] = {}
    for path, leaf in flatten(params)[0].items():
        if not is_float(leaf) or is_vector(path, leaf):
            continue
        outputs_first = _OUTPUTS_FIRST_NAMES.fullmatch(path) is not None
        if _EMBEDDING_NAMES.fullmatch(path) and len(leaf.shape) == 2:
            axes[path] = EMBEDDING
        elif len(leaf.shape) == 2:
            axes[path] = OUTPUTS_FIRST if outputs_first else Axes()
        elif len(leaf.shape) == 4 and "conv" in path.lower():
            axes[path] = CONV_OIHW if outputs_first else CONV_HWIO
    return Layout.of(axes)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a real floating array or stands for one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_vector(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a bias or a norm, stacked or not."""
    return len(leaf.shape) < 2 or bool(_VECTOR_NAMES.fullmatch(path))


def is_default_target(path: Path) -> bool:
    """Whether methods touch a matrix that no rule names: not embeddings, heads, routers, norms."""
    return not _NOT_A_TARGET.fullmatch(path)
