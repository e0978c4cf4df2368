"""fuse_norms: the gains of norms, moved into the weights that read them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, unflatten
from jaxweights.core._stats import Stats
from jaxweights.core._transform import Transform, stateless
from jaxweights.quantize._folds import (
    Fold,
    Site,
    check_folds,
    find_sites,
    inner,
    multiply_rows,
    refuse_tied,
    with_inner,
)
from jaxweights.weights._axes import View

if TYPE_CHECKING:
    from jaxweights.models import LlamaConfig

_NAME = "quantize.fuse_norms"


def fuse_norms(folds: Fold | Sequence[Fold]) -> Transform:
    """Multiplies norms' gains into the weights that read them, and sets the gains to one.

    The function stays what it was. Without gains, what a norm writes turns with the residual
    stream, so that the model can be rotated. The bias of a LayerNorm moves into its readers'.

    Args:
      folds: Who writes and who reads, such as `llama_folds(config)`. Folds whose writer is a kernel
        are left alone.

    Returns:
      The transform.

    Raises:
      ValueError: When it sees a tree, if no fold has a norm, leaves are missing or do not fit, or a
        norm has a bias that is not zero and a reader has none to take it.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> params = {"norm": jnp.array([2.0, 3.0]), "kernel": jnp.ones((2, 1))}
      >>> jw.apply(jw.quantize.fuse_norms(jw.quantize.Fold("kernel", "norm")), params)["kernel"]
      Array([[2.],
             [3.]], dtype=float32)

    Source: Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT), section 3.
    """
    folds = check_folds(_NAME, folds)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        refuse_tied(_NAME, folds, context.tied)
        return unflatten(structure, fuse_flat(_NAME, folds, flat, context.layout))

    return stateless(update, name=_NAME, moves_inputs=True)


def norm_sites(
    asker: str, folds: Sequence[Fold], flat: Flat, layout: Layout, stats: Stats | None = None
) -> list[Site]:
    """The sites whose writer is a norm's gain; an error if there is none."""
    found = find_sites(asker, folds, flat, layout, stats)
    sites = [site for site in found if not any(path in layout for path in site.writers)]
    if not sites:
        raise ValueError(
            f"{asker}: none of the folds has a norm's gain as its writer. Name it with "
            "Fold(readers=..., writers='.../norm/scale')."
        )
    return sites


def fuse_flat(asker: str, folds: Sequence[Fold], flat: Flat, layout: Layout) -> Flat:
    """As `fuse_norms`, of a flat tree."""
    sites = norm_sites(asker, folds, flat, layout)
    homes = {site: shift_homes(site) for site in sites}
    fail(asker, [text for site in sites for text in _homeless(site, homes[site], flat)])
    new = dict(flat)
    for site in sites:
        gains = (flat[path].astype(jnp.float32) for path in site.writers)
        gain = functools.reduce(jnp.multiply, ((1 + g if site.fold.one_plus else g) for g in gains))
        new = move_shift(new, site, [flat[path] for path in site.shifts], homes[site], layout)
        for path in site.readers:
            view = View.of(flat[path].shape, layout[path])
            rows = multiply_rows(inner(flat[path]), gain, view=view)
            new[path] = with_inner(flat[path], rows)
        neutral = jnp.zeros_like if site.fold.one_plus else jnp.ones_like
        new |= {path: neutral(flat[path]) for path in site.writers}
        new |= {path: jnp.zeros_like(flat[path]) for path in site.shifts}
    return new


def shift_homes(site: Site) -> dict[Path, Path | None]:
    """The bias of each reader: the one of the same layer; None where it has none."""
    parent = lambda path: path.rpartition("/")[0]  # noqa: E731
    by_parent = {parent(path): path for path in site.biases}
    return {path: by_parent.get(parent(path)) for path in site.readers}


def _homeless(site: Site, homes: Mapping[Path, Path | None], flat: Flat) -> list[str]:
    missing = [path for path, home in homes.items() if home is None]
    return [
        f"{shift!r}: is not zero, and its reader {path!r} has no bias to take it. Give that layer "
        "a bias of zeros, and name it with Fold(biases=...)."
        for shift in site.shifts
        for path in missing
        if isinstance(flat[shift], Tracer) or bool((flat[shift] != 0).any())
    ]


def move_shift(
    flat: Flat,
    site: Site,
    shifts: Sequence[jax.Array],
    homes: Mapping[Path, Path | None],
    layout: Layout,
) -> Flat:
    """Adds to the readers' biases what shifts of their input, `(*stack, in)`, contribute."""
    new = dict(flat)
    for path, home in homes.items():
        if home is not None:
            view = View.of(flat[path].shape, layout[path])
            for shift in shifts:
                new[home] = _add_product(new[home], shift, inner(flat[path]), view=view)
    return new


@functools.partial(jax.jit, static_argnames="view")
def _add_product(bias: jax.Array, shift: jax.Array, leaf: jax.Array, *, view: View) -> jax.Array:
    matrix = view.to_matrix(leaf).astype(jnp.float32)
    shift = shift.astype(jnp.float32).reshape(*matrix.shape[:-1])
    moved = jnp.einsum("...i,...io->...o", shift, matrix, precision="highest")
    return (bias.astype(jnp.float32) + moved.reshape(bias.shape)).astype(bias.dtype)


def untie_head(params: Params, config: LlamaConfig) -> tuple[Params, LlamaConfig]:
    """Gives a head that is tied to the embedding a kernel of its own.

    The function stays what it was, at the price of a second table. The final norm's gain can then
    be moved into the head, which would spoil the embedding while they are one array.

    Args:
      params: Parameters of `Llama(config)`.
      config: Its config, with `tie_embeddings`.

    Returns:
      The parameters with `head/kernel`, and the config of the untied model.

    Raises:
      ValueError: If the head is not tied.

    Example:
      >>> from jaxweights.models import LlamaConfig
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
      ...     tie_embeddings=True,
      ... )
      >>> params, untied = untie_head({"embed": {"embedding": jnp.ones((256, 64))}}, config)
      >>> params["head"]["kernel"].shape, untied.tie_embeddings
      ((64, 256), False)
    """
    if not config.tie_embeddings:
        raise ValueError("quantize.untie_head: config.tie_embeddings is False. Nothing is tied.")
    head = {"kernel": jnp.swapaxes(params["embed"]["embedding"], 0, 1)}
    return {**params, "head": head}, dataclasses.replace(config, tie_embeddings=False)
