"""Runs a transform over a checkpoint that may be larger than memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxweights.checkpoint import Checkpoint, open_checkpoint
from jaxweights.core._layout import Layout, conventional_layout, is_vector
from jaxweights.core._paths import check_pattern, fail, matching, nearest
from jaxweights.core._transform import Transform
from jaxweights.stream._delta import DeltaRanks, delta_job
from jaxweights.stream._delta_settings import can_slice, delta_settings
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._meter import Progress
from jaxweights.stream._run import Format, Streamed, stream_jobs
from jaxweights.stream._transform import transform_job
from jaxweights.weights._axes import Axes

_NAME = "stream.transform_checkpoint"
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def transform_checkpoint(
    tx: Transform,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    models: Sequence[str | os.PathLike[str]] = (),
    match: str = ".*",
    layout: Mapping[str, Axes] | None = None,
    seed: int = 0,
    recipe: str = "",
    format: Format = "safetensors",
    memory: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Streamed:
    """Transforms a checkpoint tensor by tensor, without holding it in memory.

    Tensors are read, transformed and written at the same time, in slices where the transform works
    entry by entry or is a merge: what merges must know of whole tensors, such as thresholds and
    norms, is found in passes before, and DELLA and arcee fusion take whole rows. What it represents
    (a quantized weight) is written as the dense values that it stands for, which other tools read.

    Args:
      tx: A transform that looks at one leaf at a time and reads no statistics, perhaps another one
        for each leaf by the rules of `partition`; or TIES or Breadcrumbs over the whole tree, whose
        thresholds are found in passes before.
      source: The checkpoint, of any format that is read here.
      destination: The folder to make.
      models: Other checkpoints with the same names, for merges.
      match: Regular expression for the whole names of the tensors that are transformed; others are
        copied.
      layout: Axes by patterns of names. By default matrices of safetensors and GGUF files are
        `(out, in)`, as torch has them; those of parameter trees, whose names have slashes, are as
        `conventional_layout` says.
      seed: Of random transforms.
      recipe: What is done, in words; it is written into the provenance and, with the transform's
        name, decides whether a run can be resumed.
      format: `"safetensors"`, or `"orbax"`, which `load_tree` reads: with the tree of an Orbax
        source, or as a dict by name.
      memory: Most bytes that the process may hold; None leaves tensors that cannot be cut what
        they need.
      max_shard_bytes: Most bytes of tensors a file of safetensors.
      overwrite: Whether an existing checkpoint may be replaced, at the end.
      resume: Whether to go on where a killed run stopped.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      What was read and written.

    Raises:
      ValueError: If the transform looks at the whole tree or reads statistics, checkpoints do not
        fit each other, or a leaf does not suit it.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxweights.checkpoint import write_safetensors
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> write_safetensors(folder / "model", {"up.weight": np.ones((8, 64), np.float32)})
      >>> tx = jw.quantize.round_to_nearest(bits=4, group_size=32)
      >>> transform_checkpoint(tx, folder / "model", folder / "small").tensors
      1
    """
    if resume and not recipe:
        raise ValueError(
            f"{_NAME}: resume=True goes on with an earlier run's tensors, and only recipe= tells "
            "whether its settings were these. Pass recipe, the settings in words, to both runs."
        )
    main, others = open_checkpoint(source), [open_checkpoint(model) for model in models]
    fail(_NAME, [reason for c in (main, *others) if (reason := why_unread(c)) is not None])
    check_pattern(_NAME, match)
    chosen = {name for name in matching(match, main.names) if str(main.dtype(name)) in _FLOATS}
    if not chosen:
        raise ValueError(
            f"{_NAME}: match={match!r} matches no floating tensor. The nearest names: "
            f"{nearest(match, main.names)}."
        )
    packed = [
        n for n in main.names if main.dtype(n).itemsize == 1 and "float" in main.dtype(n).name
    ]
    fail(_NAME, [f"{name!r}: is {main.dtype(name)}. Convert it to bfloat16." for name in packed])
    fail(_NAME, _misfits(main, others, models))
    axes = _layout(main, layout)
    flat = {name: jax.ShapeDtypeStruct(main.shape(name), main.dtype(name)) for name in chosen}
    # Where rules name leaves, each of them must find some.
    tx.init({name: flat[name] for name in main.names if name in chosen})
    on = {name: tx.on(name) for name in flat}
    fail(
        _NAME, sorted({reason for own in on.values() if (reason := _why_not(own, tx)) is not None})
    )

    delta = tx.settings if can_slice(tx.settings) else None
    ranks = None
    if delta is not None and tx.scope == "tree":
        entries = sum(math.prod(main.shape(name)) for name in chosen)
        ranks = DeltaRanks(delta_settings(delta, [str(m) for m in models], seed), entries)

    def job(name: str) -> Job:
        operands = [Operand(main, name, str(source))]
        if name not in chosen:
            return Job(name, main.shape(name), main.dtype(name), tuple(operands))
        operands += [Operand(o, name, str(m)) for o, m in zip(others, models, strict=True)]
        dtype = main.dtype(name)
        if delta is not None:
            settings = delta_settings(delta, [str(m) for m in models], seed)
            return delta_job(name, main.shape(name), dtype, operands, settings, ranks)
        own = Layout(tuple((path, found) for path, found in axes.entries if path == name))
        return transform_job(name, operands, on[name], dtype=dtype, layout=own, seed=seed)

    settings = {"transform": tx.name, "recipe": recipe, "match": match, "seed": seed}
    prints = [checkpoint.fingerprint(sampled=True) for checkpoint in (main, *others)]
    layout_print = hashlib.sha256(repr(axes.entries).encode()).hexdigest()
    return stream_jobs(
        _NAME,
        [job(name) for name in main.names],
        destination,
        recipe=settings,
        identity={"settings": settings, "checkpoints": prints, "layout": layout_print},
        files=dict(main.files),
        format=format,
        tree_of=main,
        memory=memory,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def why_unread(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint's tensors are not the weights that they look like; None if they are."""
    if checkpoint.unread is None:
        return None
    return (
        f"'{checkpoint.path}': the quantization_config of its config.json: {checkpoint.unread}. "
        "Give a dense checkpoint."
    )


