"""What no checkpoint may bring along: pickles, and paths that leave its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_pickle(function: str, path: Path) -> None:
    """Refuses pickles by name: unpickling runs whatever code the file brings along."""
    if path.is_dir():
        if any(path.glob("*.safetensors*")) or any(path.glob("*.gguf")):
            return
        pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    else:
        pickles = [path] if path.suffix in PICKLE_SUFFIXES else []
    if pickles:
        raise ValueError(
            f"{function}: '{pickles[0]}' is a pickle, which can run any code when it is read, so "
            "it never is. Where you trust it, convert it once with PyTorch: safetensors.torch."
            "save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )


def contained(folder: Path, name: str, function: str) -> Path:
    """The path of a file that something in `folder` names, if it lies in that folder.

    Args:
      folder: The checkpoint's folder.
      name: Relative path, as an untrusted file states it.
      function: Start of the error message.

    Returns:
      The path inside the folder.

    Raises:
      ValueError: If the name is absolute, climbs out, or is a link that leads out of the folder.
    """
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ValueError(
            f"{function}: '{folder}' names the file {name!r}, which is not a path inside it. The "
            "checkpoint is damaged or was made to mislead."
        )
    path = folder / name
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots":  # a Hugging Face cache keeps its files as links
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{function}: '{path}' is a link to '{real}', outside the checkpoint's folder. Put the "
            "file itself there if you trust it."
        )
    return path
