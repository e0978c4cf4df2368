"""Saves trees with Orbax, with a manifest from which they are loaded without a target tree."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._atomic import atomic, check_destination, refuse_unrelated
from jaxweights.checkpoint._json import dump_json, read_json_object
from jaxweights.checkpoint._manifest import (
    ArrayRecord,
    Parts,
    array_records,
    build_tree,
    digest_of,
    encode_tree,
    hash_of,
    storage_name,
)
from jaxweights.checkpoint._provenance import Provenance, library_versions
from jaxweights.checkpoint._untrusted import contained
from jaxweights.checkpoint._write_safetensors import copy_files

MANIFEST = "jaxweights.json"
CONFIG = "config.json"
_ARRAYS = "arrays"
_PROVENANCE = "provenance.json"
_OWN_FILES = (MANIFEST, CONFIG, _ARRAYS, _PROVENANCE)
_FORMAT = 1
# TensorStore has no such types; their bytes are kept, and compress as well as packed ones.
_STORED_AS_BYTES = ("uint2", "uint4", "float8_e4m3")

Shardings = (
    jax.sharding.Sharding
    | Mapping[str, jax.sharding.Sharding]
    | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
)


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
    taken = [name for name in files or {} if name.split("/")[0] in _OWN_FILES]
    if taken:
        raise ValueError(f"save_tree: files={taken} are names that the checkpoint itself uses.")
    manifest = {
        "format": _FORMAT,
        "versions": library_versions(),
        "sha256": digest_of(node),
        "tree": node,
    }
    with _partial(destination, overwrite=overwrite) as partial:
        if jax.process_index() == 0:
            (partial / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
            if config is not None:
                (partial / CONFIG).write_text(dump_json(dict(config)), encoding="utf-8")
            if provenance is not None:
                (partial / _PROVENANCE).write_text(provenance.to_json(), encoding="utf-8")
            copy_files("save_tree", partial, files or {})
        _save_arrays(partial / _ARRAYS, arrays)


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
    """
    saved = SavedTree(Path(path), function="load_tree")
    arrays = (
        saved.structs(shardings)
        if abstract
        else saved.read(saved.records, shardings, verify=verify)
    )
    return LoadedTree(saved.build(arrays), saved.config, saved.provenance, saved.files)


class SavedTree:
    """A saved tree whose manifest is checked and whose arrays are not read yet."""

    def __init__(self, path: Path, *, function: str):
        """Opens what `save_tree` saved; `function` starts the error messages."""
        self.path = path
        self._where = f"{function}: '{path}'"
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise FileNotFoundError(
                f"{self._where}: holds no {MANIFEST}. Give a folder that save_tree made; it "
                "appears only when it is complete."
            )
        content = self._json(MANIFEST)
        if (
            content.keys() != {"format", "versions", "sha256", "tree"}
            or content["format"] != _FORMAT
        ):
            raise ValueError(
                f"{self._where}: {MANIFEST} has format {content.get('format')!r:.80} and the keys "
                f"{sorted(content)}; this library reads format {_FORMAT}. It was written by "
                "another version or changed."
            )
        self.node = content["tree"]
        try:
            self.records, problems = array_records(self.node)
        except RecursionError:
            raise ValueError(f"{self._where}: {MANIFEST} is nested too deeply.") from None
        if not problems and content["sha256"] != digest_of(self.node):
            problems = [f"{MANIFEST} was changed after it was written; its hash does not fit"]
        if not problems:
            problems = self._compare_with_orbax()
        if problems:
            raise ValueError(f"{self._where}: {'; '.join(problems)}.")
        self.config = self._json(CONFIG) if (path / CONFIG).exists() else None
        self.provenance = None
        if (path / _PROVENANCE).exists():
            file = contained(path, _PROVENANCE, function)
            self.provenance = Provenance.from_json(
                file.read_bytes(), where=f"{self._where}: {_PROVENANCE}"
            )
        self.files = {
            file.relative_to(path).as_posix(): file
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.relative_to(path).parts[0] not in _OWN_FILES
        }

    def read(
        self,
        records: Iterable[ArrayRecord],
        shardings: Shardings | None = None,
        *,
        verify: bool = True,
    ) -> dict[Parts, Any]:
        """Reads some of the arrays, by place."""
        records = list(records)
        places = _placement(self._where, records, shardings)
        arrays: dict[Parts, Any] = {}
        for record in records:  # Orbax holds no empty arrays
            if 0 in record.shape:
                empty = np.zeros(record.shape, record.dtype)
                arrays[record.parts] = (
                    empty if record.host else jax.device_put(empty, places[record.parts])
                )
        wanted = [record for record in records if record.parts not in arrays]
        if wanted:
            arrays |= self._restore(wanted, places)
        if verify:
            self._refuse_damage(records, arrays)
        return arrays

    def structs(self, shardings: Shardings | None = None) -> dict[Parts, Any]:
        """Shapes and dtypes of all arrays, by place; with shardings, if any are given."""
        places = {}
        if shardings is not None:
            places = _placement(self._where, self.records, shardings)
        return {
            r.parts: jax.ShapeDtypeStruct(r.shape, r.dtype, sharding=places.get(r.parts))
            for r in self.records
        }

    def _refuse_damage(self, records: list[ArrayRecord], arrays: dict[Parts, Any]) -> None:
        damaged = [
            record.path
            for record in records
            if record.sha256 is not None
            and (now := hash_of(arrays[record.parts])) is not None
            and now != record.sha256
        ]
        if damaged:
            raise ValueError(
                f"{self._where}: the values of {damaged[:5]} ({len(damaged)} of {len(records)} "
                "arrays) are not those that were saved. The files are damaged; copy them again."
            )

    def build(self, arrays: dict[Parts, Any]) -> Any:
        """Makes the tree out of its arrays."""
        try:
            return build_tree(self.node, arrays)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}.") from None

    def _json(self, name: str) -> dict[str, Any]:
        return read_json_object(
            contained(self.path, name, self._where), where=f"{self._where}: {name}"
        )

    def _compare_with_orbax(self) -> list[str]:
        """Places where the manifest and the arrays' own metadata differ."""
        expected = {_storage_key(r.parts): r for r in self.records if 0 not in r.shape}
        folder = self.path / _ARRAYS
        if not expected and not folder.exists():
            return []
        if not folder.is_dir():
            return [f"the folder '{_ARRAYS}' is missing; the copy is incomplete"]
        try:
            metadata = _checkpointer().metadata(folder.resolve()).item_metadata
            if metadata is None:
                return [f"Orbax finds no arrays in '{_ARRAYS}'; the copy is incomplete"]
            stored = {_key_names(key): value for key, value in _leaves(metadata.tree)}
        except Exception as error:  # whatever Orbax and TensorStore raise on damaged files
            return [f"Orbax cannot read '{_ARRAYS}': {error!s:.300}"]
        problems = [
            f"'{expected[key].path}' is in the manifest, but its array is missing"
            for key in expected.keys() - stored.keys()
        ]
        problems += [
            f"the array '{'/'.join(key[1:])}' is there, but not in the manifest"
            for key in stored.keys() - expected.keys()
        ]
        for key in expected.keys() & stored.keys():
            record, found = expected[key], stored[key]
            said = (_stored_dtype(record.dtype).name, record.shape)
            held = (np.dtype(found.dtype).name, tuple(found.shape))
            if said != held:
                problems.append(
                    f"'{record.path}' is {said[0]} {said[1]} in the manifest, but the array is "
                    f"{held[0]} {held[1]}"
                )
        return sorted(problems)

    def _restore(self, records: list[ArrayRecord], places: dict[Parts, Any]) -> dict[Parts, Any]:
        import orbax.checkpoint as ocp

        item: dict[str, Any] = {}
        args: dict[str, Any] = {}
        for record in records:
            stored = _stored_dtype(record.dtype)
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
        try:
            restored = _checkpointer().restore(
                (self.path / _ARRAYS).resolve(),
                args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
            )
        except Exception as error:
            raise ValueError(
                f"{self._where}: Orbax cannot read its arrays: {error!s:.500}. The files are "
                "damaged or incomplete; copy them again."
            ) from error
        found = {_key_names(key): value for key, value in _leaves(restored)}
        return {
            record.parts: _from_stored(found[_storage_key(record.parts)], record, places)
            for record in records
        }


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


