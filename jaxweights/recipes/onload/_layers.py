"""A checkpoint whose layers are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.checkpoint import open_checkpoint
from jaxweights.checkpoint.exchange._module import LazyWeight, without_mask
from jaxweights.core import Path as LeafPath
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import fail
from jaxweights.models._arrange import nest, stored_names
from jaxweights.models._convert import name_map, tell_convention
from jaxweights.models._lazy import carried_names, lazy_tensors
from jaxweights.models._load import Pretrained, read_config, tokenizer_path_of
from jaxweights.models._names import Convention
from jaxweights.models._registry import build
from jaxweights.weights._weight import materialize


class Layers:
    """A model of a checkpoint of tensors, of which none is held.

    Args:
      asker: Start of the error messages.
      path: A checkpoint under the names of Hugging Face or GGUF.
      dequantize: Whether quantized weights are read as the dense ones that they stand for.

    Attributes:
      pretrained: The model, with abstract arrays as parameters.
      shapes: Abstract leaves, by path.

    Raises:
      ValueError: If the checkpoint is of another kind, or does not fit its config.
    """

    def __init__(self, asker: str, path: Path, *, dequantize: bool | None = None):
        """Reads headers."""
        self._asker = asker
        source = open_checkpoint(path)
        if not source.is_torch:
            raise ValueError(
                f"{asker}: '{path}' holds a tree of parameters, whose layers lie stacked in its "
                "files. Write it tensor by tensor first: jaxweights convert --to safetensors."
            )
        if source.quantization and not dequantize:
            raise ValueError(
                f"{asker}: '{path}' is quantized already. Start from the model that it was made "
                "of, or have it read as the dense weights that it stands for: dequantize."
            )
        config = read_config(source)
        self.carried = () if source.format == "gguf" else carried_names(source, config)
        self._tensors = lazy_tensors(source, config, convention="huggingface", represented=False)
        names = name_map(config, "huggingface")
        self._places = {
            (rule.path, layer): (names.written_name(name), rule)
            for name, (rule, layer) in names.expected().items()
        }
        self.count = names.num_layers
        self.stacked = frozenset(rule.path for rule in names.rules if rule.stacked)
        self.shapes = _abstract(asker, source, config)
        params: Any = nest(self.shapes)
        self.pretrained = Pretrained(
            build(config), params, config, tokenizer_path_of(source), source, {}
        )

    def read(self, path: LeafPath, layer: int | None = None) -> jax.Array:
        """A leaf, or one layer of a stacked one.

        Raises:
          ValueError: If values of it are not finite.
        """
        name, rule = self._places[path, layer]
        array = jnp.array(rule.from_checkpoint(self._tensors[name].read()))
        if jnp.issubdtype(array.dtype, jnp.floating) and not jnp.isfinite(array).all():
            where = path if layer is None else f"{path} of layer {layer}"
            fail(self._asker, [describe_nonfinite(where, array)])
        return array

    def block(self, paths: Iterable[LeafPath], layer: int) -> dict[LeafPath, jax.Array]:
        """Leaves of one layer, without the layers' axis."""
        return {path: self.read(path, layer) for path in paths}

    def block_shapes(self, paths: Iterable[LeafPath]) -> dict[LeafPath, Any]:
        """Abstract leaves of one layer."""
        return {
            path: jax.ShapeDtypeStruct(self.shapes[path].shape[1:], self.shapes[path].dtype)
            for path in paths
        }

    def tensors(
        self,
        convention: Convention,
        changed: Mapping[tuple[LeafPath, int], Callable[[], Any]],
        *,
        dense: bool,
    ) -> dict[str, LazyWeight]:
        """All tensors under the names of a format, made when they are looked at.

        Args:
          convention: Whose names and orientations they get.
          changed: How leaves of layers that are not those of the checkpoint are made.
          dense: Whether represented weights become the arrays that they stand for.

        Returns:
          The tensors, in the order in which they are written.
        """
        source, config = self.pretrained.source, self.pretrained.config
        tensors: dict[str, LazyWeight] = lazy_tensors(
            source, config, convention=convention, represented=False
        )
        names = name_map(config, convention)
        for name, (rule, layer) in names.expected().items():
            make = None if layer is None else changed.get((rule.path, layer))
            if make is not None:
                tensors[names.written_name(name)] = LazyWeight(
                    lambda make=make, rule=rule: rule.to_checkpoint(
                        (_dense if dense else _unmasked)(make())
                    )
                )
        return tensors


def _abstract(asker: str, source: Any, config: Any) -> dict[LeafPath, Any]:
    """Shapes and dtypes of the leaves; every one of a stack's layers has the same."""
    names = name_map(config, tell_convention(source.names))
    left = set(carried_names(source, config))
    stored = stored_names((n for n in source.names if n not in left), names, asker)
    dtypes: dict[LeafPath, set[np.dtype]] = {}
    for name, (rule, _) in names.expected().items():
        dtypes.setdefault(rule.path, set()).add(source.dtype(stored[name]))
    fail(
        asker,
        [
            f"{path!r}: its layers are {sorted(map(str, found))}. Cast them to one dtype: "
            "jaxweights convert --to safetensors --dtype."
            for path, found in dtypes.items()
            if len(found) > 1
        ],
    )
    return {
        rule.path: jax.ShapeDtypeStruct(
            (names.num_layers, *rule.shape) if rule.stacked else rule.shape,
            next(iter(dtypes[rule.path])),
        )
        for rule in name_map(config, "huggingface").rules
    }


def _unmasked(leaf: Any) -> Any:
    return jax.tree.map(np.asarray, without_mask(leaf))


def _dense(leaf: Any) -> Any:
    return np.asarray(materialize(leaf))
