"""What methods share that learn roundings from a Gram matrix alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxweights.core._computed_first import computed_first
from jaxweights.core._host import on_host
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._stored import stored_as
from jaxweights.core._targets import Grouped
from jaxweights.core._transform import Transform
from jaxweights.quantize._calibrated import (
    LeafReport,
    OnFailure,
    ReportLeaf,
    check_failures,
    describe_failure,
    status_of,
    warn_of_fallback,
)
from jaxweights.quantize._grid import Codes, Grid
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.quantize._settings import check_count, check_positive
from jaxweights.quantize._unit import unit_of
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked

Check = Callable[[Any, View], str | None]
Put = Callable[[Any, Any, View], Any]
Verify = Callable[[Path, Any], str | None]


@jax.custom_vjp
def output_losses(
    change: Float[Array, "in out"], gram: Float[Array, "in in"]
) -> Float[Array, " out"]:
    r"""Each output's share of :math:`\operatorname{tr}(D^\top H D)`, with a derivative for free.

    The product H D serves the value and the gradient 2 H D; H is taken as constant.
    """
    return _losses_forward(change, gram)[0]


def _losses_forward(change: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    change = computed_first(change)
    product = jnp.matmul(gram, change, precision="highest")
    return jnp.sum(change * product, axis=0), product


def _losses_backward(product: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return 2 * product * cotangent[None], None


output_losses.defvjp(_losses_forward, _losses_backward)


def round_through(values: jax.Array) -> jax.Array:
    """Rounds half to even; the derivative is that of the identity."""
    return values + jax.lax.stop_gradient(jnp.round(values) - values)


def clip_through(values: jax.Array, low: float, high: float) -> jax.Array:
    """Clips; the derivative is 1 from end to end, and 0 beyond.

    That of `jnp.clip` is a half at the ends themselves, where rounded values lie in numbers.
    """
    clipped = jnp.clip(values, low, high)
    return jnp.where(values == clipped, values, jax.lax.stop_gradient(clipped))


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square; trees like the parameters."""

    first: Any
    second: Any


def adam_step(
    params: Any, gradient: Any, moments: Moments, step: jax.Array, rates: Any
) -> tuple[Any, Moments]:
    """One step of Adam (arXiv:1412.6980), with a rate for each leaf of the parameters."""
    mean = lambda decay: lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
    first = jax.tree.map(mean(0.9), moments.first, gradient)
    second = jax.tree.map(mean(0.999), moments.second, jax.tree.map(jnp.square, gradient))
    count = step.astype(jnp.float32) + 1
    root = jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)

    def move(p: jax.Array, m: jax.Array, v: jax.Array, rate: float) -> jax.Array:
        return p - rate * root * m / (jnp.sqrt(v) + 1e-8)

    return jax.tree.map(move, params, first, second, rates), Moments(first, second)


class Learned(NamedTuple):
    """What was learned of one matrix.

    Attributes:
      fields: Arrays that the new leaf is made of.
      error: Relative `output_error`, NaN where the Gram matrix is not finite.
    """

    fields: Any
    error: Float[Array, ""]


class _Result(NamedTuple):
    """One leaf's result on its way through `leafwise`; stack axes come first."""

    learned: Learned
    tokens: jax.Array


def check_steps(asker: str, steps: int, **rates: float) -> int:
    """Refuses numbers of steps and rates that are out of range; gives the steps as an int."""
    check_count(asker, "steps", steps)
    check_positive(asker, **rates)
    return int(steps)


