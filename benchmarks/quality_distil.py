"""Training of a quantized model, in its own bytes, to give the float model's outputs.

What is trained costs no byte more than before: codes move to other codes of the same grid, scales
stay as many and as wide, norms and biases were floats already. Zero points stay. Only calibration
tokens are read, without labels: the target is what the float model makes of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxweights.core import Flat, flatten
from jaxweights.models import sentence_embedding
from jaxweights.weights import Quantized

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # of outputs and the float model's outputs
Trained = dict[str, Any]  # by path; of a Quantized leaf, a dict with "scale" and perhaps "code"


@dataclasses.dataclass(frozen=True)
class Rates:
    """First steps of Adam, which a cosine takes to zero.

    Attributes:
      scale: Of scales, each relative to itself.
      loose: Of norms and biases, relative to their root mean square.
      code: Of latent codes, in codes; 0 leaves all codes as they are.
    """

    scale: float = 1e-3
    loose: float = 1e-3
    code: float = 6e-3


# A latent code starts this far at most from its code, on the side of the float weight. At 1/2 all
# whose float weight lies beyond their code's cell, where GPTQ put them on purpose, would leave it
# at the first step.
_LEAN = 0.4


def distil(
    forward: Callable[[Any, jax.Array], jax.Array],
    dense: Any,
    params: Any,
    batches: Sequence[tuple[np.ndarray]],
    *,
    loss: Loss,
    steps: int,
    rates: Rates = Rates(),
) -> Any:
    """Trains codes, scales, norms and biases of `params` against the outputs of `dense`.

    Codes are roundings of latent numbers that gradients pass through. Scales are rounded to their
    stored dtype at the end.

    Args:
      forward: `forward(params, tokens)`.
      dense: The float model's parameters.
      params: The same tree with `Quantized` matrices.
      batches: Of `(tokens,)`, all of one shape; taken in turn.
      loss: What is brought down.
      steps: Batches in all.
      rates: How fast.

    Returns:
      The tree with other codes, scales, norms and biases, in the same bytes.
    """
    flat, treedef = flatten(params)
    floats, _ = flatten(dense)
    order = list(flat)
    learned = [path for path, leaf in flat.items() if _is_learned(path, leaf)]
    speed = {path: _speed(flat[path], rates) for path in learned}
    cosine = optax.warmup_cosine_decay_schedule(0, -1, steps // 16, steps)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(cosine))

    def tree(make: Callable[[Any, Any], Any], flat: Flat, trained: Trained) -> Any:
        new = flat | {path: make(flat[path], trained[path]) for path in learned}
        return jax.tree.unflatten(treedef, [new[path] for path in order])

    def loss_of(trained: Trained, flat: Flat, tokens: jax.Array, target: jax.Array) -> jax.Array:
        return loss(forward(tree(_value, flat, trained), tokens), target)

    # The leaves are arguments of the step, lest they become constants of its program.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Trained, state: Any, flat: Flat, tokens: Any, target: jax.Array) -> Any:
        gradient = jax.grad(loss_of)(trained, flat, tokens, target)
        updates, state = adam.update(gradient, state)
        trained = jax.tree.map(lambda x, u, rate: x + rate * u, trained, updates, speed)
        return {path: _within(flat[path], x) for path, x in trained.items()}, state

    teach = jax.jit(forward)
    trained = {path: _start(flat[path], floats[path], rates) for path in learned}
    state = adam.init(trained)
    for i in range(steps):
        (tokens,) = batches[i % len(batches)]
        trained, state = step(trained, state, flat, tokens, teach(dense, tokens))
    return tree(_stored, flat, trained)


def encoder_loss(hidden: jax.Array, target: jax.Array) -> jax.Array:
    """Relative squared error of the encodings, and what the sentences' cosines lack to 1."""
    error = jnp.mean(jnp.square(hidden - target)) / jnp.mean(jnp.square(target))
    cosine = jnp.sum(sentence_embedding(hidden) * sentence_embedding(target), axis=-1)
    return error + jnp.mean(1 - cosine)


def decoder_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence from the float model's next tokens."""
    wanted = jax.nn.log_softmax(target.astype(jnp.float32))
    given = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1))


def _is_learned(path: str, leaf: Any) -> bool:
    return isinstance(leaf, Quantized) or path.rsplit("/", 1)[-1] in ("scale", "bias")


def _size(leaf: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))
    return jnp.where(size > 0, size, 1)


def _start(leaf: Any, value: jax.Array, rates: Rates) -> Any:
    """Scales and loose leaves as changes relative to their size, codes as latent numbers."""
    if not isinstance(leaf, Quantized):
        return jnp.zeros(leaf.shape, jnp.float32)
    trained = {"scale": jnp.zeros(leaf.scale.shape, jnp.float32)}
    if rates.code:
        codes = leaf.codes_matrix().astype(jnp.float32)
        matrix = leaf.view.to_matrix(value).astype(jnp.float32)
        scale = _spread(leaf.scale, leaf)
        place = jnp.where(scale == 0, codes, matrix / scale + _centre(leaf))
        trained["code"] = codes + jnp.clip(place - codes, -_LEAN, _LEAN)
    return _within(leaf, trained)


def _speed(leaf: Any, rates: Rates) -> Any:
    if not isinstance(leaf, Quantized):
        return rates.loose
    return {"scale": rates.scale} | ({"code": rates.code} if rates.code else {})


def _value(leaf: Any, trained: Any) -> jax.Array:
    """What the forward pass sees; gradients pass through the rounding."""
    if not isinstance(leaf, Quantized):
        return _moved(leaf, trained)
    codes = leaf.codes_matrix().astype(jnp.float32)
    if "code" in trained:
        latent = trained["code"]
        codes = latent + jax.lax.stop_gradient(jnp.round(latent) - latent)
    matrix = (codes - _centre(leaf)) * _spread(_scale(leaf, trained), leaf)
    return leaf.view.from_matrix(matrix.astype(leaf.dtype))


def _stored(leaf: Any, trained: Any) -> Any:
    if not isinstance(leaf, Quantized):
        return _moved(leaf, trained)
    codes = trained.get("code", leaf.codes_matrix())
    return Quantized.from_codes(
        jnp.round(codes).astype(jnp.int32),
        _scale(leaf, trained).astype(leaf.scale.dtype),
        leaf.zero_point,
        bits=leaf.bits,
        dtype=leaf.dtype,
        view=leaf.view,
    )


def _moved(leaf: jax.Array, change: jax.Array) -> jax.Array:
    return (leaf.astype(jnp.float32) + _size(leaf) * change).astype(leaf.dtype)


def _scale(leaf: Quantized, trained: Any) -> jax.Array:
    return leaf.scale.astype(jnp.float32) * (1 + trained["scale"])


def _within(leaf: Any, trained: Any) -> Any:
    """Latent codes taken back to where codes are, so that none is lost beyond the ends."""
    if not isinstance(leaf, Quantized) or "code" not in trained:
        return trained
    low = -(2 ** (leaf.bits - 1)) if leaf.signed else 0
    return trained | {"code": jnp.clip(trained["code"], low, low + 2**leaf.bits - 1)}


def _centre(leaf: Quantized) -> jax.Array:
    zero = jnp.zeros_like(leaf.scale) if leaf.zero_point is None else leaf.zero_point
    return _spread(zero, leaf)


def _spread(field: jax.Array, leaf: Quantized) -> jax.Array:
    """A field of the shape of the scales, `(*stack, in, cols)`, for each input row."""
    return jnp.repeat(field.astype(jnp.float32), leaf.in_dim // field.shape[-2], axis=-2)
