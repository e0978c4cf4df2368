"""Layer after layer: a scanned model's statistics, one layer's in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.calibrate._calibrate import (
    Batch,
    Mask,
    Progress,
    _arguments,
    _assign,
    _merged_layout,
    calibrate,
    compared,
    observing,
    probed,
    refuse_incomplete,
)
from jaxweights.calibrate._mixed_groups import refuse_mixed_groups
from jaxweights.calibrate._probe import combine_records, neutral_record
from jaxweights.calibrate._reference import Reference
from jaxweights.calibrate._scanned import Leaves, ScannedModel, array_leaves, find_layers
from jaxweights.core import (
    Context,
    Layout,
    Needs,
    Params,
    Path,
    Statistic,
    Stats,
    Transform,
    flatten,
    unflatten,
)
from jaxweights.core._apply import LayoutLike
from jaxweights.lift import _compat
from jaxweights.lift._infer_layout import arrays_of, trace_model
from jaxweights.lift._walk import Walk

Arrays = Sequence[Any]
Wanted = tuple[tuple[Path, frozenset[Statistic]], ...]


class LayerInput(NamedTuple):
    """What a layer reads of a batch.

    Attributes:
      model: The model of inputs of its shapes.
      shared: What all layers share.
      carried: What the layer before gave.
      keep: Which tokens count; None for all.
      original: What the layer before would have given, had no layer been changed; None where no
        statistic compares the two.
    """

    model: ScannedModel
    shared: Arrays
    carried: Arrays
    keep: Any = None
    original: Arrays | None = None


class BlockPrograms:
    """The compiled programs of a model's layers, which serve all of them.

    Args:
      fn: The model.
      params: Its parameters, which may be abstract.
      batch: The first batch, or its shapes.
      layout: As in `calibrate`.

    Attributes:
      model: The model of inputs of the first batch's shapes, in parts.
      layout: Axes of its leaves.
    """

    def __init__(
        self, fn: Callable[..., Any], params: Params, batch: Batch, layout: LayoutLike = None
    ):
        """Takes the model apart and compiles nothing yet."""
        self._fn = fn
        flat, self._structure = flatten(params)
        self._flat = flat | {path: _compat.shape_of(x) for path, x in arrays_of(flat).items()}
        trace = trace_model(fn, params, _arguments(batch))
        refuse_mixed_groups(trace, self._flat)
        self.layout = _merged_layout(trace.layout, layout, list(self._flat))
        self._owners = dict(trace.owners)
        self._models: dict[Any, ScannedModel] = {}
        self.model = self.of(batch)
        self._enter = jax.jit(_enter, static_argnames="model")
        self._share = jax.jit(_share, static_argnames="model")
        self._advance = jax.jit(_advance, static_argnames="model")
        self._collect = jax.jit(
            self._add_records, static_argnames=("wanted", "model"), donate_argnums=0
        )

    def of(self, batch: Batch) -> ScannedModel:
        """The model of inputs of a batch's shapes; it is traced once for each."""
        shapes = tuple((x.shape, str(x.dtype)) for x in array_leaves(batch))
        if shapes not in self._models:
            self._models[shapes] = find_layers(self._fn, self._flat, self._structure, batch)
        return self._models[shapes]

    def enter(self, leaves: Leaves, batch: Batch) -> list[jax.Array]:
        """What the first layer gets of a batch; of the leaves it needs `model.carry.reads`."""
        return self._enter(leaves, array_leaves(batch), model=self.of(batch))

    def read(self, leaves: Leaves, batch: Batch, carried: Arrays, keep: Any = None) -> LayerInput:
        """What a layer reads of a batch; of the leaves it needs `model.shared.reads`."""
        model = self.of(batch)
        return LayerInput(
            model, self._share(leaves, array_leaves(batch), model=model), carried, keep
        )

    def read_shapes(self, leaves: Leaves, batch: Batch) -> LayerInput:
        """Shapes of what the first layer reads of a batch."""
        model, given = self.of(batch), array_leaves(batch)
        enter, share = (functools.partial(part, model=model) for part in (_enter, _share))
        shared = jax.eval_shape(share, _of(leaves, model.shared.reads), given)
        carried = jax.eval_shape(enter, _of(leaves, model.carry.reads), given)
        return LayerInput(model, shared, carried)

    def compares(self, needs: Needs) -> bool:
        """Whether a statistic of the layers asks for `LayerInput.original`."""
        return bool(compared({path: needs[path] for path in self.model.inside if path in needs}))

    def advance(self, block: Leaves, one: LayerInput, layer: int) -> list[jax.Array]:
        """What a layer gives to the next one."""
        index = jnp.asarray(layer, jnp.int32)
        return self._advance(block, one.shared, one.carried, index, model=one.model)

    def after(self, new: Leaves, old: Leaves, one: LayerInput, layer: int) -> LayerInput:
        """What the next layer reads of a batch, behind a layer that was changed."""
        carried, original = self.advance(new, one, layer), one.original
        if original is not None:
            original = self.advance(old, one._replace(carried=original), layer)
        return one._replace(carried=carried, original=original)

    def calibrate(
        self, needs: Needs, block: Leaves, inputs: Iterable[LayerInput], layer: int
    ) -> Stats:
        """Statistics of one layer.

        Args:
          needs: Statistics by path; those of other leaves are passed over.
          block: The layer's leaves, without the layers' axis.
          inputs: What it reads, batch by batch.
          layer: Its number.

        Returns:
          The statistics.
        """
        wanted, owners = self._assign(needs, block)
        index, total = jnp.asarray(layer, jnp.int32), None
        for one in inputs:
            if total is None:
                shapes = self._shapes(wanted, block, one)
                total = {path: neutral_record(record) for path, record in shapes.items()}
            total = self._collect(total, block, one[1:], index, wanted=wanted, model=one.model)
            jax.block_until_ready(total)  # batches in flight would hold their arrays, too
        return Stats(total or {}, tuple(owners.items()), self.layout)

    def abstract(self, needs: Needs, block: Leaves, one: LayerInput) -> tuple[Stats, int]:
        """Shapes of the statistics of one layer, and the bytes that collecting them takes.

        Args:
          needs: As in `calibrate`.
          block: Shapes of the leaves.
          one: Shapes of what it reads of a batch.

        Returns:
          Statistics of shapes, and the bytes of the program's temporaries.
        """
        wanted, owners = self._assign(needs, block)
        total = self._shapes(wanted, block, one)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        traced = self._collect.lower(total, block, one[1:], index, wanted=wanted, model=one.model)
        program = traced.compile()
        analysis = program.memory_analysis()  # None where a platform does not tell
        temporaries = 0 if analysis is None else analysis.temp_size_in_bytes
        return Stats(total, tuple(owners.items()), self.layout), temporaries

    def _assign(self, needs: Needs, block: Leaves) -> tuple[Wanted, dict[Path, Path]]:
        """Statistics by the leaf that holds them, and who holds those of the others."""
        mine = {path: names for path, names in needs.items() if path in block}
        wanted, owners = _assign(mine, block, self.layout, self._owners)
        return tuple(wanted.items()), owners

    def _shapes(self, wanted: Wanted, block: Leaves, one: LayerInput) -> dict[Path, Any]:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        records = functools.partial(self._records, wanted=wanted, model=one.model)
        return jax.eval_shape(records, block, one[1:], index)

    def _records(
        self, block: Leaves, one: Any, layer: Any, *, wanted: Wanted, model: ScannedModel
    ) -> dict[Path, Any]:
        """Statistics of a batch."""
        shared, carried, keep, original = one
        names, reference = dict(wanted), None
        if original is not None and compared(names):
            reference = Reference()
            leaves = probed(block, self.layout, compared(names))
            model.run_layer(reference.walk, leaves, shared, original, layer)
        walk = observing(keep, reference)
        model.run_layer(walk, probed(block, self.layout, names), shared, carried, layer)
        refuse_incomplete(walk, names)
        return dict(walk.records)

    def _add_records(
        self,
        total: dict[Path, Any],
        block: Leaves,
        one: Any,
        layer: Any,
        *,
        wanted: Wanted,
        model: ScannedModel,
    ) -> dict[Path, Any]:
        records = self._records(block, one, layer, wanted=wanted, model=model)
        return {path: combine_records(total[path], record) for path, record in records.items()}


