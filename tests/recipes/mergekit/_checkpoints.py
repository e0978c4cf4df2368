"""The checkpoints of the merge fixtures, as folders, and configurations over them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import yaml

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from tests._fixtures import fixture

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "torch_dtype": "float32",
}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """`base`, `ft1`, `ft2` or `ft3` by tensor name, in torch's orientation."""
    return {k: v for k, v in fixture(f"merge/inputs_{name}.npz").items() if k != "meta"}


def write_models(folder: Path, *names: str) -> Path:
    """Writes checkpoints that configurations beside them can name."""
    for name in names or ("base", "ft1", "ft2", "ft3"):
        files = {"config.json": json.dumps(CONFIG)}
        write_safetensors(folder / name, arrays(name), files=files)
    return folder


def write_config(folder: Path, config: dict | str | list, name: str = "merge.yml") -> Path:
    """Writes a configuration, or the documents of one."""
    path = folder / name
    if isinstance(config, str):
        path.write_text(config)
    elif isinstance(config, list):
        path.write_text(yaml.safe_dump_all(config, sort_keys=False))
    else:
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    return {name: np.array(array) for name, array in open_checkpoint(folder).items()}
