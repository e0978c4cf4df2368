"""Where a run keeps what it has done until the checkpoint is written, and goes on from it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxweights.checkpoint import Provenance
from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._disk import remove
from jaxweights.checkpoint._provenance import library_versions
from jaxweights.core._paths import fail
from jaxweights.models._convert import name_map
from jaxweights.models._load import carried_tensors
from jaxweights.recipes._download import Progress
from jaxweights.recipes._write import Format, kept_activations, write_lazily
from jaxweights.recipes.onload._block_files import BlockFiles
from jaxweights.recipes.onload._layers import Layers

_BLOCKS, _IDENTITY = ".blocks", "identity.json"


@contextlib.contextmanager
def work_folder(
    asker: str,
    destination: str | os.PathLike[str],
    *,
    identity: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
) -> Iterator[tuple[Path, Path]]:
    """Makes a folder that appears under its name when all is written, and outlives a killed run.

    Args:
      asker: Start of the error messages.
      destination: The folder to make.
      identity: What decides about the result, as JSON: a run goes on with what an earlier one left
        only if theirs are equal.
      overwrite: Whether an existing folder may be replaced, at the end.
      resume: Whether to go on where a killed run stopped.

    Yields:
      The folder to fill, and one in it for what is kept meanwhile.
    """
    here = json.loads(json.dumps({**identity, "versions": library_versions()}))
    with atomic(asker, destination, directory=True, overwrite=overwrite, resume=resume) as folder:
        kept = folder / _BLOCKS
        for entry in folder.iterdir():  # what was written of the checkpoint is written again
            if entry != kept or not resume:
                remove(entry)
        about = kept / _IDENTITY
        earlier = _earlier(about)
        if earlier is not None and earlier != here:
            keys = sorted(k for k in earlier.keys() | here.keys() if earlier.get(k) != here.get(k))
            raise ValueError(
                f"{asker}: what was left of an earlier run for '{destination}' differs in "
                f"{', '.join(keys)}, so it cannot be gone on with. Start anew, without resuming."
            )
        kept.mkdir(exist_ok=True)
        about.write_text(json.dumps(here), encoding="utf-8")
        yield folder, kept
        remove(kept)


def _earlier(about: Path) -> dict[str, Any] | None:
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def refuse_orbax(asker: str, form: Format) -> None:
    """Refuses the format whose leaves are stacks of all layers."""
    if form == "orbax":
        raise ValueError(
            f"{asker}: form='orbax' (native) stacks all layers of a leaf, for which all of them "
            "must be in memory. Choose compressed-tensors, gptq, awq, gguf or safetensors."
        )


def write_blocks(
    destination: Path,
    form: Format,
    layers: Layers,
    files: BlockFiles,
    *,
    provenance: Provenance | None,
    progress: Progress,
) -> None:
    """Writes a checkpoint of the blocks that are done and what was left as it is.

    Args:
      destination: A folder to make.
      form: Any format but `orbax`.
      layers: The model.
      files: The blocks.
      provenance: How they came about.
      progress: Called with (task, tensors read, tensors in all).
    """
    from jaxweights.checkpoint.exchange._module import LazyWeight

    source, config = layers.pretrained.source, layers.pretrained.config
    changed: dict[Any, Callable[[], Any]] = {
        (path, layer): lambda layer=layer, path=path: files.read(layer, path)
        for layer in range(layers.count)
        for path in files.paths(layer)
    }
    convention = "gguf" if form == "gguf" else "huggingface"
    tensors = layers.tensors(convention, changed, dense=form == "safetensors")
    done, total = 0, 2 * len(tensors)  # for the checks, and to be written

    def watched(tensor: LazyWeight) -> LazyWeight:
        def read() -> Any:
            nonlocal done
            value = tensor.read()
            done += 1
            progress("Writing weights", min(done, total), total)
            return value

        return LazyWeight(read)

    carried: dict[str, Any] = {}
    if source.format != "gguf" and form != "gguf":
        carried = carried_tensors(source, name_map(config, "huggingface"))
        carried |= kept_activations(form, source)
    write_lazily(
        destination,
        form,
        {name: watched(tensor) for name, tensor in tensors.items()},
        layers.pretrained,
        carried=carried,
        provenance=provenance,
    )


def refuse_outside(asker: str, layers: Layers, changed: list[str]) -> None:
    """Refuses changes of what no block holds."""
    fail(
        asker,
        [
            f"{path!r}: lies outside the layers, and is left as it is where the model is changed "
            "block by block. Leave it out (`except` in a recipe, --skip), or run without a limit "
            "of memory."
            for path in changed
            if path not in layers.stacked
        ],
    )
