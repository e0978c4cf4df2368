"""Runs a configuration, or says what it would do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxweights.checkpoint import Checkpoint
from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._config import MergeConfig, load_merge_config
from jaxweights.recipes.mergekit._evaluate import Evaluation, Evaluator, Scores
from jaxweights.recipes.mergekit._files import result_files
from jaxweights.recipes.mergekit._method import Compat
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model, open_model
from jaxweights.recipes.mergekit._plan import PlannedTensor, adds_base
from jaxweights.recipes.mergekit._plan_document import plan_document
from jaxweights.recipes.mergekit._vocabulary import Vocabulary, align_vocabularies
from jaxweights.stream._memory import resident_bytes
from jaxweights.stream._meter import Progress
from jaxweights.stream._run import Format, Streamed, stream_jobs

_NAME = "jaxweights merge"


@dataclasses.dataclass(frozen=True)
class Merged(Streamed):
    """What a merge did.

    Attributes:
      scores: Perplexities of the models and of the result, where they were asked for.
    """

    scores: Scores | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a configuration does, tensor by tensor.

    Attributes:
      tensors: One for each tensor of the result.
      differs: What is done otherwise than mergekit does it.
    """

    tensors: tuple[PlannedTensor, ...]
    differs: tuple[str, ...]


def explain_merge(
    config: str | os.PathLike[str],
    *,
    compat: Compat = "fixed",
    missing: Literal["error", "take"] = "error",
    seed: int = 0,
) -> Explanation:
    """Resolves every parameter of every tensor without reading any values.

    Args:
      config: As in `run_merge`.
      compat: As in `run_merge`.
      missing: As in `run_merge`.
      seed: As in `run_merge`.

    Returns:
      The tensors of the last document, with their methods, inputs and parameters.

    Example:
      >>> import json, pathlib, tempfile
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> files = {"config.json": json.dumps({"model_type": "llama"})}
      >>> for name, value in (("first", 1.0), ("second", 3.0)):
      ...     tensors = {"lm_head.weight": jnp.full((4, 2), value)}
      ...     jw.checkpoint.write_safetensors(folder / name, tensors, files=files)
      >>> config = folder / "merge.yml"
      >>> text = "merge_method: linear, models: [{model: first}, {model: second}]"
      >>> _ = config.write_text("{" + text + ", parameters: {weight: 0.5}, dtype: float32}")
      >>> [(tensor.job.name, tensor.method) for tensor in explain_merge(config).tensors]
      [('lm_head.weight', 'linear')]
    """
    prepared = _prepare(config, compat, missing, seed)
    return Explanation(tuple(prepared.tensors), _differences(prepared.config, compat))