def _why_not(tx: Transform, whole: Transform) -> str | None:
    """Why what is done to one leaf cannot be done without the others; None if it can."""
    if tx.scope in ("block", "tree") and not (tx is whole and can_slice(tx.settings)):
        return (
            f"{tx.name} looks at the whole tree, so it cannot run tensor by tensor. Rank by leaf "
            "instead, or apply it in memory."
        )
    if tx.reads_statistics:
        return (
            f"{tx.name} reads statistics, which are of a model in memory. Use `pipeline`, or a "
            "method that needs no data."
        )
    return None


def _misfits(
    main: Checkpoint, others: Sequence[Checkpoint], models: Sequence[str | os.PathLike[str]]
) -> list[str]:
    """How other checkpoints differ from the one that is transformed."""
    problems = []
    for other, path in zip(others, models, strict=True):
        names = set(other.names)
        lacking = [name for name in main.names if name not in names]
        if lacking:
            problems.append(f"'{path}' lacks {lacking[:5]}, which '{main.path}' has.")
        problems += [
            f"{name!r}: is {other.shape(name)} in '{path}' but {main.shape(name)} in '{main.path}'."
            for name in main.names
            if name in names and other.shape(name) != main.shape(name)
        ]
    return problems


def _layout(main: Checkpoint, stated: Mapping[str, Axes] | None) -> Layout:
    """Axes of the matrices: what is stated wins over the convention of the format."""
    leaves = {name: np.broadcast_to(np.float32(0), main.shape(name)) for name in main.names}
    if not main.is_torch:
        found = conventional_layout(leaves)
    else:
        found = Layout.of({n: _torch_axes(x.ndim) for n, x in leaves.items() if _is_matrix(n, x)})
    chosen: dict[str, Axes] = {}
    problems = []
    for pattern, axes in (stated or {}).items():
        check_pattern(_NAME, pattern)
        matched = matching(pattern, main.names)
        chosen |= dict.fromkeys(matched, axes)
        if not matched:
            problems.append(
                f"layout: pattern {pattern!r} matches no tensor. The nearest names: "
                f"{nearest(pattern, main.names)}."
            )
    fail(_NAME, problems)
    return found.with_stated(chosen)


def _is_matrix(name: str, leaf: np.ndarray) -> bool:
    """Linear layers and convolutions; which axes of a stack of experts are which must be stated."""
    return leaf.ndim in (2, 4) and not is_vector(name, leaf)


def _torch_axes(rank: int) -> Axes:
    """Outputs first, then inputs and, in convolutions, places."""
    return Axes(inputs=tuple(range(1 - rank, 0)), outputs=(-rank,))
