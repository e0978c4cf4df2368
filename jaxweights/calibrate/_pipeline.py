"""pipeline: stages on the host, each calibrated on what the one before it left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxweights.calibrate._blocks import transform_blocks
from jaxweights.calibrate._calibrate import Batch, Mask, Progress, calibrate
from jaxweights.core import Params, Transform, apply
from jaxweights.core._apply import LayoutLike
from jaxweights.core._batches import refuse_one_batch
from jaxweights.lift import lift
from jaxweights.lift._infer_layout import trace_model


def pipeline(
    fn: Callable[..., Any],
    params: Params,
    batches: Sequence[Batch] | Callable[[], Iterable[Batch]],
    stages: Sequence[Transform],
    *,
    block_by_block: bool = False,
    loss: Callable[..., jax.Array] | None = None,
    layout: LayoutLike = None,
    mask: Mask | None = None,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> Params:
    """Applies stages one after another, calibrating anew before each that reads statistics.

    Where `chain` gives every transform the statistics of the original model, a pipeline gives each
    stage those of the model that reaches it, represented weights included. With
    `block_by_block`, a stage goes further, as GPTQ and SparseGPT are published: the model's
    scan over layers is run on the host, and each layer is calibrated on the outputs of the layers
    already transformed, with the statistics of one layer in memory at a time.

    Args:
      fn: The model, called as `fn(params, *batch)` for a tuple or list, else `fn(params, batch)`.
      params: Its parameters.
      batches: Calibration batches, read once per stage: a sequence, or a function that returns a
        new iterator.
      stages: Transforms.
      block_by_block: Whether stages that read statistics go through the layers in sequence. The
        model must scan over its stacked layers.
      loss: As in `calibrate`.
      layout: As in `calibrate`.
      mask: As in `calibrate`.
      key: Randomness, folded with each stage's number.
      progress: Called with (what, done, total).

    Returns:
      The transformed tree.

    Raises:
      TypeError: If `batches` is a single batch.
      ValueError: If `batches` can be read only once, or the model has no scan to go through.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> stages = [jw.sparsify.wanda(sparsity=0.5), jw.quantize.gptq(bits=4)]
      >>> pipeline(model, params, [jnp.eye(8)], stages)["kernel"].shape
      (8, 4)
    """
    refuse_one_batch("pipeline", batches)
    if not callable(batches) and iter(batches) is batches:
        raise ValueError(
            "pipeline: batches is an iterator, which every stage after the first would find empty. "
            "Pass a list, or a function that returns a new iterator."
        )
    read = batches if callable(batches) else lambda: batches
    for number, stage in enumerate(stages):
        stage_key = None if key is None else jax.random.fold_in(key, number)
        needs = stage.needs(params) if stage.reads_statistics else {}
        if needs and block_by_block:
            params = transform_blocks(
                fn,
                params,
                list(read()),
                stage,
                layout=layout,
                mask=mask,
                key=stage_key,
                progress=progress,
            )
            continue
        if needs:
            stats = calibrate(
                fn,
                params,
                read(),
                needs=needs,
                loss=None if loss is None else lift(loss),
                layout=layout,
                mask=mask,
                progress=progress,
            )
            resolved: LayoutLike = stats.layout
        else:
            stats = None
            batch = next(iter(read()))
            inputs = batch if isinstance(batch, tuple | list) else (batch,)
            resolved = layout or trace_model(fn, params, inputs).layout
        params = apply(
            stage, params, stats=stats, key=stage_key, layout=resolved, progress=progress
        )
    return params