def run_merge(
    config: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    compat: Compat = "fixed",
    missing: Literal["error", "take"] = "error",
    seed: int = 0,
    format: Format = "safetensors",
    memory: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    resume: bool = False,
    report: str | os.PathLike[str] | None = None,
    evaluate: Evaluation | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merges checkpoints as a mergekit configuration says, without holding them in memory.

    Args:
      config: A YAML file as mergekit reads it.
      destination: The folder to make, with tensors, config and tokenizer.
      compat: `"mergekit"` repeats its habits where they lose something; `explain_merge` names them.
      missing: `"take"` merges a tensor that some models lack from those that have it.
      seed: Randomness of DARE and DELLA.
      format: `"safetensors"`, or `"orbax"`, which `load_tree` and `load_pretrained` read.
      memory: Most bytes that the process may hold. None lets a tensor that its method cannot cut
        have what it needs.
      max_shard_bytes: Most bytes of tensors a file of safetensors.
      overwrite: Whether an existing checkpoint and report may be replaced, at the end.
      resume: Whether to go on where a killed run with the same configuration stopped.
      report: An HTML file to make, about how the models' deltas relate; the models are read once
        more for it, after the merge.
      evaluate: A text to score the models and the merged one on, after the merge; whole models are
        held in memory for it, two at a time, with a curve three.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      What was read and written.

    Raises:
      RecipeError: If the configuration is wrong, or models do not fit it or each other.
      ValueError: If values are not finite, or a tensor does not fit into the memory.

    Example:
      >>> import json, pathlib, tempfile
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> files = {"config.json": json.dumps({"model_type": "llama"})}
      >>> for name, value in (("first", 1.0), ("second", 3.0)):
      ...     tensors = {"lm_head.weight": jnp.full((4, 2), value)}
      ...     jw.checkpoint.write_safetensors(folder / name, tensors, files=files)
      >>> config = folder / "merge.yml"
      >>> text = "merge_method: linear, models: [{model: first}, {model: second}]"
      >>> _ = config.write_text("{" + text + ", parameters: {weight: 0.5}, dtype: float32}")
      >>> _ = run_merge(config, folder / "merged")
      >>> jw.checkpoint.open_checkpoint(folder / "merged").read("lm_head.weight")[0]
      array([2., 2.], dtype=float32)
    """
    check_destination(_NAME, destination, overwrite=overwrite, directory=True)
    refuse_unrelated(_NAME, destination)
    if report is not None:
        from jaxweights.recipes.mergekit._report import check_report

        check_report(report, destination, config, overwrite=overwrite)
    if evaluate is not None and memory is not None:
        raise ValueError(
            f"{_NAME}: memory={memory} bounds what is held, but scores need two whole models at a "
            "time, with a curve three. Give a memory, or a text to evaluate."
        )
    prepared = _prepare(config, compat, missing, seed)
    evaluator = None
    if evaluate is not None:
        evaluator = Evaluator(evaluate, prepared.config, prepared.models, prepared.files)
    text = Path(config).read_text(encoding="utf-8")
    limit = None if memory is None else memory - resident_bytes()
    first = prepared.models[prepared.config.models[0]].tensors
    done = stream_jobs(
        _NAME,
        [tensor.job for tensor in prepared.tensors],
        destination,
        recipe={"merge": text, "compat": compat, "seed": seed},
        identity={
            "configuration": hashlib.sha256(text.encode()).hexdigest(),
            "options": {"compat": compat, "missing": missing, "seed": seed},
            "models": {model.label: model.fingerprint for model in prepared.models.values()},
        },
        files={
            **prepared.files,
            "mergekit_config.yml": text,
        },
        format=format,
        tree_of=first if isinstance(first, Checkpoint) else None,
        max_shard_bytes=max_shard_bytes,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
    scores = None if evaluator is None else evaluator.scores(destination, progress)
    merged = Merged(**vars(done), scores=scores)
    if report is not None:
        _report(report, prepared, text, merged, overwrite=overwrite, limit=limit, progress=progress)
    return merged


def _report(
    report: str | os.PathLike[str],
    prepared: _Prepared,
    text: str,
    done: Merged,
    *,
    overwrite: bool,
    limit: int | None,
    progress: Progress | None,
) -> None:
    from jaxweights.recipes.mergekit._delta_requests import delta_requests
    from jaxweights.recipes.mergekit._report import write_report
    from jaxweights.stream._delta_stats import delta_stats

    requests = delta_requests(prepared.config, prepared.models, prepared.tensors)
    # Half of what the merge was allowed, whose memory is used again: figures need some, too.
    half = None if limit is None else limit // 2
    found = delta_stats(requests, limit=half, progress=progress)
    write_report(report, prepared.config, text, found, done, done.scores, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    config: MergeConfig
    models: dict[ModelRef, Model]
    tensors: Sequence[PlannedTensor]
    vocabulary: Vocabulary | None

    @property
    def files(self) -> dict[str, Any]:
        """What travels along with the result."""
        return result_files(self.config, self.models, self.tensors, self.vocabulary)


def _prepare(
    path: str | os.PathLike[str], compat: Compat, missing: Literal["error", "take"], seed: int
) -> _Prepared:
    """Plans the documents in their order; what an earlier one makes is a model of later ones."""
    configs = load_merge_config(path, compat=compat)
    made: dict[str, Model] = {}
    prepared = None
    for i, config in enumerate(configs):
        opened = _open(config, made, Path(path).parent)
        models, vocabulary = align_vocabularies(config, opened)
        tensors = plan_document(config, models, compat=compat, missing=missing, seed=seed)
        prepared = _Prepared(config, models, tensors, vocabulary)
        if i < len(configs) - 1:
            if config.name is None:
                raise RecipeError(
                    f"{config.file}:{config.line}: has no 'name', so no later document can use it. "
                    "Name it."
                )
            made[config.name] = _virtual(config, prepared)
    assert prepared is not None
    return prepared


def _open(config: MergeConfig, made: Mapping[str, Model], beside: Path) -> dict[ModelRef, Model]:
    models, problems = {}, []
    for ref in config.models:
        try:
            if ref.path in made:
                models[ref] = made[ref.path]
            else:
                models[ref] = open_model(str(ref), ref.path, beside)
            if ref.lora is not None:
                from jaxweights.recipes.mergekit._lora import with_adapter

                models[ref] = with_adapter(models[ref], str(ref), ref.lora, beside)
        except (OSError, ValueError) as error:
            problems.append(f"{config.file}:{config.line}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return models


def _virtual(config: MergeConfig, prepared: _Prepared) -> Model:
    """The result of a document as a model that is made when it is read."""
    from jaxweights.stream._virtual import Made

    assert config.name is not None
    made = Made([tensor.job for tensor in prepared.tensors])
    files = prepared.files
    identity = json.dumps([model.fingerprint for model in prepared.models.values()])
    return Model(
        config.name,
        made,
        made.names,
        json.loads(str(files.get("config.json", "{}"))),
        files,
        f"made:{hashlib.sha256(identity.encode()).hexdigest()}",
    )


def _differences(config: MergeConfig, compat: Compat) -> tuple[str, ...]:
    found = list(METHODS[config.method].differs)
    if any(module.name is not None for module in config.modules):
        found.append(
            "Tensors of modules that are not named are taken over from the first model; mergekit "
            "leaves them out."
        )
    unused = sorted(config.unused)
    if unused:
        found.append(f"Ignored, as mergekit does: {', '.join(unused)}.")
    if compat == "fixed" and adds_base(config):
        found.append(
            f"{config.base_model} is not among the models, so it is not merged; mergekit merges it."
        )
    if compat == "fixed":
        found.append(
            "The last value of a list reaches the final norm and the head; mergekit gives them "
            "the first one."
        )
    return tuple(found)
