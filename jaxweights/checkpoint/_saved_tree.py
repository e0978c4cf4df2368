"""A saved tree, checked completely before any of its arrays is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._array_store import (
    restore_arrays,
    storage_key,
    stored_arrays,
    stored_dtype,
)
from jaxweights.checkpoint._json import dump_json, read_json_object
from jaxweights.checkpoint._manifest import (
    ArrayRecord,
    Parts,
    array_records,
    build_tree,
    checksum_of,
    digest_of,
)
from jaxweights.checkpoint._provenance import Provenance, library_versions
from jaxweights.checkpoint._raw_arrays import RawArray, find_raw_array
from jaxweights.checkpoint._untrusted import contained

MANIFEST = "jaxweights.json"
CONFIG = "config.json"
ARRAYS = "arrays"
PROVENANCE = "provenance.json"
OWN_FILES = (MANIFEST, CONFIG, ARRAYS, PROVENANCE)
FORMAT = 2
Shardings = (
    jax.sharding.Sharding
    | Mapping[str, jax.sharding.Sharding]
    | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
)


def write_manifest(folder: Path, node: dict[str, Any]) -> None:
    """Writes what a tree's arrays are read by."""
    manifest = {
        "format": FORMAT,
        "versions": library_versions(),
        "sha256": digest_of(node),
        "tree": node,
    }
    (folder / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")


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
            or content["format"] != FORMAT
        ):
            raise ValueError(
                f"{self._where}: {MANIFEST} has format {content.get('format')!r:.80} and the keys "
                f"{sorted(content)}; this library reads format {FORMAT}. It was written by "
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
        if (path / PROVENANCE).exists():
            file = contained(path, PROVENANCE, function)
            self.provenance = Provenance.from_json(
                file.read_bytes(), where=f"{self._where}: {PROVENANCE}"
            )
        self.files = {
            file.relative_to(path).as_posix(): file
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.relative_to(path).parts[0] not in OWN_FILES
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
            try:
                arrays |= restore_arrays(self.path / ARRAYS, wanted, places)
            except Exception as error:
                raise ValueError(
                    f"{self._where}: Orbax cannot read its arrays: {error!s:.500}. The files are "
                    "damaged or incomplete; copy them again."
                ) from error
        if verify:
            self._refuse_damage(records, arrays)
        return arrays

    def raw(self, record: ArrayRecord) -> RawArray | None:
        """An array that can be read in slices; None where it is stored in another way."""
        if stored_dtype(record.dtype) != record.dtype or 0 in record.shape:
            return None
        return find_raw_array(self.path / ARRAYS, record)

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
            if record.checksum is not None
            and (now := checksum_of(arrays[record.parts])) is not None
            and now != record.checksum
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
        expected = {storage_key(r.parts): r for r in self.records if 0 not in r.shape}
        folder = self.path / ARRAYS
        if not expected and not folder.exists():
            return []
        if not folder.is_dir():
            return [f"the folder '{ARRAYS}' is missing; the copy is incomplete"]
        try:
            stored = stored_arrays(folder)
        except Exception as error:  # whatever Orbax and TensorStore raise on damaged files
            return [f"Orbax cannot read '{ARRAYS}': {error!s:.300}"]
        if stored is None:
            return [f"Orbax finds no arrays in '{ARRAYS}'; the copy is incomplete"]
        problems = [
            f"'{expected[key].path}' is in the manifest, but its array is missing"
            for key in expected.keys() - stored.keys()
        ]
        problems += [
            f"the array '{'/'.join(key[1:])}' is there, but not in the manifest"
            for key in stored.keys() - expected.keys()
        ]
        for key in expected.keys() & stored.keys():
            record, held = expected[key], stored[key]
            said = (stored_dtype(record.dtype).name, record.shape)
            if said != held:
                problems.append(
                    f"'{record.path}' is {said[0]} {said[1]} in the manifest, but the array is "
                    f"{held[0]} {held[1]}"
                )
        return sorted(problems)


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