def learned_transform(
    learn: Callable[..., Learned],
    *,
    name: str,
    put: Put,
    check: Check,
    bad_scales: Verify,
    on_failure: OnFailure,
    report: ReportLeaf | None,
    grouped: Grouped = "refuse",
) -> Transform:
    """A transform that learns the rounding of each matrix from its Gram matrix.

    Args:
      learn: `learn(weight, gram, tokens, mask)` of one matrix, all float32.
      name: What errors call the transform; its last part is the status in reports.
      put: `put(leaf, fields, view)` makes the new leaf.
      check: What is wrong with a leaf, from its shape.
      bad_scales: What is wrong with the fields of a leaf.
      on_failure: As in `gptq`.
      report: As in `gptq`.
      grouped: As in `leafwise`.

    Returns:
      The transform.
    """
    check_failures(name, on_failure, report)

    def quantize(
        weight: jax.Array, gram: jax.Array, count: jax.Array, mask: jax.Array | None = None
    ) -> _Result:
        weight = weight.astype(jnp.float32)
        if mask is not None:
            weight = jnp.where(mask, weight, 0)
        tokens, unit = jnp.asarray(count), unit_of(weight)
        found = learn(weight / unit, gram.astype(jnp.float32), tokens.astype(jnp.float32), mask)
        return _Result(Learned(_times(found.fields, unit), found.error), tokens)

    def verify(path: Path, result: _Result) -> str | None:
        tokens = on_host(result.tokens)
        error = on_host(result.learned.error)
        usable = np.where(np.isfinite(error), 0, np.nan)
        problem = bad_scales(path, result.learned.fields)
        if problem is None and on_failure == "error":
            problem = describe_failure(path, tokens, usable)
        if problem is None:
            status = status_of(name.split(".")[-1], tokens, usable, 0.0)
            if report is None:
                warn_of_fallback(name, path, status)
            else:
                report(path, LeafReport(status, error, tokens))
        return problem

    def wrap(leaf: Any, result: _Result, view: View) -> Any:
        return put(leaf, result.learned.fields, view)

    def check_path(path: Path, leaf: Any, view: View) -> str | None:
        problem = check(leaf, view)
        return problem and f"{path!r}: {problem}"

    return leafwise(
        quantize,
        name=name,
        needs=("gram", "count"),
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        masked=True,
        mapping="map",
        check=check_path,
        verify=verify,
        checks_finite=False,
        grouped=grouped,
    )


def _times(fields: Any, unit: jax.Array) -> Any:
    """Codes or a weight whose scales are so many times as large."""
    scale = stored_as(fields.scale.astype(jnp.float32) * unit, fields.scale.dtype)
    if isinstance(fields, Codes):
        return fields._replace(scale=scale)
    return dataclasses.replace(fields, scale=scale)


def learned_codes(
    learn: Callable[..., tuple[Codes, jax.Array]],
    grid: Grid,
    *,
    name: str,
    on_failure: OnFailure,
    report: ReportLeaf | None,
) -> Transform:
    """A `learned_transform` of matrices to codes of an integer grid.

    Args:
      learn: `learn(weight, gram, tokens, mask)` of one matrix gives its codes and what they lose of
        the outputs, as a share of these.
      grid: The grid.
      name: As in `learned_transform`, as are the others.
      on_failure: What becomes of a matrix whose statistics are of no use.
      report: Called with what was found of each leaf.

    Returns:
      The transform, to `Quantized` weights.
    """

    def packed(*operands: Any) -> Learned:
        codes, error = learn(*operands)
        return Learned(pack(codes, grid), error)

    return learned_transform(
        packed,
        name=name,
        put=lambda leaf, codes, view: replace_leaf(leaf, codes, view, grid),
        check=lambda leaf, view: unfit_leaf(leaf, view, grid),
        bad_scales=describe_bad_scales,
        on_failure=on_failure,
        report=report,
        grouped="split",
    )


def of_unit_mean(gram: jax.Array) -> jax.Array:
    """A Gram matrix with a mean diagonal of 1, so that no gradient under- or overflows; or zero."""
    mean = jnp.mean(jnp.diagonal(gram))
    return gram / jnp.where(mean == 0, 1, mean)


def relative(losses: jax.Array, weight: jax.Array, gram: jax.Array) -> jax.Array:
    """Losses over all outputs, as a share of the outputs' own sum of squares."""
    total, whole = jnp.sum(losses), jnp.sum(output_losses(weight, gram))
    return jnp.where(total == 0, 0.0, total / whole)
