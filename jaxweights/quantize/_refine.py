"""refine: codes and scales of a quantized weight improved by turns for the layer's outputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core._context import Context
from jaxweights.core._lapack import solve
from jaxweights.core._layout import is_float
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Params, fail, flatten, unflatten
from jaxweights.core._stats import Needs
from jaxweights.core._stored import stored_as
from jaxweights.core._targets import stack_sizes
from jaxweights.core._transform import Transform, stateless, widest
from jaxweights.quantize._around import (
    changed_leaves,
    check_quantizer,
    needs_around,
    quantize_alone,
)
from jaxweights.quantize._calibrated import nonfinite_statistics
from jaxweights.quantize._grid import Grid, decode, encode
from jaxweights.quantize._output_error import output_errors
from jaxweights.quantize._settings import check_count
from jaxweights.quantize._unit import unit_of
from jaxweights.weights._axes import View
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight

_NAME = "quantize.refine"
_BLOCK = 32  # rows whose changes are gathered before they are spread over all others
_RIDGE = 1e-6  # of the mean diagonal: groups whose codes are all zero have no scale to find

_matmul = functools.partial(jnp.matmul, precision="highest")


def refine(quantizer: Transform, *, sweeps: int = 4) -> Transform:
    r"""Improves what a quantizer makes: codes and scales by turns, never for the worse.

    Minimises :math:`\operatorname{tr}(D^\top H D)`, :math:`D = W - \hat W`, with H the Gram matrix
    of the layer's inputs. In each sweep first every code becomes the best one given all others, row
    after row; then, with the codes as they are, the scales of each output become those of the
    least error, by a small linear system. Zero points, groups and bits stay, and so do the bytes.
    Each output keeps the best it has had. Where `gptq` looks at each row once, this looks again. A
    matrix that no token reached stays as the quantizer made it.

    Args:
      quantizer: A transform to `Quantized` weights with one scale for each output or less, such as
        `gptq` or `round_to_nearest`. Leaves that it does not change stay as they are.
      sweeps: How often, at least 1.

    Returns:
      A transform from dense matrices to `Quantized` ones. It needs the statistics "gram" and
      "count".

    Raises:
      TypeError: If the quantizer is no transform, or sweeps no integer.
      ValueError: If a setting is out of range; on a tree, as the quantizer, if a statistic is
        missing or not finite, or if the quantizer makes something else than `Quantized` weights
        with scales of single outputs.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 16)) @ jnp.eye(16, 64, 8)
      >>> tx = jw.quantize.refine(jw.quantize.gptq(bits=3, group_size=32))
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].bits
      3

    Source: Behdin et al. 2023, arXiv:2309.01885 (QuantEase), Algorithm 1, for the codes.
    Differs: (1) Scales are refitted between sweeps. (2) It starts from another quantizer's result.
    """
    check_quantizer(_NAME, quantizer)
    check_count(_NAME, "sweeps", sweeps)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        if any(is_float(leaf) and len(leaf.shape) > 1 for leaf in flat.values()):
            context.require("stats", _NAME)
        stats: Any = context.stats
        changed = changed_leaves(quantizer, flat, context)
        fail(_NAME, [stats.why_missing(p, "gram") for p in changed if stats.get(p, "gram") is None])
        fail(_NAME, nonfinite_statistics(stats, changed, "gram"))
        new, problems = dict(flat), []
        for done, path in enumerate(changed, start=1):
            start = quantize_alone(quantizer, flat, context, path, flat[path])
            if problem := _unfit(start):
                problems.append(f"{path!r}: {problem}")
                continue
            if problem := stats.why_other_axes(path, start.view.axes.inputs) or stats.why_grouped(
                path, stack_sizes(start, start.view)
            ):
                problems.append(problem)
                continue
            gram = stats.get(path, "gram")
            empty = not start.size
            new[path] = start if empty else refine_weight(start, flat[path], gram, sweeps=sweeps)
            if context.progress is not None:
                context.progress(path, done, len(changed))
        fail(_NAME, problems)
        return unflatten(structure, new)

    def needs(params: Params, *, named: bool = False) -> Needs:
        return needs_around(_NAME, quantizer, params, named=named)

    made = stateless(
        update,
        name=f"{_NAME}({quantizer.name})",
        needs=needs,
        reads_statistics=True,
        scope=widest(("leaf", quantizer.scope)),
    )
    if quantizer.for_leaf is None:
        return made
    alone = lambda path: refine(quantizer.on(path), sweeps=sweeps)  # noqa: E731
    return dataclasses.replace(made, for_leaf=alone)


def _unfit(weight: Any) -> str | None:
    if not isinstance(weight, Quantized):
        kind = type(weight).__name__ if is_weight(weight) else "dense array"
        return (
            f"the quantizer makes a {kind} of it. Refine quantizers to integers with scales, or "
            "leave this one out with `partition`."
        )
    if weight.scale.shape[-1] != weight.codes.shape[-1]:
        return (
            f"scales of shape {tuple(weight.scale.shape)} are shared by several outputs, which "
            "then cannot be refitted one by one. Choose an integer group_size, or None."
        )
    return None


class _Columns(NamedTuple):
    """Codes, scales and error of each output."""

    codes: jax.Array  # (in, out), int32
    scale: jax.Array  # (rows, out)
    error: jax.Array  # (out,)


@functools.partial(jax.jit, static_argnames=("sweeps",))
def refine_weight(
    weight: Quantized, value: jax.Array, gram: jax.Array, *, sweeps: int = 4
) -> Quantized:
    """Improves a quantized weight as an approximation of a value, as `refine` does.

    Args:
      weight: Where to start; a scale belongs to one output.
      value: Of the shape of the weight, floating.
      gram: `(*stack, in, in)`.
      sweeps: As in `refine`.

    Returns:
      The weight with other codes and scales.

    Example:
      >>> import jaxweights as jw
      >>> key_w, key_x = jax.random.split(jax.random.key(0))
      >>> value, x = jax.random.normal(key_w, (16, 8)), jax.random.normal(key_x, (64, 16))
      >>> start = jw.apply(jw.quantize.round_to_nearest(bits=3), {"kernel": value})["kernel"]
      >>> better = refine_weight(start, value, x.T @ x)
      >>> error = lambda weight: jw.quantize.output_error(value, weight.materialize(), x.T @ x)
      >>> bool(error(better) < error(start))
      True
    """
    view: View = weight.fitted().view
    operands = {
        "codes": weight.codes_matrix().astype(jnp.int32),
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "offset": weight.offset,
        "group_index": weight.group_index,
        "value": view.to_matrix(value).astype(jnp.float32),
        "gram": gram.astype(jnp.float32),
    }
    group_size = weight.group_size or weight.in_dim
    one = functools.partial(_refine_matrix, bits=weight.bits, group_size=group_size, sweeps=sweeps)
    codes, scale = map_over_stack(one, operands, weight.codes.shape[:-2])
    return weight.with_codes(codes, scale)


def _refine_matrix(
    operands: dict[str, Any], *, bits: int, group_size: int, sweeps: int
) -> tuple[jax.Array, jax.Array]:
    codes, scale, zero, offset, value, gram = (
        operands[name] for name in ("codes", "scale", "zero_point", "offset", "value", "gram")
    )
    in_dim, dtype, unit = codes.shape[0], scale.dtype, unit_of(value)
    value, scale = value / unit, stored_as(scale.astype(jnp.float32) / unit, dtype)
    offset = None if offset is None else offset.astype(jnp.float32) / unit
    of_row = operands["group_index"]
    together = group_size if of_row is None else None  # rows of groups of neighbouring rows
    of_row = jnp.arange(in_dim) // group_size if of_row is None else of_row
    if offset is not None:
        value = value - offset[of_row].astype(jnp.float32)
        zero = jnp.zeros(scale.shape, jnp.uint8)
    zeros = None if zero is None else zero[of_row]
    grid = Grid("affine" if zeros is not None else "full", bits, scale_dtype=scale.dtype)
    mean = jnp.mean(jnp.diagonal(gram))
    gram = gram / jnp.where(mean > 0, mean, 1)
    error_of = lambda codes, scale: _errors(codes, scale[of_row], zeros, value, gram)  # noqa: E731

    def sweep(_: int, best: _Columns) -> _Columns:
        moved = _descend(best.codes, best.scale[of_row], zeros, value, gram, grid)
        best = _keep(best, moved, best.scale, error_of(moved, best.scale))
        fitted = _fit_scales(best.codes, best.scale, zeros, of_row, together, value, gram)
        return _keep(best, best.codes, fitted, error_of(best.codes, fitted))

    start = _Columns(codes, scale, error_of(codes, scale))
    best = jax.lax.fori_loop(0, sweeps, sweep, start)
    return best.codes, stored_as(best.scale.astype(jnp.float32) * unit, dtype)


def _keep(best: _Columns, codes: jax.Array, scale: jax.Array, error: jax.Array) -> _Columns:
    """Of each output the better."""
    better = error < best.error
    return _Columns(
        jnp.where(better[None], codes, best.codes),
        jnp.where(better[None], scale, best.scale),
        jnp.where(better, error, best.error),
    )


def _errors(
    codes: jax.Array, scale: jax.Array, zero: jax.Array | None, value: jax.Array, gram: jax.Array
) -> jax.Array:
    return output_errors(value - decode(codes, scale, zero), gram)


def _descend(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    value: jax.Array,
    gram: jax.Array,
    grid: Grid,
) -> jax.Array:
    """Every code, row after row, the best one given all others; `(in, out)`."""
    in_dim = codes.shape[0]
    block = next(d for d in range(min(_BLOCK, in_dim), 0, -1) if in_dim % d == 0)
    diagonal = jnp.diagonal(gram)
    dequantized = decode(codes, scale, zero)
    cut = jax.lax.dynamic_slice_in_dim
    pull = _matmul(gram, value - dequantized)  # what each entry would have to give, times H_ii

    def block_step(pull: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = cut(cut(gram, start, block), start, block, axis=1)
        own = [cut(x, start, block) for x in (dequantized, scale, diagonal)]
        zeros = None if zero is None else cut(zero, start, block)
        here = cut(pull, start, block)

        def row_step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
            codes, change = state
            now, step, weight = (x[i] for x in own)
            force = here[i] - _matmul(inside[i], change)
            # A dead input's entry has no pull: it stays where it is.
            wish = now + force / jnp.where(weight > 0, weight, 1)
            at = None if zeros is None else zeros[i]
            code = encode(wish, step, at, grid)
            moved = decode(code, step, at) - now
            return codes.at[i].set(code), change.at[i].set(moved)

        state = jnp.zeros(here.shape, jnp.int32), jnp.zeros_like(here)
        new, change = jax.lax.fori_loop(0, block, row_step, state)
        return pull - _matmul(cut(gram, start, block, axis=1), change), new

    _, new = jax.lax.scan(block_step, pull, jnp.arange(0, in_dim, block))
    return new.reshape(codes.shape)


def _fit_scales(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    of_row: jax.Array,
    group_size: int | None,
    value: jax.Array,
    gram: jax.Array,
) -> jax.Array:
    """The scales of the least error for given codes, `(rows, out)`, in the scales' dtype."""
    rows, out_dim = scale.shape
    steps = decode(codes, jnp.ones((1, 1)), zero)  # (in, out), multiples of a scale
    wanted = _matmul(gram, value)
    if group_size is not None:
        missing = rows * group_size - len(steps)  # in the last group
        steps, wanted = (jnp.pad(x, ((0, missing), (0, 0))) for x in (steps, wanted))
        gram = jnp.pad(gram, (0, missing))

    def by_group(x: jax.Array) -> jax.Array:
        if group_size is None:
            return jax.ops.segment_sum(x, of_row, num_segments=rows)
        return jnp.sum(x.reshape(rows, group_size, out_dim), axis=1)

    def against(group: jax.Array) -> jax.Array:
        if group_size is None:
            return by_group(steps * _matmul(gram, jnp.where((of_row == group)[:, None], steps, 0)))
        cut = jax.lax.dynamic_slice_in_dim
        own = cut(steps, group * group_size, group_size)
        return by_group(steps * _matmul(cut(gram, group * group_size, group_size, axis=1), own))

    target = by_group(steps * wanted)  # (rows, out)
    system = jax.lax.map(against, jnp.arange(rows))  # (rows, rows, out)
    system = jnp.moveaxis(system, -1, 0)
    mean = jnp.trace(system, axis1=-2, axis2=-1) / rows
    ridge = _RIDGE * jnp.where(mean > 0, mean, 1)
    # The ridge pulls to the old scales, which a group without codes then keeps.
    system = system + ridge[:, None, None] * jnp.eye(rows)[None]
    target = target.T + ridge[:, None] * scale.astype(jnp.float32).T
    found = solve(system, target[..., None])[..., 0].T.reshape(rows, out_dim)
    return stored_as(found, scale.dtype)