def _save_arrays(folder: Path, arrays: dict[Parts, Any]) -> None:
    item: dict[str, Any] = {}
    for parts, array in arrays.items():
        if array.size:  # Orbax refuses empty arrays; the manifest says all there is to say
            _insert(item, parts, _to_stored(array))
    if not item:
        return
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax's advice to its own callers
        _checkpointer().save(folder, args=ocp.args.PyTreeSave(item))


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint8) if dtype.name in _STORED_AS_BYTES else dtype


def _is_viewed(dtype: np.dtype) -> bool:
    """Whether only NumPy can turn the stored bytes back; integers are simply converted."""
    return dtype.name in _STORED_AS_BYTES and not dtype.name.startswith("uint")


def _to_stored(array: Any) -> Any:
    if array.dtype.name not in _STORED_AS_BYTES:
        return array
    if _is_viewed(array.dtype) or isinstance(array, np.ndarray):
        return np.ascontiguousarray(np.asarray(array)).view(np.uint8)
    return array.astype(np.uint8)


def _from_stored(array: Any, record: ArrayRecord, places: dict[Parts, Any]) -> Any:
    if _stored_dtype(record.dtype) != record.dtype:
        if isinstance(array, np.ndarray):
            array = array.view(record.dtype)
        else:
            array = array.astype(record.dtype)
    if not record.host and isinstance(array, np.ndarray):
        array = jax.device_put(array, places[record.parts])
    assert array.dtype == record.dtype and array.shape == record.shape, "compared before reading"
    return array


def _placement(
    where: str, records: list[ArrayRecord], shardings: Shardings | None
) -> dict[Parts, jax.sharding.Sharding]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is None:
        return {record.parts: default for record in records}
    if isinstance(shardings, jax.sharding.Sharding):
        return {record.parts: shardings for record in records}
    if callable(shardings):
        return {
            record.parts: shardings(record.path, jax.ShapeDtypeStruct(record.shape, record.dtype))
            for record in records
        }
    paths = [record.path for record in records]
    unknown = sorted(shardings.keys() - set(paths))
    if unknown:
        raise ValueError(
            f"{where}: shardings names {unknown[:5]}, but the saved arrays are {paths[:20]}."
        )
    return {record.parts: shardings.get(record.path, default) for record in records}


def _storage_key(parts: Parts) -> Parts:
    # One fixed root, so that a tree may be a single array.
    return ("tree", *map(storage_name, parts))


def _insert(item: dict[str, Any], parts: Parts, value: Any) -> None:
    *folders, name = _storage_key(parts)
    for folder in folders:
        item = item.setdefault(folder, {})
    item[name] = value


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))[0]


def _key_names(key_path: Any) -> Parts:
    return tuple(str(key.key) for key in key_path)
