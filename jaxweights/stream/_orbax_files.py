"""An Orbax checkpoint that a stream fills, and `load_tree` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._checkpoint import Checkpoint
from jaxweights.checkpoint._manifest import Parts, array_node, with_leaves
from jaxweights.checkpoint._raw_arrays import make_raw_arrays, raw_arrays
from jaxweights.checkpoint._saved_tree import ARRAYS, CONFIG, OWN_FILES, write_manifest
from jaxweights.checkpoint._write_safetensors import TensorPlan
from jaxweights.stream._destination import Place

# JAX holds them only with jax_enable_x64, so that they are loaded as NumPy arrays.
_HOST_DTYPES = ("int64", "uint64", "float64", "complex128")


class OrbaxFiles:
    """Uncompressed arrays in chunks, and the manifest of the tree that they are leaves of.

    Args:
      plans: The tensors.
      source: A checkpoint whose tree the result has, with dense leaves, if it has these tensors
        and a tree; otherwise the tree is a dict of the tensors by their names.
    """

    def __init__(self, plans: Sequence[TensorPlan], source: Checkpoint | None):
        """Finds each tensor's place in the tree."""
        self._plans = list(plans)
        names = [plan.name for plan in plans]
        leaves = dict(source.leaves) if source is not None else {}
        same = set(names) == set(leaves)
        self._leaves: dict[str, Parts] = leaves if same else {name: (name,) for name in names}
        self._tree: Any = source.tree if source is not None and same else None
        self.nbytes = sum(plan.nbytes for plan in plans)
        self.names = (ARRAYS,)

    def make(self, folder: Path, *, anew: bool) -> Mapping[str, Place]:
        """Makes the arrays, filled with zeros."""
        wanted = {self._leaves[plan.name]: (plan.shape, plan.dtype) for plan in self._plans}
        arrays = raw_arrays(folder / ARRAYS, wanted)
        if anew:
            make_raw_arrays(folder / ARRAYS, arrays)
        empty = Place(0, lambda _: (folder, 0, 0))
        places = {parts: Place(array.nbytes, array.locate) for parts, array in arrays.items()}
        return {plan.name: places.get(self._leaves[plan.name], empty) for plan in self._plans}

    def finish(self, folder: Path, checksums: Mapping[str, str]) -> None:
        """Writes the manifest."""
        leaves = {
            self._leaves[plan.name]: array_node(
                plan.shape,
                np.dtype(plan.dtype),
                host=plan.dtype.name in _HOST_DTYPES,
                checksum=checksums[plan.name],
            )
            for plan in self._plans
        }
        node = self._tree or {"kind": "dict", "items": [[parts[0], None] for parts in leaves]}
        write_manifest(folder, with_leaves(node, leaves))


def refuse_taken(function: str, files: Mapping[str, Any]) -> None:
    """Refuses files that would stand where the checkpoint's own do."""
    taken = [name for name in files if name.split("/")[0] in OWN_FILES and name != CONFIG]
    if taken:
        raise ValueError(
            f"{function}: files={taken} are names that an Orbax checkpoint itself uses. Rename "
            "them, or write safetensors."
        )
