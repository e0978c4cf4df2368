"""Saves trees with Orbax, with a manifest from which they are loaded without a target tree."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._array_store import save_arrays
from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
from jaxweights.checkpoint._json import dump_json
from jaxweights.checkpoint._manifest import encode_tree
from jaxweights.checkpoint._provenance import Provenance
from jaxweights.checkpoint._saved_tree import (
    ARRAYS,
    CONFIG,
    OWN_FILES,
    PROVENANCE,
    SavedTree,
    Shardings,
    write_manifest,
)
from jaxweights.checkpoint._write_safetensors import copy_files


@dataclasses.dataclass(frozen=True)
class LoadedTree:
    """What `load_tree` found.

    Args:
      tree: The tree, as it was saved.
      config: The model's configuration, if one was saved.
      provenance: How the tree came about, if that was saved.
      files: Further files that were saved along, by name.
    """

    tree: Any
    config: dict[str, Any] | None = None
    provenance: Provenance | None = None
    files: dict[str, Path] = dataclasses.field(default_factory=dict)


def save_tree(
    destination: str | os.PathLike[str],
    tree: Any,
    *,
    config: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a tree of arrays and represented weights so that every bit comes back.

    Arrays go through Orbax, sharded ones from where they are. A manifest keeps the structure and
    the settings of represented weights, which Orbax alone would lose. The destination appears
    only when all of it is written.

    Args:
      destination: Folder to make.
      tree: Dicts, lists, tuples, None, arrays, numbers, text, random keys and objects of
        registered classes (all of `jaxweights.weights`, `Stats`; others by `register_saved`).
      config: The model's configuration, kept as `config.json`.
      provenance: How the tree came about, kept as `provenance.json`.
      files: More files by name, such as the tokenizer's: content (text or bytes) or a path.
      overwrite: Whether an existing folder may be replaced, in one step, at the end.

    Where several processes share arrays, all of them call this with one destination on a disk
    that they share.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False, or is a folder that
        holds other things than a checkpoint.
      OSError: If the disk is full; the destination is untouched.
      TypeError: If the tree holds something that cannot be saved, all such places at once.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> save_tree(folder, {"kernel": np.ones((2, 2), np.float16)}, config={"layers": 1})
      >>> loaded = load_tree(folder)
      >>> loaded.tree["kernel"].dtype, loaded.config
      (dtype('float16'), {'layers': 1})
    """
    check_destination("save_tree", destination, overwrite=overwrite, directory=True)
    refuse_unrelated("save_tree", destination)
    node, arrays = encode_tree(tree)
    taken = [name for name in files or {} if name.split("/")[0] in OWN_FILES]
    if taken:
        raise ValueError(f"save_tree: files={taken} are names that the checkpoint itself uses.")
    with _partial(destination, overwrite=overwrite) as partial:
        if jax.process_index() == 0:
            write_manifest(partial, node)
            if config is not None:
                (partial / CONFIG).write_text(dump_json(dict(config)), encoding="utf-8")
            if provenance is not None:
                (partial / PROVENANCE).write_text(provenance.to_json(), encoding="utf-8")
            copy_files("save_tree", partial, files or {})
        save_arrays(partial / ARRAYS, arrays)


def load_tree(
    path: str | os.PathLike[str],
    *,
    shardings: Shardings | None = None,
    verify: bool = True,
    abstract: bool = False,
) -> LoadedTree:
    """Loads what `save_tree` saved; no target tree is needed.

    The manifest is checked completely, and against the arrays that Orbax holds, before any array
    is read.

    Args:
      path: The folder.
      shardings: Where arrays go: one sharding for all, shardings by path (others go to the first
        device), or a function of path and `jax.ShapeDtypeStruct`. Paths are those of arrays, such
        as `mlp/kernel/codes`. NumPy arrays stay NumPy arrays. None: the first device.
      verify: Whether to compare the values with the hashes that were taken when they were saved.
        On accelerators this copies them to the host once.
      abstract: Whether to give `jax.ShapeDtypeStruct` for arrays and read none, for `plan`.

    Returns:
      The tree and what was saved along.

    Raises:
      FileNotFoundError: If the folder or its manifest is missing.
      ValueError: If manifest and arrays contradict each other, or were changed; all places at
        once.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> save_tree(folder, {"kernel": np.ones((2, 2), np.float16)})
      >>> load_tree(folder).tree["kernel"].dtype
      dtype('float16')
      >>> load_tree(folder, abstract=True).tree
      {'kernel': ShapeDtypeStruct(shape=(2, 2), dtype=float16)}
    """
    saved = SavedTree(Path(path), function="load_tree")
    arrays = (
        saved.structs(shardings)
        if abstract
        else saved.read(saved.records, shardings, verify=verify)
    )
    return LoadedTree(saved.build(arrays), saved.config, saved.provenance, saved.files)


@contextlib.contextmanager
def _partial(destination: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """The hidden folder that all processes write into; the first one makes and renames it."""
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first:
            partial = stack.enter_context(
                atomic("save_tree", destination, directory=True, overwrite=overwrite)
            )
        if jax.process_count() == 1:
            yield partial
            return
        from jax.experimental import multihost_utils

        name = partial.name.encode() if first else b""
        line = np.zeros(512, np.uint8)
        line[: len(name)] = np.frombuffer(name, np.uint8)
        name = bytes(multihost_utils.broadcast_one_to_all(line)).rstrip(b"\0").decode()
        yield Path(os.path.realpath(destination)).parent / name
        multihost_utils.sync_global_devices("save_tree: written")
    multihost_utils.sync_global_devices("save_tree: in place")
