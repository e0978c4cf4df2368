"""Two-way maps between a checkpoint's tensors and a parameter tree with stacked layers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from jaxweights.weights._axes import EMBEDDING, View
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._quantized_product import QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs
from jaxweights.weights._scaled import Scaled
from jaxweights.weights._weight import is_weight

Convention = Literal["huggingface", "gguf"]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one kind of tensor lives in a checkpoint and in the tree, and how they differ.

    Attributes:
      path: Path in the tree; "layers/..." leaves are stacked over layers.
      name: Name in the checkpoint, with "{layer}" where there is one for each layer.
      shape: Shape in the tree, without the layer axis.
      transpose: Whether the checkpoint stores the matrix as (out, in).
      interleaved_heads: Heads whose output features GGUF stores as rotated pairs (0, d/2, 1,
        d/2 + 1, ...); 0 where the order is the tree's.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    interleaved_heads: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has one tensor for each layer."""
        return "{layer}" in self.name

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape

    def from_checkpoint(self, tensor: Any) -> Any:
        """The tree's orientation and order of a checkpoint tensor; a view where possible."""
        if is_weight(tensor):
            return self._from_quantized(tensor)
        if self.interleaved_heads:
            # (out, ...) -> (heads, pairs, 2, ...) -> halves behind each other
            split = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        return tensor.T if self.transpose else tensor

    def to_checkpoint(self, leaf: Any) -> Any:
        """The inverse of `from_checkpoint`, contiguous."""
        if isinstance(leaf, Scaled | QuantizedProduct):
            return self._to_quantized(leaf)
        if isinstance(leaf, RoundedInputs):
            base = self.to_checkpoint(leaf.weight_only())
            if not is_weight(base):
                return leaf
            return leaf.around(base)
        if is_weight(leaf):  # whoever writes it says what it cannot hold
            return leaf
        tensor = leaf.T if self.transpose else leaf
        if self.interleaved_heads:
            split = tensor.reshape(self.interleaved_heads, 2, -1, *tensor.shape[1:])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        return np.ascontiguousarray(tensor)

    def _from_quantized(self, tensor: Any) -> Any:
        if self.interleaved_heads:
            # Output i of the checkpoint belongs at this place of the tree.
            halves = np.arange(tensor.out_dim).reshape(self.interleaved_heads, -1, 2)
            tensor = reorder_outputs(tensor, halves.swapaxes(1, 2).reshape(-1))
        if self.transpose:
            return dataclasses.replace(tensor, view=View.of(self.shape))
        return dataclasses.replace(tensor, view=View.of(self.shape, EMBEDDING))

    def _to_quantized(self, leaf: Any) -> Any:
        kind = leaf.view.axes.kind
        axes = dataclasses.replace(EMBEDDING, kind="linear") if kind == "linear" else EMBEDDING
        tensor = dataclasses.replace(leaf, view=View.of(self.checkpoint_shape, axes))
        if self.interleaved_heads and isinstance(tensor, Quantized):
            pairs = np.arange(tensor.out_dim).reshape(self.interleaved_heads, 2, -1)
            tensor = reorder_outputs(tensor, pairs.swapaxes(1, 2).reshape(-1))
        return tensor


def reorder_outputs(weight: Quantized, order: np.ndarray) -> Quantized:
    """A weight with its outputs in another order: its matrix's columns `order`."""

    def spread(field: Any) -> Any:
        if field is None or field.shape[-1] == 1:
            return field
        return np.repeat(field, weight.out_dim // field.shape[-1], axis=-1)[..., order]

    return dataclasses.replace(
        weight,
        codes=weight.codes[..., order],
        scale=spread(weight.scale),
        zero_point=spread(weight.zero_point),
        offset=spread(weight.offset),
    )


@dataclasses.dataclass(frozen=True)
class NameMap:
    """All rules of one model under one convention of names.

    Attributes:
      rules: One for each leaf of the tree.
      num_layers: Layers in the tree.
      prefix: What some checkpoints put before these names and others leave out.
      writes_prefix: Whether it is written.
      carried: Patterns of tensors that a checkpoint may hold and the model does not use.
      tied_head: Name under which some checkpoints repeat a tied embedding, or None.
      layer_pattern: Pattern whose first group is the layer in a tensor's name.
    """

    rules: tuple[TensorRule, ...]
    num_layers: int
    prefix: str = ""
    writes_prefix: bool = False
    carried: tuple[str, ...] = ()
    tied_head: tuple[str, str] | None = None
    layer_pattern: str = r"layers?\.(\d+)\."

    def expected(self) -> dict[str, tuple[TensorRule, int | None]]:
        """Rule and layer of every tensor that a checkpoint must hold."""
        found: dict[str, tuple[TensorRule, int | None]] = {}
        for rule in self.rules:
            if rule.stacked:
                for layer in range(self.num_layers):
                    found[rule.name.format(layer=layer)] = (rule, layer)
            else:
                found[rule.name] = (rule, None)
        return found

    def canonical(self, name: str) -> str:
        """The name without the prefix that some checkpoints write."""
        return name.removeprefix(self.prefix)

    def is_carried(self, canonical: str) -> bool:
        """Whether the model has no use for this tensor."""
        return any(re.fullmatch(pattern, canonical) for pattern in self.carried)

    def written_name(self, canonical: str) -> str:
        """The name under which a tensor is written."""
        unprefixed = canonical == "lm_head.weight" or not self.writes_prefix
        return canonical if unprefixed else self.prefix + canonical


def tree_shapes(names: NameMap) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by path."""
    return {
        rule.path: ((names.num_layers, *rule.shape) if rule.stacked else rule.shape)
        for rule in names.rules
    }
