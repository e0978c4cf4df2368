"""Runs jobs into a checkpoint that other tools read, and notes where it came from."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxweights.checkpoint._checkpoint import Checkpoint
from jaxweights.checkpoint._provenance import library_versions
from jaxweights.checkpoint._write_safetensors import plan_tensors
from jaxweights.stream._destination import Destination, Files, open_destination
from jaxweights.stream._jobs import Job
from jaxweights.stream._meter import Progress
from jaxweights.stream._orbax_files import OrbaxFiles, refuse_taken
from jaxweights.stream._pipeline import run_jobs
from jaxweights.stream._safetensors_files import SafetensorsFiles

Format = Literal["safetensors", "orbax"]
PROVENANCE = "jaxweights-provenance.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Streamed:
    """What a stream did.

    Attributes:
      destination: The folder that was made.
      tensors: Number of tensors in it.
      resumed: Number of them that an earlier run had finished.
      bytes_read: Bytes of operands that this run read, those of surveys counted once.
      bytes_written: Bytes of tensors that this run wrote.
      seconds: How long it took.
      checksums: xxh3 checksums of what was written, by name.
    """

    destination: Path
    tensors: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    checksums: dict[str, str]


def stream_jobs(
    function: str,
    jobs: Sequence[Job],
    destination: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any],
    identity: Mapping[str, Any],
    files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
    format: Format = "safetensors",
    tree_of: Checkpoint | None = None,
    max_shard_bytes: int = 5 * 10**9,
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Streamed:
    """Makes a checkpoint, tensor by tensor.

    Args:
      function: Start of the error messages.
      jobs: One for each tensor, in the order of the shards.
      destination: The folder to make.
      recipe: What is done, as JSON; it is written into the provenance.
      identity: What decides about the bytes of the result, besides the jobs' names and shapes: a
        run is resumed only where all of it is equal.
      files: Files that travel along.
      format: `"safetensors"`, or `"orbax"` for what `load_tree` reads.
      tree_of: A checkpoint whose tree the result has in Orbax, where it has the same tensors.
      max_shard_bytes: Most bytes of tensors a file of safetensors.
      memory: Most bytes that the process may hold.
      overwrite: Whether an existing checkpoint may be replaced, at the end.
      resume: Whether to go on where a killed run stopped.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      What was done.
    """
    if format not in get_args(Format):
        raise ValueError(
            f"{function}: format={format!r} cannot be written. Choose one of {get_args(Format)}."
        )
    started = time.perf_counter()
    plans = plan_tensors({job.name: job for job in jobs})
    complete = {
        **identity,
        "versions": library_versions(),
        "tensors": [[job.name, list(job.shape), str(job.dtype)] for job in jobs],
        "format": format,
    }
    target_files: Files
    if format == "orbax":
        refuse_taken(function, files or {})
        target_files = OrbaxFiles(plans, tree_of)
    else:
        target_files = SafetensorsFiles(plans, max_shard_bytes)
        complete["shards"] = max_shard_bytes
    places = [f"{operand.label}/{operand.name}" for job in jobs for operand in job.operands]

    def companions(target: Destination) -> dict[str, Any]:
        provenance = {
            "format": _FORMAT,
            "recipe": dict(recipe),
            "versions": library_versions(),
            # In the order of the jobs, whichever thread was faster.
            "inputs": {p: target.inputs[p] for p in places if p in target.inputs},
            "outputs": {job.name: target.checksums[job.name] for job in jobs},
        }
        text = json.dumps(provenance, indent=1, ensure_ascii=False)
        return {**(files or {}), PROVENANCE: text + "\n"}

    with open_destination(
        function,
        destination,
        target_files,
        identity=complete,
        companions=companions,
        overwrite=overwrite,
        resume=resume,
    ) as target:
        resumed = set(target.done)
        run_jobs(function, jobs, target, memory=memory, progress=progress)
    made = [job for job in jobs if job.name not in resumed]
    return Streamed(
        destination=Path(destination),
        tensors=len(jobs),
        resumed=len(resumed),
        bytes_read=sum(job.bytes_read for job in made),
        bytes_written=sum(job.nbytes for job in made),
        seconds=time.perf_counter() - started,
        checksums=dict(target.checksums),
    )
