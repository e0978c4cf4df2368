"""Coefficients learned by gradient descent: learned soups and AdaMerging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._apply import LayoutLike
from jaxweights.core._paths import Params
from jaxweights.merge._mixture import Groups, Mixture, mixture

if TYPE_CHECKING:
    import optax


class LearnedMerge(NamedTuple):
    """What `learned_soup` and `adamerging` found."""

    params: Params
    """The merged model."""
    coefficients: jax.Array
    """Its coefficients, `(models, groups)`."""
    groups: tuple[str, ...]
    """Names of the groups."""
    losses: list[float]
    """Loss of every step, before it was taken."""


def learned_soup(
    models: Sequence[Params],
    loss: Callable[..., jax.Array],
    batches: Iterable[Any],
    *,
    epochs: int = 5,
    groups: Groups = "leaf",
    learn_scale: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    layout: LayoutLike = None,
) -> LearnedMerge:
    r"""Learns how much of each model every leaf takes, on held-out data.

    :math:`\theta_\ell = \sum_i \mathrm{softmax}(A_\ell)_i\, \theta_{i,\ell}`, from equal shares.
    Memory is that of one training step, however many models there are: models whose leaves are
    NumPy arrays mapped from files are read leaf by leaf.

    Args:
      models: The ingredients, trees of one structure.
      loss: `loss(params, *batch)` for batches that are tuples or lists, else `loss(params, batch)`;
        a scalar such as the cross-entropy.
      batches: Held-out batches; gone through `epochs` times, so a list, not a generator, where
        that is more than once.
      epochs: Passes over the batches; 0 gives the uniform soup.
      groups: What shares coefficients, as in `mixture`.
      learn_scale: Whether a factor of the logits is learned beside, from 1: the loss is then
        called with the keyword `logit_scale`.
      optimizer: None takes AdamW with a learning rate of 0.05 and no weight decay.
      layout: As in `apply`, for `groups="layer"`.

    Returns:
      The soup, in the dtypes of the first model, its shares and the losses.

    Raises:
      ValueError: If the models do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> models = [{"bias": jnp.array([0.0])}, {"bias": jnp.array([4.0])}]
      >>> loss = lambda params, target: jnp.sum((params["bias"] - target) ** 2)
      >>> found = learned_soup(models, loss, [jnp.array([3.0])], epochs=200)
      >>> found.params["bias"].round(1)
      Array([3.], dtype=float32)

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482, appendix I.
    """
    import optax

    if not len(models):
        raise ValueError("merge.learned_soup: models is empty. Pass at least one.")
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"merge.learned_soup: epochs={epochs} must be a number of passes.")
    optimizer = optimizer or optax.adamw(0.05, weight_decay=0.0)
    # Shares sum to one, so that the base makes no difference; differences to it are small.
    mix = mixture(models[0], models, groups=groups, layout=layout)
    extra_loss = lambda params, scale, *batch: (  # noqa: E731
        loss(params, *batch, logit_scale=scale) if learn_scale else loss(params, *batch)
    )
    run = mix._value_and_grads(extra_loss)

    def gradients(learned: dict[str, jax.Array], batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        shares, pull = jax.vjp(_shares, learned["logits"])
        value, grad, of_scale = run(shares, learned["scale"], *_arguments(batch))
        return value, {"logits": pull(grad)[0], "scale": of_scale}

    learned = {"logits": mix.full(0.0), "scale": jnp.ones(())}
    steps = (batch for _ in range(epochs) for batch in batches)
    learned, losses = _descend(learned, gradients, steps, optimizer, lambda x: x)
    shares = _shares(learned["logits"])
    return LearnedMerge(mix.merge(shares), shares, mix.names, losses)


def adamerging(
    base: Params,
    models: Sequence[Params],
    fns: Callable[..., jax.Array] | Sequence[Callable[..., jax.Array]],
    batches: Iterable[Any],
    *,
    groups: Groups = "leaf",
    start: float = 0.3,
    optimizer: optax.GradientTransformation | None = None,
    layout: LayoutLike = None,
) -> LearnedMerge:
    """Learns coefficients of the deltas without labels, by making predictions certain.

    Minimises the mean entropy of the predictions on unlabelled batches of all tasks, with
    coefficients kept in [0, 1]. For the variant on trimmed deltas, trim the models first:
    `models = [apply(ties(density=0.2), base, models=[m]) for m in models]`.

    Args:
      base: The model that the deltas are taken from.
      models: The fine-tuned models.
      fns: `fn(params, *inputs)`, logits with the classes last: one per task, or one for all.
      batches: For a list of functions, sequences of one batch per task; for a single function,
        batches. One step each; the authors take 500.
      groups: `"leaf"` or `"layer"` (layer-wise), `"tree"` (task-wise), as in `mixture`.
      start: Coefficients at the start.
      optimizer: None takes Adam with a learning rate of 1e-3.
      layout: As in `apply`, for `groups="layer"`.

    Returns:
      The merged model, its coefficients and the entropies.

    Raises:
      ValueError: If the models do not match, or a step lacks a task's batch.

    Example:
      >>> import jax.numpy as jnp
      >>> base, model = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.array([[4.0, 0.0]])}
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> found = adamerging(base, [model], fn, [jnp.ones((1, 1))] * 20)
      >>> found.losses[-1] < found.losses[0], float(found.coefficients[0, 0]) > 0.3
      (True, True)

    Source: Yang et al. 2023, arXiv:2310.02575.
    """
    import optax

    if not 0 <= start <= 1:
        raise ValueError(f"merge.adamerging: start={start} must lie in [0, 1].")
    optimizer = optimizer or optax.adam(1e-3)
    mix: Mixture = mixture(base, models, groups=groups, layout=layout)
    single = callable(fns)
    tasks: Sequence[Callable[..., jax.Array]] = [fns] if callable(fns) else list(fns)

    def loss(params: Params, *parts: Any) -> jax.Array:
        entropies = [
            _entropy(fn(params, *_arguments(part))) for fn, part in zip(tasks, parts, strict=True)
        ]
        return sum(entropies[1:], start=entropies[0]) / len(tasks)

    run = mix.value_and_grad(loss)

    def gradients(coefficients: jax.Array, batch: Any) -> tuple[Any, jax.Array]:
        parts = (batch,) if single else tuple(batch)
        if len(parts) != len(tasks):
            raise ValueError(
                f"merge.adamerging: a step has {len(parts)} batches, but there are {len(tasks)} "
                "tasks. Pass one batch per task."
            )
        return run(coefficients, *parts)

    clamp = lambda coefficients: jnp.clip(coefficients, 0, 1)  # noqa: E731
    found, losses = _descend(mix.full(start), gradients, batches, optimizer, clamp)
    return LearnedMerge(mix.merge(found), found, mix.names, losses)


def _descend(
    learned: Any,
    gradients: Callable[[Any, Any], tuple[Any, Any]],
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    project: Callable[[Any], Any],
) -> tuple[Any, list[float]]:
    import optax

    @jax.jit
    def step(learned: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, learned)
        return project(optax.apply_updates(learned, updates)), state

    state, losses = optimizer.init(learned), []
    for batch in batches:
        value, grads = gradients(learned, batch)
        learned, state = step(learned, state, grads)
        losses.append(value)
    return learned, [float(x) for x in np.asarray(losses)]


def _shares(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits, axis=0)


def _entropy(logits: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def _arguments(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
