"""fake_quant: quantized values forward, the gradients of unrounded weights backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core._apply import LayoutLike, apply
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Params, fail, flatten, unflatten
from jaxweights.core._stats import Stats
from jaxweights.core._transform import Transform
from jaxweights.quantize._settings import is_word
from jaxweights.quantize.training._thresholds import all_ones
from jaxweights.weights._learned_step import LearnedStep
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._quantized_product import QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs
from jaxweights.weights._trits import Trits
from jaxweights.weights._weight import is_weight, materialize

Clipped = Literal["pass", "zero"]
_NAME = "quantize.fake_quant"


@jax.custom_jvp
def straight_through(latent: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, differentiated as if it were `latent`.

    Unlike `latent + stop_gradient(value - latent)` the result is `value` to the last bit.

    Args:
      latent: Where the gradient goes.
      value: What is returned, of the same shape and dtype; no gradient reaches it.

    Returns:
      `value`.

    Example:
      >>> jax.value_and_grad(lambda x: straight_through(x, jnp.round(x)))(1.7)
      (Array(2., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    del latent
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def fake_quant(
    params: Params,
    tx: Transform,
    *,
    clipped: Clipped = "pass",
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
    key: jax.Array | None = None,
    step: int | jax.Array | None = None,
    layout: LayoutLike = None,
) -> Params:
    """Rounds weights as a transform does, and lets gradients through to the unrounded ones.

    Call it at the head of the loss, on the latent parameters that the optimizer holds. The rounding
    is the transform's own, so that what is trained is what `apply(tx, params)` stores afterwards,
    to the bit. Any transform will do: `round_to_nearest`, `statsq`, `ternary`, a chain or a
    partition of them, also a pruner before a quantizer.

    Args:
      params: Latent parameters: any tree of arrays.
      tx: The transform; its state starts afresh at every call.
      clipped: What the gradient of an entry is that lies more than half a step beyond its grid:
        "pass" lets it through, so that it can come back; "zero" is the true derivative of clipping.
      stats: As in `apply`.
      models: As in `apply`.
      key: As in `apply`; give another one at every step.
      step: As in `apply`, for schedules inside the transform.
      layout: As in `apply`.

    Returns:
      A tree of dense arrays like `params`. Leaves of integers are what the transform makes of them.
      Leaves that the transform leaves alone, or that were represented before, are as it returns
      them. Those of `int8_dynamic` and `fp8_dynamic` stay
      `QuantizedProduct` and `RoundedInputs`, which round activations, too: call `lift(model)` on
      them.
      An NNX module comes back as another module: what it counts while it runs (`BatchNorm`'s means,
      `Dropout`'s keys) stays there. To keep that, call this on `nnx.state(module, nnx.Param)` and
      put the result into the module by `nnx.update`.

    Raises:
      ValueError: If the transform refuses the tree, changes a shape, or `clipped="zero"` meets a
        leaf whose levels are not evenly spaced.

    Example:
      >>> tx = jw.quantize.round_to_nearest(bits=4)
      >>> params = {"kernel": jnp.array([[0.875, -1.0], [0.5, 0.2]])}
      >>> rounded = lambda params: jw.quantize.fake_quant(params, tx)["kernel"]
      >>> rounded(params).tolist()
      [[0.875, -1.0], [0.546875, 0.25]]
      >>> jax.grad(lambda params: rounded(params).sum())(params)["kernel"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]

    Source: Bengio et al. 2013, arXiv:1308.3432, the straight-through estimator.
    """
    if not is_word(clipped, get_args(Clipped)):
        raise ValueError(f"{_NAME}: clipped={clipped!r} is unknown. Choose one of 'pass', 'zero'.")
    if not isinstance(tx, Transform):
        raise TypeError(f"{_NAME}: tx={tx!r} is a {type(tx).__name__}, not a transform.")
    constant = _without_gradient(params)
    rounded = apply(tx, constant, stats=stats, models=models, key=key, step=step, layout=layout)
    latent, structure = flatten(params)
    before, after = flatten(constant)[0], flatten(rounded)[0]
    fail(_NAME, _misfits(latent, after, clipped))
    new: dict[str, Any] = {}
    for path, leaf in latent.items():
        value = after[path]
        if is_weight(leaf):
            new[path] = value
        elif value is before[path]:
            new[path] = leaf
        elif not is_float(leaf):
            new[path] = materialize(value)  # of whole numbers there is no gradient
        else:
            source = leaf
            if clipped == "zero":
                source = jnp.where(_inside(before[path], value), leaf, before[path])
            new[path] = _value(source, value)
    return unflatten(structure, new)


def _value(latent: jax.Array, value: Any) -> Any:
    if isinstance(value, QuantizedProduct):
        return dataclasses.replace(value, latent=value.view.to_matrix(latent))
    if isinstance(value, RoundedInputs):
        base = straight_through(value.view.to_matrix(latent), value.matrix())
        return dataclasses.replace(value, base=base)
    return straight_through(latent, materialize(value))


def _without_gradient(params: Params) -> Params:
    """The same tree, which nothing is differentiated through; tied leaves stay tied."""
    flat, structure = flatten(params)
    stopped: dict[int, Any] = {}
    for leaf in flat.values():
        if id(leaf) not in stopped:
            stop = is_weight(leaf) or isinstance(leaf, Tracer)
            stopped[id(leaf)] = jax.lax.stop_gradient(leaf) if stop else leaf
    return unflatten(structure, {path: stopped[id(leaf)] for path, leaf in flat.items()})


def _misfits(latent: dict[str, Any], after: dict[str, Any], clipped: Clipped) -> list[str]:
    problems = []
    for path, leaf in latent.items():
        value = after[path]
        if not is_float(leaf) or is_weight(leaf):
            continue
        if (tuple(value.shape), value.dtype) != (tuple(leaf.shape), leaf.dtype):
            problems.append(
                f"{path!r}: became {value.dtype}{list(value.shape)} from {leaf.dtype}"
                f"{list(leaf.shape)}. A transform inside the loss must keep shapes and dtypes."
            )
        elif clipped == "zero" and is_weight(value) and _even(value) is None:
            problems.append(
                f"{path!r}: became a {type(value).__name__}, whose levels are not evenly spaced. "
                "Half a step beyond them means nothing then; use clipped='pass'."
            )
    return problems


def _even(weight: Any) -> Quantized | None:
    """The part of a weight that has steps of one size."""
    if isinstance(weight, QuantizedProduct):
        return weight.weight_only()
    if isinstance(weight, RoundedInputs):
        weight = weight.weight_only()
    if isinstance(weight, Masked):
        weight = weight.base
    if isinstance(weight, LearnedStep | Trits):
        return weight.quantized()
    return weight if isinstance(weight, Quantized) else None


def _inside(latent: jax.Array, value: Any) -> jax.Array:
    """Where rounding stayed within half a step, which it does unless the grid ends before."""
    even = _even(value)
    if even is None:
        return jnp.ones(latent.shape, bool)
    step = jnp.abs(all_ones(even).astype(jnp.float32).materialize())
    error = jnp.abs(even.astype(jnp.float32).materialize() - latent.astype(jnp.float32))
    # An error of half a step may come out larger by the rounding of both.
    return error <= step * jnp.float32(0.5 + 2**-16)
