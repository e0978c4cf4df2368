"""What is refused as a destination, before any work is done for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def check_destination(
    function: str, destination: str | os.PathLike[str], *, overwrite: bool, directory: bool
) -> Path:
    """Refuses a destination that may not be written, before any work is done for it.

    Args:
      function: Start of the error messages.
      destination: Where something shall be written.
      overwrite: Whether an existing destination may be replaced.
      directory: Whether a directory, not a file, shall be written.

    Returns:
      The destination with links resolved, so that its siblings lie on the same disk.
    """
    if not os.fspath(destination):
        raise ValueError(f"{function}: the destination is empty. Name what shall be written.")
    path = Path(os.path.realpath(destination))
    _refuse_unwritable(function, destination, path.parent)
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise FileExistsError(
            f"{function}: '{destination}' exists and nothing was written. Choose another "
            "destination, remove it, or say overwrite=True."
        )
    if path.is_dir() != directory:
        is_now, wanted = ("directory", "file") if path.is_dir() else ("file", "directory")
        raise FileExistsError(
            f"{function}: '{destination}' is a {is_now} and a {wanted} cannot replace it. Nothing "
            "was written. Choose another destination."
        )
    if any(place.is_relative_to(path) for place in _places_in_use()):
        raise ValueError(
            f"{function}: overwriting '{destination}' would remove the working directory or the "
            "home directory. Nothing was written. Choose another destination."
        )
    return path


def _refuse_unwritable(function: str, destination: str | os.PathLike[str], parent: Path) -> None:
    """Refuses a destination whose folder cannot be made or written to."""
    nearest = next(place for place in (parent, *parent.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{function}: '{destination}' cannot be made, because '{nearest}' is no folder. "
            "Nothing was written. Choose another destination."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{function}: '{destination}' cannot be made, because '{nearest}' may not be written "
            "to. Nothing was written. Choose another destination, or change its permissions."
        )


def refuse_unrelated(function: str, destination: str | os.PathLike[str]) -> None:
    """Refuses to overwrite a folder that is no checkpoint: all that it holds would be lost."""
    path = Path(destination)
    known = ("jaxweights.json", "*.safetensors", "*.safetensors.index.json")
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in known):
        return
    entries = sorted(entry.name for entry in path.iterdir())
    if entries:
        raise FileExistsError(
            f"{function}: '{destination}' is a folder that holds no checkpoint but {entries[:5]}, "
            "which overwriting would remove. Nothing was written. Choose another destination, or "
            "remove the folder yourself."
        )


def _places_in_use() -> list[Path]:
    places = []
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # neither need exist in a container
            places.append(find())
    return places
