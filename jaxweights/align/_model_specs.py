"""Specs of models whose structure is known: the library's own, and plain MLPs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxweights.align._spec import AxisName, PermutationSpec
from jaxweights.core._paths import Params, Path, fail, flatten

if TYPE_CHECKING:
    from jaxweights.models import BertConfig, LlamaConfig

_Axes = dict[Path, tuple[AxisName, ...]]


def llama_permutations(config: LlamaConfig) -> PermutationSpec:
    """The permutations of `models.Llama`.

    `residual`, the features between the layers, is one for the whole model. Every layer has its
    own `mlp` (the features that gate and up share), `kv_heads` (whole heads of keys and values,
    which take their queries along), and for every such head its `queries` and `values` (the
    features of values that the output projection reads). Features of queries and keys stay: the
    rotations tell them apart.

    Args:
      config: The model's sizes.

    Returns:
      The spec of `Llama(config)`'s parameters.

    Example:
      >>> from jaxweights.models import LlamaConfig
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> llama_permutations(config).shape_of("values")
      (2, 4, 16)
    """
    queries = config.num_heads // config.num_kv_heads
    sizes = {
        "residual": config.hidden_size,
        "mlp": config.intermediate_size,
        "kv_heads": config.num_kv_heads,
        "queries": queries,
        "values": config.head_dim,
    }
    over: dict[str, tuple[str, ...]] = {
        "mlp": ("layers",),
        "kv_heads": ("layers",),
        "queries": ("layers", "kv_heads"),
        "values": ("layers", "kv_heads"),
    }
    q, k = ("kv_heads", "queries", config.head_dim), ("kv_heads", config.head_dim)
    v, o = ("kv_heads", "values"), ("kv_heads", "queries", "values")
    axes: _Axes = {"embed/embedding": (None, "residual"), "final_norm/scale": ("residual",)}
    if not config.tie_embeddings:
        axes["head/kernel"] = ("residual", None)
    norms = ("attn_norm", "mlp_norm")
    if config.norm_position == "post":
        norms = ("attn_post_norm", "mlp_post_norm")
    for norm in norms:
        axes[f"layers/{norm}/scale"] = ("layers", "residual")
    if config.qk_norm is not None:
        whole = config.qk_norm == "whole"
        axes["layers/attn/q_norm/scale"] = ("layers", q if whole else None)
        axes["layers/attn/k_norm/scale"] = ("layers", k if whole else None)
    for name, rows, columns, bias in (
        ("attn/q", "residual", q, config.qkv_bias),
        ("attn/k", "residual", k, config.qkv_bias),
        ("attn/v", "residual", v, config.qkv_bias),
        ("attn/o", o, "residual", config.out_bias),
        ("mlp/gate", "residual", "mlp", config.mlp_bias),
        ("mlp/up", "residual", "mlp", config.mlp_bias),
        ("mlp/down", "mlp", "residual", config.mlp_bias),
    ):
        axes[f"layers/{name}/kernel"] = ("layers", rows, columns)
        if bias:
            axes[f"layers/{name}/bias"] = ("layers", columns)
    spec = PermutationSpec(axes, sizes, {"layers": config.num_layers}, over)
    return spec.without(*(name for name, size in sizes.items() if size == 1))


def bert_permutations(config: BertConfig, *, residual: bool = False) -> PermutationSpec:
    """The permutations of `models.Bert`.

    Every layer has its own `mlp` and `heads`, and every head its `queries` (features that queries
    and keys share) and `values` (features that values and the output projection share).

    Args:
      config: The model's sizes.
      residual: Whether the features between the layers, which are also those of the encodings,
        are a permutation too. The encodings are then renumbered, and what reads them must be.

    Returns:
      The spec of `Bert(config)`'s parameters.

    Example:
      >>> from jaxweights.models import BertConfig
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> bert_permutations(config).shape_of("mlp")
      (2, 64)
    """
    sizes = {
        "residual": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_heads,
        "queries": config.head_dim,
        "values": config.head_dim,
    }
    over: dict[str, tuple[str, ...]] = {
        "mlp": ("layers",),
        "heads": ("layers",),
        "queries": ("layers", "heads"),
        "values": ("layers", "heads"),
    }
    axes: _Axes = {f"embed/{x}/embedding": (None, "residual") for x in ("word", "position", "type")}
    axes |= {f"embed/norm/{x}": ("residual",) for x in ("scale", "bias")}
    for norm in ("attn_norm", "mlp_norm"):
        axes |= {f"layers/{norm}/{x}": ("layers", "residual") for x in ("scale", "bias")}
    inner, outer = ("heads", "queries"), ("heads", "values")
    for name, rows, columns in (
        ("attn/q", "residual", inner),
        ("attn/k", "residual", inner),
        ("attn/v", "residual", outer),
        ("attn/o", outer, "residual"),
        ("mlp/up", "residual", "mlp"),
        ("mlp/down", "mlp", "residual"),
    ):
        axes[f"layers/{name}/kernel"] = ("layers", rows, columns)
        axes[f"layers/{name}/bias"] = ("layers", columns)
    spec = PermutationSpec(axes, sizes, {"layers": config.num_layers}, over)
    fixed = [name for name, size in sizes.items() if size == 1]
    return spec.without(*fixed, *(() if residual else ("residual",)))


def mlp_permutations(params: Params, layers: Sequence[str] | None = None) -> PermutationSpec:
    """The permutations of dense layers that feed one another.

    Every layer is a subtree with a `kernel` `(in, out)` and vectors of its output (`bias`,
    `scale`, running means), of a norm too if its statistics are those of single features or of all
    of them. The hidden features behind a layer are called after it.

    Args:
      params: Parameters.
      layers: Paths of the layers in order; None takes all subtrees with a kernel, numbers in
        their paths counted as numbers (`Dense_2` before `Dense_10`).

    Returns:
      The spec.

    Raises:
      ValueError: If the layers do not chain, or other leaves are there.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {
      ...     "Dense_0": {"kernel": jnp.ones((3, 8)), "bias": jnp.ones(8)},
      ...     "Dense_1": {"kernel": jnp.ones((8, 2))},
      ... }
      >>> mlp_permutations(params).sizes
      {'Dense_0': 8}
    """
    name = "align.mlp_permutations"
    flat = flatten(params)[0]
    kernels = {p.rpartition("/")[0]: leaf for p, leaf in flat.items() if _last(p) == "kernel"}
    order = sorted(kernels, key=_natural) if layers is None else list(layers)
    problems = [f"{layer!r}: has no kernel." for layer in order if layer not in kernels]
    problems += [
        f"{layer!r}: its kernel has shape {kernels[layer].shape}. Write the spec of other layers "
        "than (in, out) by hand, or use infer_permutations."
        for layer in order
        if layer in kernels and len(kernels[layer].shape) != 2
    ]
    fail(name, problems)
    problems = [
        f"{here!r}: gives {kernels[here].shape[1]} features, but {there!r} takes "
        f"{kernels[there].shape[0]}. State the layers in order, or use infer_permutations."
        for here, there in itertools.pairwise(order)
        if kernels[here].shape[1] != kernels[there].shape[0]
    ]
    axes: _Axes = {}
    for i, layer in enumerate(order):
        before, after = (order[i - 1] if i else None), (layer if i < len(order) - 1 else None)
        axes[f"{layer}/kernel" if layer else "kernel"] = (before, after)
        for path, leaf in flat.items():
            if path.rpartition("/")[0] == layer and leaf.shape == kernels[layer].shape[1:]:
                axes[path] = (after,)
    problems += [
        f"{path!r}: is in none of the layers. Write the spec by hand, or use infer_permutations."
        for path in flat
        if path not in axes
    ]
    fail(name, problems)
    return PermutationSpec.of(params, axes)


def _last(path: Path) -> str:
    return path.rpartition("/")[2]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts numbers as numbers."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", path)]
