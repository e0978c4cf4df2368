"""Safetensors folders as checkpoints, quantized modules included."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._checkpoint import Checkpoint
from jaxweights.checkpoint._json import dump_json, read_json_object
from jaxweights.checkpoint._mapped import MappedTensor
from jaxweights.checkpoint._safetensors import SafetensorsReader, open_safetensors
from jaxweights.checkpoint._safetensors_header import DTYPES
from jaxweights.checkpoint._saved_tree import CONFIG
from jaxweights.checkpoint._untrusted import contained
from jaxweights.checkpoint.exchange._module import FLOAT, Part, Represented
from jaxweights.checkpoint.exchange._settings import (
    Module,
    UnknownFormat,
    activation_tensors,
    quantized_modules,
)

# What travels along with the weights of a Hugging Face checkpoint.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
)


class SafetensorsCheckpoint(Checkpoint):
    """Safetensors, with the files that Hugging Face puts beside them.

    The tensors of a quantized module appear as the one weight that they stand for.
    """

    format = "safetensors"

    def __init__(self, path: Path, folder: Path):
        """Opens a file or a folder whose companions lie in `folder`."""
        self._reader: SafetensorsReader = open_safetensors(path)
        files: dict[str, Any] = companions(folder)
        config = _config(files)
        super().__init__(path, config, dict(self._reader.metadata), files)
        self.modules: dict[str, Module] = {}
        given = config.get("quantization_config")
        if isinstance(given, dict):
            try:
                self.modules = quantized_modules(given, self._reader)
            except UnknownFormat as error:
                self.unread = str(error)
                return
            self.quantization = given
            self.activations = activation_tensors(given, self.modules, self._reader)
            self.config = {k: v for k, v in config.items() if k != "quantization_config"}
            self.files = {**files, CONFIG: dump_json(self.config)}
        self._refuse_twice()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        owner = {t: name for name, m in self.modules.items() for t in m.tensors.values()}
        hidden = set(self.activations) - owner.keys()
        shown = (name for name in self._reader if name not in hidden)
        return tuple(dict.fromkeys(owner.get(name, name) for name in shown))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.modules:
            return self._reader[name].shape
        with self._blaming(name):
            return self.modules[name].shape(self._parts(name))

    def dtype(self, name: str) -> np.dtype:
        if name in self.modules:
            return self._module_dtype(name)
        stored = self._reader[name].dtype
        # A packed dtype has no NumPy equal; reading it says so in full.
        return DTYPES[stored] if stored in DTYPES else self._reader.read(name).dtype

    def read(self, name: str) -> np.ndarray:
        if name not in self.modules:
            return self._reader.read(name)
        weight = self.represented(name)
        return weight if isinstance(weight, np.ndarray) else np.asarray(weight.materialize())

    def represented(self, name: str) -> np.ndarray | Represented:
        if name not in self.modules:
            return self._reader.read(name)
        with self._blaming(name):
            return self.modules[name].unpack(self._parts(name))

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        # The bytes of booleans are checked when they are read as a whole.
        if name in self.modules or self._reader[name].dtype == "BOOL":
            return super().reader(name)
        return functools.partial(self._reader.read_into, name)

    def mapped(self, name: str) -> MappedTensor | None:
        return None if name in self.modules else self._reader.mapped(name)

    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        if name not in self.modules:
            return self._reader[name].dtype, self._reader.raw(name)
        tensors = sorted(self.modules[name].tensors.items())
        kinds = [f"{part} {self._reader[t].dtype} {self._reader[t].shape}" for part, t in tensors]
        return "; ".join(kinds), np.concatenate([self._reader.raw(t) for _, t in tensors])

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the files."""
        module = self.modules.get(name)
        tensors = (name,) if module is None else tuple(module.tensors.values())
        return sum(self._reader[tensor].nbytes for tensor in tensors)

    def _module_dtype(self, name: str) -> np.dtype:
        """What a module materialises to: told by its scales, or else by reading it."""
        for suffix, tensor in self.modules[name].tensors.items():
            stored = DTYPES.get(self._reader[tensor].dtype)
            is_scale = suffix in ("scales", "weight_scale")
            if is_scale and stored is not None and stored in FLOAT:
                return stored
        return np.dtype(self.represented(name).dtype)

    def _parts(self, name: str) -> dict[str, Part]:
        def part(tensor: str) -> Part:
            info = self._reader[tensor]
            dtype = DTYPES.get(info.dtype, np.dtype(np.void))
            return Part(info.shape, dtype, functools.partial(self._reader.read, tensor))

        return {suffix: part(tensor) for suffix, tensor in self.modules[name].tensors.items()}

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"open_checkpoint: '{self.path}': {name!r}: {error}.") from None

    def _refuse_twice(self) -> None:
        parts = {t for module in self.modules.values() for t in module.tensors.values()}
        twice = [name for name in self.modules if name in self._reader and name not in parts]
        if twice:
            raise ValueError(
                f"open_checkpoint: '{self.path}': {twice[:5]} are there both quantized and dense. "
                "Remove one of the two."
            )


def companions(folder: Path) -> dict[str, Path]:
    """The files of a folder that travel along with its weights, by name."""
    return {
        name: contained(folder, name, "open_checkpoint")
        for name in _COMPANIONS
        if (folder / name).is_file()
    }


def _config(files: dict[str, Path]) -> dict[str, Any]:
    if CONFIG not in files:
        return {}
    return read_json_object(files[CONFIG], where=f"open_checkpoint: '{files[CONFIG]}'")