def _enter(leaves: Leaves, given: Arrays, *, model: ScannedModel) -> list[jax.Array]:
    return model.carry.run(leaves, given)


def _share(leaves: Leaves, given: Arrays, *, model: ScannedModel) -> list[jax.Array]:
    return model.shared.run(leaves, given)


def _advance(
    block: Leaves, shared: Arrays, carried: Arrays, layer: Any, *, model: ScannedModel
) -> list[jax.Array]:
    return model.run_layer(Walk(), block, shared, carried, layer)


def transform_blocks(
    fn: Callable[..., Any],
    params: Params,
    batches: Sequence[Batch],
    tx: Transform,
    *,
    layout: LayoutLike,
    mask: Mask | None,
    key: jax.Array | None,
    progress: Progress | None,
) -> Params:
    """Transforms a scanned model layer by layer, then what lies outside its layers.

    Every layer is calibrated on the activations that the transformed layers before it give.
    """
    flat, structure = flatten(params)
    programs = BlockPrograms(fn, params, batches[0], layout)
    model, axes = programs.model, programs.layout
    needs = tx.needs(params)
    before, aside = _of(flat, model.carry.reads), _of(flat, model.shared.reads)
    masks = [None if mask is None else jnp.asarray(mask(batch), bool) for batch in batches]
    inputs = [
        programs.read(aside, batch, programs.enter(before, batch), keep)
        for batch, keep in zip(batches, masks, strict=True)
    ]

    if programs.compares(needs):
        inputs = [one._replace(original=one.carried) for one in inputs]

    blocks: list[dict[Path, Any]] = []
    changed: set[Path] = set()
    for layer in range(model.length):
        block = {path: jax.tree.map(lambda x: x[layer], flat[path]) for path in model.inside}  # noqa: B023
        stats = programs.calibrate(needs, block, inputs, layer)
        layer_key = None if key is None else jax.random.fold_in(key, layer)
        new = apply_inside(tx, flat | block, model.inside, stats, axes, layer_key)
        inputs = [programs.after(new, block, one, layer) for one in inputs]
        changed |= {path for path, leaf in new.items() if leaf is not block[path]}
        block = new
        blocks.append(block)
        if progress is not None:
            progress("layers", layer + 1, model.length)

    done = {
        path: jax.tree.map(lambda *parts: jnp.stack(parts), *(block[path] for block in blocks))
        for path in model.inside
        if path in changed
    }
    outside = [path for path in flat if path not in model.inside]
    rest = {path: names for path, names in needs.items() if path in outside and path in axes}
    stats = Stats({}, (), axes)
    if rest:
        new_params = unflatten(structure, flat | done)
        stats = calibrate(
            fn, new_params, batches, needs=rest, reference=params, layout=axes, mask=mask
        )
    # Rules see the layers as they were: folds could not move scales between quantized ones.
    done |= apply_inside(tx, flat, outside, stats, axes, key)
    return unflatten(structure, flat | done)


def apply_inside(
    tx: Transform,
    flat: dict[Path, Any],
    inside: Collection[Path],
    stats: Stats,
    layout: Layout,
    key: jax.Array | None,
) -> dict[Path, Any]:
    """Applies a transform to some leaves; its rules see the names of all."""
    context = Context(stats=stats, key=key, layout=layout, only=frozenset(inside))
    new, _ = tx.update(flat, tx.init(flat), context)
    return {path: new[path] for path in inside}


def _of(flat: Mapping[Path, Any], paths: Iterable[Path]) -> dict[Path, Any]:
    return {path: flat[path] for path in paths}
