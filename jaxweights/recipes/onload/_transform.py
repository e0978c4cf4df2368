"""transform_in_blocks: a calibrated transform of a checkpoint larger than memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from jaxweights.checkpoint import Provenance
from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
from jaxweights.core import Path as LeafPath
from jaxweights.core import Transform, chain
from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._plan import plan_and_leaves
from jaxweights.recipes._download import Progress
from jaxweights.recipes._write import FORMATS, Format, check_formats_of_shapes
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._run import BlockRun
from jaxweights.recipes.onload._stages import Again
from jaxweights.recipes.onload._work import (
    refuse_orbax,
    refuse_outside,
    work_folder,
    write_blocks,
)

_NAME = "recipes.transform_in_blocks"


def transform_in_blocks(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    transforms: Transform | Sequence[Transform],
    batches: Sequence[Any] = (),
    *,
    form: Format = "compressed-tensors",
    again: Again = "each_block",
    key: jax.Array | None = None,
    memory: int | None = None,
    recipe: str = "",
    dequantize: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Calibrates, transforms and writes a model of which one block of layers is held at a time.

    The calibration tokens are embedded once; what the layers pass on of them lies in files. Then
    each block is read, its statistics are collected, it is transformed and kept in a file, and the
    tokens are sent through it. Embedding, head and final norm stay as they are. What is held does
    not grow with the number of layers.

    Args:
      source: A checkpoint of tensors under the names of Hugging Face or GGUF, of a model of
        `models` with a scan over its layers.
      destination: The folder to make.
      transforms: What is done to each block, in order: transforms that look at no more than a
        block, such as `quantize.gptq`, `quantize.awq` and `quantize.smooth` with the folds of the
        model, `sparsify.wanda`.
      batches: Calibration batches: token ids `(batch, time)`, or tuples of the model's inputs;
        equal shapes compile once.
      form: What is written; any format but `orbax`.
      again: On what each transform is calibrated. `each_block`: on what the blocks before give
        that it has transformed already, as GPTQ is published, and as `pipeline(...,
        block_by_block=True)`. `each_step`: on the model that the transform before it left, as
        `pipeline`. `never`: all on the original model, as `calibrate` and `apply` of a `chain`.
      key: Randomness; every block gets a key of its own.
      memory: Most bytes that the process may hold; less than a block needs is refused.
      recipe: What is done, in words. A run is resumed only where this, the transforms' names and
        the representations that they give are the same: settings that none of them shows, such as
        `damping`, belong in it.
      dequantize: Whether a quantized source is read as the dense weights that it stands for.
      overwrite: Whether an existing checkpoint may be replaced, at the end.
      resume: Whether to go on where a killed run stopped; the result is the same.
      progress: Called with (task, done, total), of blocks and of tensors written.

    Returns:
      The folder.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      OSError: If the disk has no room for what the layers pass on.
      TypeError: If `batches` is a single batch.
      ValueError: If a transform looks at all layers together or changes what lies outside them, a
        leaf does not suit it or the format, or the memory does not suffice; before any work.

    Example:
      >>> import json, tempfile
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> config = jw.models.LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2
      ... )
      >>> tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> folder = Path(tempfile.mkdtemp())
      >>> jw.checkpoint.write_safetensors(
      ...     folder / "model",
      ...     jw.models.checkpoint_from_params(params, config),
      ...     files={"config.json": json.dumps(jw.models.config_to_dict(config))},
      ... )
      >>> tx = jw.quantize.gptq(bits=4, group_size=32)
      >>> out = transform_in_blocks(folder / "model", folder / "small", tx, [tokens])
      >>> jw.models.load_pretrained(out).params["layers"]["mlp"]["up"]["kernel"].bits
      4

    Source: Frantar et al. 2023, arXiv:2210.17323, section 4 (block by block, on quantized inputs).
    """
    steps = [transforms] if isinstance(transforms, Transform) else list(transforms)
    _check(steps, form, again)
    refuse_one_batch(_NAME, batches)
    check_destination(_NAME, destination, overwrite=overwrite, directory=True)
    refuse_unrelated(_NAME, Path(destination))
    layers = Layers(_NAME, Path(source), dequantize=dequantize)
    run = BlockRun(_NAME, layers, steps, batches, again=again, key=key, memory=memory)
    becomes = _check_plan(layers, run, steps, form)
    identity = {
        "source": layers.pretrained.source.fingerprint(sampled=True),
        "transforms": [tx.name for tx in steps],
        "representations": becomes,
        "recipe": recipe,
        "batches": _digest(batches),
        "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist(),
        "form": form,
        "again": again,
    }
    report = progress or (lambda task, done, total: None)
    said = {"name": _NAME, "transforms": identity["transforms"], "recipe": recipe}
    provenance = Provenance.collect(recipe=said, source=identity["source"])
    with work_folder(_NAME, destination, identity=identity, overwrite=overwrite, resume=resume) as (
        folder,
        kept,
    ):
        files = run.run(kept, look=lambda path, layer, old, new: None, progress=report)
        inner = folder / f"{form}.partial"
        write_blocks(inner, form, layers, files, provenance=provenance, progress=report)
        for entry in sorted(inner.iterdir()):
            entry.rename(folder / entry.name)
        inner.rmdir()
    return Path(destination)


def _check(steps: Sequence[Transform], form: Format, again: Again) -> None:
    if not steps or not all(isinstance(tx, Transform) for tx in steps):
        raise TypeError(
            f"{_NAME}: transforms must be a transform or a sequence of them, such as "
            "quantize.gptq(bits=4)."
        )
    for name, value, known in (("form", form, FORMATS), ("again", again, get_args(Again))):
        if value not in known:
            raise ValueError(f"{_NAME}: {name}={value!r} is unknown. Choose one of {known}.")
    refuse_orbax(_NAME, form)


def _check_plan(
    layers: Layers, run: BlockRun, steps: Sequence[Transform], form: Format
) -> dict[LeafPath, str]:
    """Tries everything on shapes; says what each leaf that changes will be."""
    model = layers.pretrained
    # Every step gets statistics of what reaches it: here shapes alone count.
    tx = chain(*(dataclasses.replace(step, moves_inputs=False) for step in steps))
    found, leaves = plan_and_leaves(tx, model.params, layout=run.programs.layout)
    refuse_outside(_NAME, layers, [leaf.path for leaf in found.changed])
    check_formats_of_shapes([form], model.config, leaves)
    return {leaf.path: leaf.after for leaf in found.changed}


def _digest(batches: Sequence[Any]) -> str:
    total = hashlib.sha256()
    for array in jax.tree.leaves(list(batches)):
        array = np.ascontiguousarray(array)
        total.update(f"{array.shape} {array.dtype}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
