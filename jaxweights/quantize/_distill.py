"""distill: a quantized model trained, in its own bytes, to give the float model's outputs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._context import Progress
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, unflatten
from jaxweights.lift._lift import lift
from jaxweights.quantize._learned import round_through
from jaxweights.quantize._settings import check_callable, check_count, check_numbers, is_word
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._scaled import combine
from jaxweights.weights._weight import is_weight, materialize

Loss = Literal["squared", "divergence"] | Callable[[Any, Any], jax.Array]

_NAME = "quantize.distill"
_FLOATS = r"(.*/)?(scale|bias)"
# A latent code starts this far at most from its code, on the side of the float weight. At 1/2, all
# whose float weight lies beyond their code's cell, where GPTQ put them on purpose, would leave it
# at the first step.
_LEAN = 0.4


class Distilled(NamedTuple):
    """What `distill` returns.

    Attributes:
      params: The tree, in the bytes that it had.
      losses: Before every step, on its batch, `(steps,)`.
    """

    params: Params
    losses: jax.Array


class _Learned(NamedTuple):
    """What is trained of one quantized leaf, or the rates of that.

    Attributes:
      code: Latent codes, `(*stack, in, out)` float32; None where codes stay.
      scale: Changes of scales as shares of themselves, `(*stack, rows, cols)` float32.
    """

    code: Any
    scale: Any


def distill(
    fn: Callable[..., Any],
    dense: Params,
    params: Params,
    batches: Iterable[Any],
    *,
    loss: Loss = "squared",
    steps: int = 256,
    code_rate: float = 6e-3,
    scale_rate: float = 1e-3,
    float_rate: float = 1e-3,
    train: str = _FLOATS,
    progress: Progress | None = None,
) -> Distilled:
    r"""Trains codes, scales, norms and biases until a quantized model answers as the float one.

    No label is read and no byte is added: codes become other codes of the same grid, scales stay as
    many and as wide, zero points and offsets stay, and norms and biases were floats already. Codes
    are roundings of latent numbers, :math:`\hat W = s (\mathrm{round}(u) - z)`, that gradients pass
    through; u starts at the codes, leaning by 0.4 at most towards the float weight. All of it
    follows Adam, whose rates rise for a sixteenth of the steps and then fall along a cosine to 0.

    Start from the best that one pass over the layers gives, such as `refine(gptq(...))`: what
    is left to gain is what layers can do for each other. On a layer by itself, and wherever weights
    are few, trained codes swing about their thresholds and may end worse than they began: set
    `code_rate=0` there, or look at the losses.

    Args:
      fn: The model, called as `fn(params, *batch)` for a tuple or list, else `fn(params, batch)`.
      dense: The float model's parameters.
      params: The same tree with `Quantized` leaves. Leaves of other kinds, and those that `train`
        does not name, stay as they are; one that stands at several paths is trained as one.
      batches: Batches of inputs, taken in turn and over again. Those of another shape compile
        again.
      loss: What is brought down: "squared", the mean squared error of the outputs over the mean
        square of the float model's (over 1 where that is 0); "divergence", the mean
        Kullback-Leibler divergence from the float model's softmax over the last axis, for logits;
        or `loss(outputs, targets)`.
      steps: Steps, one batch each.
      code_rate: Largest step of latent codes, in codes; 0 leaves all codes as they are, which takes
        a fourth of the memory.
      scale_rate: Largest step of scales, each relative to itself.
      float_rate: Largest step of float leaves, relative to their root mean square.
      train: Pattern that the whole path of a float leaf must match to be trained.
      progress: Called with ("distill", steps done, steps).

    Returns:
      The parameters and the losses.

    Raises:
      TypeError: If a setting is of the wrong kind, or `batches` is a single batch.
      ValueError: If a setting is out of range, the trees differ in paths or shapes, there is
        nothing to train or no batch, or the loss ends up not finite.

    Example:
      >>> dense = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> rounded = jw.apply(jw.quantize.round_to_nearest(bits=2, group_size=32), dense)
      >>> x = jax.random.normal(jax.random.key(1), (256, 16)) @ jnp.eye(16, 64, 8)
      >>> model = lambda params, x: x @ params["kernel"]
      >>> found = distill(model, dense, rounded, [x], steps=50, code_rate=0)
      >>> bool(found.losses[-1] < found.losses[0]), found.params["kernel"].bits
      (True, 2)

    Source: Chen et al. 2024, arXiv:2407.11062 (EfficientQAT), for training codes and scales; Liu et
      al. 2023, arXiv:2305.17888 (LLM-QAT), for the float model as the teacher.
    Differs: (1) The whole model is trained at once, not block by block first. (2) It starts from
      any quantizer's codes, not from rounding. (3) Norms and biases are trained, too; zero points
      are not.
    """
    _check_settings(loss, steps, code_rate, scale_rate, float_rate, train, progress)
    flat, structure = flatten(params)
    floats = flatten(dense)[0]
    fail(_NAME, _differences(flat, floats))
    owner = _owners(flat)
    rates = {
        owner[path]: _Learned(code_rate if code_rate else None, scale_rate)
        if isinstance(leaf, Quantized)
        else float_rate
        for path, leaf in flat.items()
        if isinstance(leaf, Quantized)
        or (is_float(leaf) and not is_weight(leaf) and re.fullmatch(train, path))
    }
    if not rates:
        raise ValueError(
            f"{_NAME}: there is nothing to train: no leaf is Quantized, and train={train!r} "
            "matches no float leaf. Quantize the tree before."
        )
    refuse_one_batch(_NAME, batches)
    stream = itertools.cycle(batches)
    if (first := next(stream, None)) is None:
        raise ValueError(f"{_NAME}: there is no batch. Pass at least one.")
    order, measure = list(flat), _loss_of(loss)
    # Arguments of the step, not constants of its program, which would hold them once more.
    arrays = {path: flat[path] for path in owner.values() if hasattr(flat[path], "dtype")}
    run = lift(lambda params, batch: fn(params, *_arguments(batch)))

    def tree(make: Callable[[Any, Any], Any], arrays: Flat, trained: Flat) -> Params:
        new = flat | arrays | {path: make(arrays[path], x) for path, x in trained.items()}
        return unflatten(structure, {path: new[owner[path]] for path in order})

    @jax.jit
    def step(
        trained: Flat, moments: Any, arrays: Flat, dense: Params, batch: Any, at: jax.Array
    ) -> tuple[Flat, Any, jax.Array]:
        target = jax.lax.stop_gradient(run(dense, batch))

        def loss_of(trained: Flat) -> jax.Array:
            return measure(run(tree(_value, arrays, trained), batch), target)

        value, gradient = jax.value_and_grad(loss_of)(trained)
        updates, moments = _adam(gradient, moments, at)
        pace = _pace(at, steps)
        moved = jax.tree.map(lambda x, u, rate: x - pace * rate * u, trained, updates, rates)
        return {path: _within(arrays[path], x) for path, x in moved.items()}, moments, value

    trained = {path: _start(flat[path], floats[path], code_rate) for path in rates}
    moments = (jax.tree.map(jnp.zeros_like, trained),) * 2
    losses = []
    for i, batch in zip(range(steps), itertools.chain([first], stream)):
        at = jnp.asarray(i, jnp.float32)
        trained, moments, value = step(trained, moments, arrays, dense, batch, at)
        losses.append(value)
        if progress is not None:
            progress("distill", i + 1, steps)
    found = Distilled(tree(_stored, arrays, trained), jnp.stack(losses))
    if not np.all(np.isfinite(found.losses)):
        bad = int(np.argmin(np.isfinite(found.losses)))
        raise ValueError(
            f"{_NAME}: the loss is {float(found.losses[bad])} at step {bad}. Lower the rates, or "
            "look for inputs that are not finite."
        )
    return found


def _check_settings(
    loss: Any, steps: Any, code_rate: Any, scale_rate: Any, float_rate: Any, train: Any, report: Any
) -> None:
    names = get_args(get_args(Loss)[0])
    if not callable(loss) and not is_word(loss, names):
        raise ValueError(f"{_NAME}: loss={loss!r} must be one of {list(names)} or a function.")
    check_count(_NAME, "steps", steps)
    rates = {"code_rate": code_rate, "scale_rate": scale_rate, "float_rate": float_rate}
    check_numbers(_NAME, **rates)
    for name, rate in rates.items():
        if not 0 <= rate < 0.5:
            raise ValueError(f"{_NAME}: {name}={rate!r} must lie in [0, 0.5).")
    if not isinstance(train, str):
        raise TypeError(f"{_NAME}: train={train!r} must be a pattern.")
    check_callable(_NAME, progress=report)


def _differences(flat: Flat, floats: Flat) -> list[str]:
    """What sets two trees apart, a line a leaf."""
    lines = [
        f"{path!r} is in {here} alone. Pass the float model that was quantized."
        for here, there, these in (("params", floats, flat), ("dense", flat, floats))
        for path in these
        if path not in there
    ]
    shape: Callable[[Any], Any] = lambda leaf: tuple(getattr(leaf, "shape", ()))  # noqa: E731
    return lines + [
        f"{path!r} is {shape(flat[path])} in params but {shape(floats[path])} in dense. Pass the "
        "float model that was quantized."
        for path in flat
        if path in floats and shape(flat[path]) != shape(floats[path])
    ]


def _owners(flat: Flat) -> dict[Path, Path]:
    """The first path of each leaf: one that stands at several is tied, and stays one."""
    first: dict[int, Path] = {}
    return {
        path: first.setdefault(id(leaf), path) if hasattr(leaf, "dtype") else path
        for path, leaf in flat.items()
    }


def _arguments(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _loss_of(loss: Loss) -> Callable[[Any, Any], jax.Array]:
    if loss == "squared":
        return _squared
    return _divergence if loss == "divergence" else loss  # type: ignore[return-value]


def _squared(outputs: Any, targets: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True)
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    sizes = [jnp.mean(b**2) for _, b in wide]
    errors = [jnp.mean((a - b) ** 2) for a, b in wide]
    shares = [error / jnp.where(size > 0, size, 1) for error, size in zip(errors, sizes)]
    return jnp.stack(shares).mean()


def _divergence(logits: jax.Array, targets: jax.Array) -> jax.Array:
    given, wanted = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, targets))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1))


def _pace(at: jax.Array, steps: int) -> jax.Array:
    """Which share of its largest step is taken."""
    rise = steps // 16
    fall = 0.5 * (1 + jnp.cos(math.pi * (at - rise) / (steps - rise)))
    return jnp.minimum(at / rise, fall) if rise else fall


def _adam(gradient: Any, moments: Any, at: jax.Array) -> tuple[Any, Any]:
    """Directions of Adam as published, where 1e-8 is small beside the corrected moment.

    Optax's breaks under strict dtype promotion, which callers may have set.
    Gradients of single codes of a large model are hardly larger than that: it keeps in place codes
    whose gradient is mere noise.
    """
    mean = lambda decay: lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
    first = jax.tree.map(mean(0.9), moments[0], gradient)
    second = jax.tree.map(mean(0.999), moments[1], jax.tree.map(jnp.square, gradient))
    c1, c2 = 1 - 0.9 ** (at + 1), 1 - 0.999 ** (at + 1)
    updates = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + 1e-8), first, second)
    return updates, (first, second)


def _start(leaf: Any, value: Any, code_rate: float) -> Any:
    if not isinstance(leaf, Quantized):
        return jnp.zeros(leaf.shape, jnp.float32)
    change = jnp.zeros(leaf.scale.shape, jnp.float32)
    if not code_rate:
        return _Learned(None, change)
    codes = leaf.codes_matrix().astype(jnp.float32)
    matrix = leaf.fitted().view.to_matrix(materialize(value)).astype(jnp.float32)
    scale, shift = _scale_and_shift(leaf, change)
    steps = combine(
        combine(matrix, shift, jnp.subtract), jnp.where(scale == 0, 1, scale), jnp.divide
    )
    empty = combine(codes, scale, lambda codes, scale: jnp.broadcast_to(scale == 0, codes.shape))
    place = jnp.where(empty, codes, steps)
    return _within(leaf, _Learned(codes + jnp.clip(place - codes, -_LEAN, _LEAN), change))


def _within(leaf: Any, trained: Any) -> Any:
    """Latent codes taken back to where codes are, so that none is lost beyond the ends."""
    if not isinstance(leaf, Quantized) or trained.code is None:
        return trained
    low = -(2 ** (leaf.bits - 1)) if leaf.signed else 0
    return trained._replace(code=jnp.clip(trained.code, low, low + 2**leaf.bits - 1))


def _value(leaf: Any, trained: Any) -> jax.Array:
    """What the forward pass sees, dense."""
    if not isinstance(leaf, Quantized):
        return _moved(leaf, trained)
    codes = leaf.codes_matrix() if trained.code is None else round_through(trained.code)
    scale, shift = _scale_and_shift(leaf, trained.scale)
    values = combine(combine(codes.astype(jnp.float32), scale, jnp.multiply), shift, jnp.add)
    return leaf.fitted().view.from_matrix(values.astype(leaf.dtype))


def _stored(leaf: Any, trained: Any) -> Any:
    if not isinstance(leaf, Quantized):
        return _moved(leaf, trained)
    codes = leaf.codes_matrix() if trained.code is None else jnp.round(trained.code)
    scale = leaf.scale.astype(jnp.float32) * (1 + trained.scale)
    return leaf.with_codes(codes.astype(jnp.int32), scale.astype(leaf.scale.dtype))


def _scale_and_shift(leaf: Quantized, change: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales, and the values of code 0, ready to meet grouped codes."""
    scale = leaf.by_row(leaf.scale.astype(jnp.float32) * (1 + change))
    if leaf.offset is not None:
        return scale, leaf.by_row(leaf.offset.astype(jnp.float32))
    zero = jnp.zeros_like(leaf.scale) if leaf.zero_point is None else leaf.zero_point
    return scale, -leaf.by_row(zero.astype(jnp.float32)) * scale


def _moved(leaf: jax.Array, change: jax.Array) -> jax.Array:
    wide = leaf.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide)))
    return (wide + jnp.where(size > 0, size, 1) * change).astype(leaf.dtype)
