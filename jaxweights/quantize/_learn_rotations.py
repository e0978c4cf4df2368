"""learn_rotations: SpinQuant, rotations under which the quantized model does best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._lapack import solve
from jaxweights.core._paths import Flat, Params, flatten, nearest, path_key, unflatten
from jaxweights.quantize._rotate import gains_of
from jaxweights.quantize._rotation import (
    Rotation,
    check_rotations,
    check_spec,
    random_rotation,
    rotate_flat,
)
from jaxweights.quantize._settings import check_count, check_names, check_positive

if TYPE_CHECKING:
    from jaxweights.align import PermutationSpec

_NAME = "quantize.learn_rotations"


class LearnedRotations(NamedTuple):
    """What `learn_rotations` returns.

    Attributes:
      rotations: By width, for `rotate(rotations=...)`.
      losses: Before every step, on its batch, and after the last on the first; `(steps + 1,)`.
    """

    rotations: dict[str, Rotation]
    losses: jax.Array


def learn_rotations(
    loss: Callable[..., jax.Array],
    params: Params,
    spec: PermutationSpec,
    batches: Iterable[Any],
    *,
    widths: Collection[str] = ("residual", "values"),
    steps: int = 100,
    learning_rate: float = 1.5,
    key: jax.Array | None = None,
    start: Mapping[str, Rotation] | None = None,
) -> LearnedRotations:
    r"""Trains the rotations of a model's widths, which stay orthogonal all the way.

    The weights do not change otherwise: `loss` gets the turned parameters and rounds them as they
    will be, straight-through (`fake_quant`). A step goes along the Cayley transform: with the
    gradient G, :math:`A = G Q^\top - Q G^\top` and :math:`Q \leftarrow (I + \frac\tau2 A)^{-1}
    (I - \frac\tau2 A) Q`, where :math:`\tau` is the learning rate, decayed linearly to zero, and at
    most :math:`1 / \|A\|_1`, so that no step turns too far.

    Args:
      loss: `loss(params, *batch)` for a tuple or list, else `loss(params, batch)`; a scalar.
      params: Parameters whose norms' gains were moved away, by `fuse_norms`.
      spec: Names the axes.
      batches: Batches, taken in turn and over again.
      widths: Names in `spec` to turn.
      steps: Steps, one batch each.
      learning_rate: The first one.
      key: Randomness for the rotations to start from, "hadamard".
      start: Rotations to start from; for models with LayerNorm "centred" ones, which then stay so
        only if the loss does not depend on the mean. Others are drawn.

    Returns:
      The rotations and the losses.

    Raises:
      TypeError: If `batches` is a single batch.
      ValueError: If a width is unknown or has only a start, there is no batch, or rotations must be
        drawn and there is no key.

    Example:
      >>> from jaxweights.align import PermutationSpec
      >>> params = {"up": jnp.eye(4), "down": jnp.eye(4)}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = PermutationSpec.of(params, axes)
      >>> large = lambda params, x: jnp.sum(jnp.abs(x @ params["up"]) ** 4)
      >>> found = learn_rotations(
      ...     large, params, spec, [jnp.eye(4)[:1]], widths=["hidden"], steps=30,
      ...     start={"hidden": jw.quantize.random_rotation(jax.random.key(0), 4, "orthogonal")},
      ... )
      >>> bool(found.losses[-1] < 0.3), bool(found.losses[-1] < found.losses[0])
      (True, True)

    Source: Liu et al. 2024, arXiv:2405.16406, equation 3, and the authors' code for the bound of
      the step.
    Differs: (1) The Cayley transform is solved, not approximated by iterations. (2) One value
      rotation serves all layers and heads, as in `rotate`; the paper has one a layer.
    """
    check_spec(_NAME, spec)
    check_names(_NAME, widths=widths)
    given, widths = check_rotations(_NAME, "start", start), tuple(widths)
    unknown = [name for name in (*widths, *given) if name not in spec.sizes]
    if unknown:
        raise ValueError(
            f"{_NAME}: {unknown[0]!r} is no width of the spec. Its widths are "
            f"{nearest(unknown[0], spec.sizes)}."
        )
    if left := [name for name in given if name not in widths]:
        raise ValueError(
            f"{_NAME}: start[{left[0]!r}]: {left[0]!r} is not among widths={list(widths)}. Add it "
            "there."
        )
    check_count(_NAME, "steps", steps)
    check_positive(_NAME, learning_rate=learning_rate)
    drawn = [name for name in widths if name not in given]
    if drawn and key is None:
        raise ValueError(f"{_NAME}: 'key' is missing: pass key=jax.random.key(...), or start.")
    for name in drawn:
        assert key is not None
        given[name] = random_rotation(path_key(key, name), spec.sizes[name])
    refuse_one_batch(_NAME, batches)
    stream = itertools.cycle(batches)
    if (first := next(stream, None)) is None:
        raise ValueError(f"{_NAME}: there is no batch. Pass at least one.")
    flat, structure = flatten(params)
    gains = gains_of(spec, widths)
    # Arguments of the step, not constants of its program, which would hold them once more.
    weights = {path: leaf for path, leaf in flat.items() if hasattr(leaf, "dtype")}

    def loss_of(matrices: dict[str, jax.Array], weights: Flat, batch: Any) -> jax.Array:
        turns = {name: Rotation(matrix=matrix) for name, matrix in matrices.items()}
        turned = {path: leaf for path, leaf in weights.items() if path not in gains}
        new = unflatten(structure, flat | weights | rotate_flat(spec, turned, turns))
        return loss(new, *(batch if isinstance(batch, tuple | list) else (batch,)))

    @jax.jit
    def step(
        matrices: dict[str, jax.Array], weights: Flat, batch: Any, rate: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        value, gradient = jax.value_and_grad(loss_of)(matrices, weights, batch)
        new = {name: cayley_step(q, gradient[name], rate) for name, q in matrices.items()}
        return new, value

    matrices = {name: given[name].dense() for name in widths}
    losses = []
    for i, batch in zip(range(steps), itertools.chain([first], stream)):
        rate = jnp.asarray(learning_rate * (1 - i / steps), jnp.float32)
        matrices, value = step(matrices, weights, batch, rate)
        losses.append(value)
    losses.append(step(matrices, weights, first, jnp.float32(0))[1])
    return LearnedRotations(
        {name: Rotation(matrix=matrix) for name, matrix in matrices.items()}, jnp.stack(losses)
    )


def cayley_step(q: jax.Array, gradient: jax.Array, rate: jax.Array) -> jax.Array:
    """One step down the gradient that keeps an orthogonal `(n, n)` matrix orthogonal."""
    identity = jnp.eye(len(q), dtype=q.dtype)
    with jax.default_matmul_precision("highest"):
        skew = gradient @ q.T - q @ gradient.T
        size = jnp.max(jnp.sum(jnp.abs(skew), axis=0))
        half = jnp.minimum(rate, 1 / jnp.maximum(size, jnp.finfo(q.dtype).tiny)) / 2
        return solve(identity + half * skew, q - half * (skew @ q))
