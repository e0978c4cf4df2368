"""pad_hidden: hidden features of zeros, so that groups and devices divide a width."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._paths import Params, Path, fail, flatten, nearest, unflatten
from jaxweights.quantize._rotation import check_spec
from jaxweights.quantize._settings import check_count, check_flags
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.align import PermutationSpec

_NAME = "quantize.pad_hidden"


def pad_hidden(
    params: Params,
    spec: PermutationSpec,
    *,
    width: str = "mlp",
    multiple: int = 1024,
    interleave: bool = True,
) -> Params:
    """Widens a width of a model by zeros, which leaves its function as it is.

    29,568 features are 231 groups of 128, which 2, 4 or 8 devices cannot share; padded to 29,696
    they are 232. Everything that writes a padded feature writes zero, and everything that reads
    it multiplies by zero, so the function is the same whatever the activation makes of a zero.

    Args:
      params: Parameters, dense.
      spec: Names the axes: `align.llama_permutations(config)`, or your own.
      width: The name of the width.
      multiple: What the new length is a multiple of; the least such is taken.
      interleave: Whether zeros are spread among the first features, so that no group of rows holds
        nothing else, instead of standing at the end.

    Returns:
      The tree, in which the width is longer; the config's size (`intermediate_size`) has to follow.

    Raises:
      ValueError: If the spec does not describe the tree, or has no such width.

    Example:
      >>> from jaxweights.align import PermutationSpec
      >>> params = {"up": jnp.ones((3, 6)), "down": jnp.ones((6, 2))}
      >>> axes = {"up": (None, "mlp"), "down": ("mlp", None)}
      >>> padded = pad_hidden(params, PermutationSpec.of(params, axes), multiple=4)
      >>> padded["up"].shape, padded["up"][0].tolist()
      ((3, 8), [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])

    Source: the documentation of Qwen2.5 (arXiv:2412.15115) on quantizing its 72B model.
    """
    check_spec(_NAME, spec)
    if width not in spec.sizes:
        raise ValueError(
            f"{_NAME}: {width!r} is no width of the spec. Its widths are "
            f"{nearest(width, spec.sizes)}."
        )
    check_count(_NAME, "multiple", multiple)
    check_flags(_NAME, interleave=interleave)
    flat, structure = flatten(params)
    fail(
        _NAME,
        [
            f"{path!r}: is a {type(flat[path]).__name__}. Pad before you quantize."
            for path in spec.leaves_of(width)
            if is_weight(flat.get(path))
        ],
    )
    spec.check(params, _NAME)
    size = spec.sizes[width]
    index = padded_index(size, -(-size // multiple) * multiple, interleave=interleave)
    if len(index) == size:
        return params
    new = dict(flat)
    for path in spec.leaves_of(width):
        new[path] = _pad_leaf(spec, path, flat[path], width, index)
    return unflatten(structure, new)


def padded_index(size: int, length: int, *, interleave: bool) -> np.ndarray:
    """For every feature of the longer width the old one that it is, or -1 for a zero."""
    zeros = length - size
    index = np.full(length, -1, np.int32)
    if not interleave:
        index[:size] = np.arange(size)
        return index
    # One feature, one zero (or more where there are more zeros than features), then the others.
    runs = np.full(size, 1)
    runs[: min(size, zeros)] += zeros // size if zeros > size else 1
    if zeros > size:
        runs[: zeros % size] += 1
    index[np.cumsum(runs) - runs] = np.arange(size)
    return index


def _pad_leaf(
    spec: PermutationSpec, path: Path, leaf: jax.Array, width: str, index: np.ndarray
) -> jax.Array:
    axes = spec.factors(path, leaf.shape)
    factors = [factor for axis in axes for factor in axis]
    place = next(i for i, factor in enumerate(factors) if factor.name == width)
    lengths = [len(index) if i == place else f.size for i, f in enumerate(factors)]
    counts = [len(axis) for axis in axes]
    ends = np.cumsum(counts)
    shape = tuple(int(np.prod(lengths[e - n : e])) for n, e in zip(counts, ends, strict=True))
    return _gather(
        leaf, jnp.asarray(index), axis=place, sizes=tuple(f.size for f in factors), shape=shape
    )


@functools.partial(jax.jit, static_argnames=("axis", "sizes", "shape"))
def _gather(
    leaf: jax.Array,
    index: jax.Array,
    *,
    axis: int,
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    parts = jnp.take(leaf.reshape(sizes), index, axis=axis, mode="clip")
    filled = index.reshape([-1 if i == axis else 1 for i in range(len(sizes))]) >= 0
    return jnp.where(filled, parts, jnp.zeros((), leaf.dtype)).reshape(shape)
