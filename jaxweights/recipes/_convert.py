"""Converts a checkpoint to another format, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxweights.checkpoint import Checkpoint, Provenance
from jaxweights.checkpoint.exchange._module import LazyWeight
from jaxweights.core import Layout, apply, plan
from jaxweights.core._layout import is_default_target, is_vector
from jaxweights.lift import infer_layout
from jaxweights.models._arrange import nest
from jaxweights.models._convert import param_shapes
from jaxweights.models._gguf_export import refuse_other_family
from jaxweights.models._lazy import carried_names, lazy_tensors
from jaxweights.models._load import Pretrained, read_config, tokenizer_path_of
from jaxweights.models._registry import ModelConfig, build
from jaxweights.quantize import round_to_nearest
from jaxweights.recipes._download import Progress
from jaxweights.recipes._write import Format, kept_activations, write_lazily
from jaxweights.stream._memory import resident_bytes
from jaxweights.weights._weight import is_weight

_NAME = "jaxweights convert"
_WIDE_BYTES = 16  # of an entry: float32 copies, codes and words of the tensor at hand
_GGUF_BLOCK, _GGUF_BITS = 32, (4, 5, 8)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How the matrices inside the layers are rounded on the way.

    Args:
      bits: Bits per code.
      group_size: Inputs that share a scale; None for all of an output, and 32 in GGUF.
      pads: Whether the last group may be shorter.
    """

    bits: int
    group_size: int | None
    pads: bool = False


def convert_checkpoint(
    source: Checkpoint,
    destination: Path,
    form: Format,
    *,
    dtype: DTypeLike | None = None,
    rounding: Rounding | None = None,
    memory: int | None = None,
    target: Literal["vllm"] | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint in another format and holds one of its tensors at a time.

    Tensors are looked at once for the checks, and read again when they are written, so that
    whatever a format cannot hold is known before anything is written.

    Args:
      source: A checkpoint of tensors under the names of Hugging Face or GGUF.
      destination: A folder to make, or a `.gguf` file.
      form: Any format but `orbax`.
      dtype: Dtype to which dense floats are cast.
      rounding: How dense matrices inside the layers are quantized; None leaves them dense.
      memory: Most bytes that the process may hold.
      target: As in `export_checkpoint`.
      provenance: How the checkpoint came about.
      overwrite: Whether an existing destination may be replaced.
      progress: Called with (task, tensors done, tensors in all).

    Raises:
      ValueError: If a tensor does not fit the format, or into the memory.
    """
    config = read_config(source)
    fill = _Filling(source, progress)
    fill.check_memory(memory)
    if form == "gguf":
        refuse_other_family(config)
    tensors = lazy_tensors(
        source,
        config,
        convention="gguf" if form == "gguf" else "huggingface",
        represented=form != "safetensors",
        dtype=dtype,
        change=None if rounding is None else _rounded(rounding, config, form),
    )
    tensors = {name: fill.watched(tensor) for name, tensor in tensors.items()}
    fill.expect(len(tensors) * 2)
    model = Pretrained(build(config), None, config, tokenizer_path_of(source), source, {})
    carried = {} if form == "gguf" else {n: source.read(n) for n in carried_names(source, config)}
    carried |= kept_activations(form, source)
    write_lazily(
        destination,
        form,
        tensors,
        model,
        carried=carried,
        provenance=provenance,
        target=target,
        overwrite=overwrite,
    )


class _Filling:
    """What is told of tensors as they are read, and what they may take."""

    def __init__(self, source: Checkpoint, progress: Progress | None):
        self._source = source
        self._progress = progress
        self._done = 0
        self._total = 0

    def check_memory(self, memory: int | None) -> None:
        """Refuses a limit that the largest tensor does not fit into."""
        if memory is None:
            return
        sizes = {n: int(np.prod(self._source.shape(n))) for n in self._source.names}
        largest = max(sizes, key=sizes.__getitem__)
        need = resident_bytes() + _WIDE_BYTES * sizes[largest]
        if need > memory:
            raise ValueError(
                f"{_NAME}: {largest!r}: takes about {need} bytes with what the process holds, but "
                f"memory={memory}. Give {need} or more."
            )

    def expect(self, total: int) -> None:
        """How many reads there will be."""
        self._total = total

    def watched(self, tensor: LazyWeight) -> LazyWeight:
        """The tensor, which tells that it was read."""

        def read() -> Any:
            value = tensor.read()
            self._done = min(self._done + 1, self._total)
            if self._progress is not None:
                self._progress("Converting", self._done, self._total)
            return value

        return LazyWeight(read)


def _refuse_rounding(rounding: Rounding, form: Format) -> None:
    """Refuses bits that a format cannot hold, before anything is read."""
    remedies = {
        "safetensors": "holds dense matrices. Choose another format, or leave --bits out",
        "bitsandbytes": (
            "holds NF4 and FP4 tables, to which --bits does not round. Run a recipe with "
            "quantize.nf4, or choose another format"
        ),
    }
    if form == "gguf" and rounding.bits not in _GGUF_BITS:
        remedies["gguf"] = f"has blocks of {', '.join(map(str, _GGUF_BITS))} bits. Choose of these"
    if form in remedies:
        raise ValueError(f"{_NAME}: bits={rounding.bits}: {form} {remedies[form]}.")


def _rounded(rounding: Rounding, config: ModelConfig, form: Format) -> Callable[[str, Any], Any]:
    """Rounds dense matrices inside the layers, as a run in memory would."""
    _refuse_rounding(rounding, form)
    group_size = rounding.group_size
    if group_size is None and form == "gguf":
        group_size = _GGUF_BLOCK
    pad = "zero" if rounding.pads else None
    tx = round_to_nearest(bits=rounding.bits, group_size=group_size, pad=pad)
    layout = _layout(config)
    plan(tx, _abstract(config), layout=layout)  # refuses all groups that do not divide at once

    def change(path: str, part: Any) -> Any:
        axes = layout.get(path)
        if axes is None or axes.kind != "linear":
            return part
        if is_vector(path, part) or not is_default_target(path):
            return part
        if is_weight(part):
            raise ValueError(
                f"{_NAME}: {path!r}: is already a {type(part).__name__}, which "
                f"bits={rounding.bits} would round a second time. Leave --bits out to keep its "
                "codes, or convert to safetensors first, which makes it dense."
            )
        stacked = bool(len(param_shapes(config)[path]) - part.ndim)
        leaf = jax.numpy.asarray(part[None] if stacked else part)
        own = Layout(tuple(entry for entry in layout.entries if entry[0] == path))
        weight = jax.tree.map(np.asarray, apply(tx, {path: leaf}, layout=own)[path])
        return jax.tree.map(lambda field: field[0], weight) if stacked else weight

    return change


@functools.lru_cache(maxsize=8)
def _layout(config: ModelConfig) -> Layout:
    model: Any = build(config)
    run = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    return infer_layout(run, _abstract(config), jax.ShapeDtypeStruct((1, 8), np.int32))


def _abstract(config: ModelConfig) -> Any:
    """The model's parameters as shapes."""
    shapes = param_shapes(config)
    return nest({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
