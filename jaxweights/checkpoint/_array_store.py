"""Arrays in Orbax's files, by their place in a tree."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._manifest import ArrayRecord, Parts, storage_name

# TensorStore has no such types; their bytes are kept, and compress as well as packed ones.
_STORED_AS_BYTES = ("uint2", "uint4", "float8_e4m3")


def save_arrays(folder: Path, arrays: dict[Parts, Any], *, packed: bool = True) -> None:
    """Writes arrays with Orbax into a new folder, or none where there is nothing to write.

    Args:
      folder: The folder.
      arrays: The arrays, by place.
      packed: Whether they share files; otherwise each is a folder of its own.
    """
    item: dict[str, Any] = {}
    for parts, array in arrays.items():
        if array.size:  # Orbax refuses empty arrays; the manifest says all there is to say
            _insert(item, parts, _to_stored(array))
    if not item:
        return
    import orbax.checkpoint as ocp

    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax's advice to its own callers
        _checkpointer(packed=packed).save(folder, args=ocp.args.PyTreeSave(item))


def restore_arrays(
    folder: Path, records: list[ArrayRecord], places: dict[Parts, Any]
) -> dict[Parts, Any]:
    """Reads arrays with Orbax, each onto the sharding that `places` has for it."""
    import orbax.checkpoint as ocp

    item: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for record in records:
        stored = stored_dtype(record.dtype)
        _insert(item, record.parts, jax.ShapeDtypeStruct(record.shape, stored))
        host = record.host or _is_viewed(record.dtype)
        _insert(
            args,
            record.parts,
            ocp.RestoreArgs(restore_type=np.ndarray)
            if host
            else ocp.ArrayRestoreArgs(
                sharding=places[record.parts], global_shape=record.shape, dtype=stored
            ),
        )
    with _quiet():
        restored = _checkpointer().restore(
            folder.resolve(),
            args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
        )
    found = {_key_names(key): value for key, value in _leaves(restored)}
    return {
        record.parts: _from_stored(found[storage_key(record.parts)], record, places)
        for record in records
    }


def stored_arrays(folder: Path) -> dict[Parts, tuple[str, tuple[int, ...]]] | None:
    """Dtype and shape of every array that Orbax finds, by `storage_key`; None if it finds none."""
    with _quiet():
        metadata = _checkpointer().metadata(folder.resolve()).item_metadata
    if metadata is None:
        return None
    return {
        _key_names(key): (np.dtype(found.dtype).name, tuple(found.shape))
        for key, found in _leaves(metadata.tree)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what Orbax's threads print of failures that are raised as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checkpointer(*, packed: bool = True) -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=packed))


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which Orbax is given an array."""
    return np.dtype(np.uint8) if dtype.name in _STORED_AS_BYTES else dtype


def _is_viewed(dtype: np.dtype) -> bool:
    """Whether only NumPy can turn the stored bytes back; integers are simply converted."""
    return dtype.name in _STORED_AS_BYTES and not dtype.name.startswith("uint")


def _to_stored(array: Any) -> Any:
    if array.dtype.name not in _STORED_AS_BYTES:
        return array
    if _is_viewed(array.dtype) or isinstance(array, np.ndarray):
        return np.asarray(array, order="C").view(np.uint8)
    return array.astype(np.uint8)


def _from_stored(array: Any, record: ArrayRecord, places: dict[Parts, Any]) -> Any:
    if stored_dtype(record.dtype) != record.dtype:
        if isinstance(array, np.ndarray):
            array = array.view(record.dtype)
        else:
            array = array.astype(record.dtype)
    if not record.host and isinstance(array, np.ndarray):
        array = jax.device_put(array, places[record.parts])
    assert array.dtype == record.dtype and array.shape == record.shape, "compared before reading"
    return array


def storage_key(parts: Parts) -> Parts:
    """The keys under which Orbax holds the array of one place."""
    # One fixed root, so that a tree may be a single array.
    return ("tree", *map(storage_name, parts))


def _insert(item: dict[str, Any], parts: Parts, value: Any) -> None:
    *folders, name = storage_key(parts)
    for folder in folders:
        item = item.setdefault(folder, {})
    item[name] = value


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))[0]


def _key_names(key_path: Any) -> Parts:
    return tuple(str(key.key) for key in key_path)
