"""The diagonal Fisher information of a model, example by example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, fail, flatten, unflatten
from jaxweights.merge._models import check_choice
from jaxweights.weights._weight import is_weight

Batch = Any
Variant = Literal["exact", "sampled", "empirical"]

_NAME = "merge.diagonal_fisher"


def diagonal_fisher(
    fn: Callable[..., jax.Array],
    params: Params,
    batches: Iterable[Batch],
    *,
    variant: Variant = "sampled",
    key: jax.Array | None = None,
    samples: int = 1,
    labels: Callable[[Batch], jax.Array] | None = None,
    mask: Callable[[Batch], jax.Array] | None = None,
    examples_at_once: int = 1,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Params:
    r"""Averages the squared gradients of the log-likelihood over examples.

    .. math:: F = E_x \, E_{y \sim p(y|x)} \bigl[(\partial \log p(y|x) / \partial \theta)^2\bigr]

    The gradient of every example is squared by itself, which a batch's gradient cannot give. The
    positions of a sequence are the factors of one example's likelihood; their cross terms vanish in
    expectation.

    Args:
      fn: The model, called as `fn(params, *batch)` for a tuple or list, else `fn(params, batch)`;
        returns logits `(examples, *positions, classes)`.
      params: Its parameters.
      batches: Batches whose arrays have the examples in front, streamed once.
      variant: `"exact"` takes the expectation over all classes of every position, one backward pass
        each; `"sampled"` draws labels from the model's predictions (needs a key); `"empirical"`
        takes the labels of the data, which gives another matrix than Fisher's.
      key: Randomness of `"sampled"`.
      samples: Draws per example of `"sampled"`.
      labels: `labels(batch)`, integers `(examples, *positions)`, for `"empirical"`.
      mask: `mask(batch)`, bool `(examples, *positions)`: positions that count; None for all.
      examples_at_once: Examples whose gradients are held in memory together.
      progress: Called with ("diagonal_fisher", batches done, batches in all or None).

    Returns:
      A tree like `params`, float32, with zeros for leaves that are not floating. Save it with
      `jaxweights.checkpoint.save_tree`, or Orbax, so that merges need no data.

    Raises:
      TypeError: If `batches` is a single batch.
      ValueError: If there is no batch, or something that the variant needs is missing.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> model = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.zeros((1, 2))}  # both classes at one half
      >>> x = jnp.array([[1.0], [3.0]])
      >>> jw.merge.diagonal_fisher(model, params, [x], variant="exact")["kernel"].round(3)
      Array([[1.25, 1.25]], dtype=float32)

    Source: Matena and Raffel 2021, arXiv:2111.09832, equation 5.
    """
    check_choice(_NAME, "variant", variant, ("exact", "sampled", "empirical"))
    if variant == "sampled" and key is None:
        raise ValueError(
            f"{_NAME}: 'key' is missing: variant='sampled' draws labels. Pass "
            "key=jax.random.key(...), or variant='exact'."
        )
    if (variant == "empirical") != (labels is not None):
        raise ValueError(
            f"{_NAME}: variant={variant!r} with labels={labels}. labels=, a function of the batch, "
            "goes with variant='empirical', and only there."
        )
    for argument, count in (("samples", samples), ("examples_at_once", examples_at_once)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{_NAME}: {argument}={count} must be a positive integer.")
    refuse_one_batch(_NAME, batches)
    flat, structure = flatten(params)
    dense = [path for path, leaf in flat.items() if is_weight(leaf)]
    fail(_NAME, [f"{p!r}: is a represented weight. Pass materialize(params)." for p in dense])

    def log_probabilities(floats: Flat, example: Any) -> jax.Array:
        arguments = tuple(example) if isinstance(example, tuple | list) else (example,)
        one = jax.tree.map(lambda x: x[None], arguments)
        logits = fn(unflatten(structure, flat | floats), *one)[0]
        return jax.nn.log_softmax(logits.astype(jnp.float32).reshape(-1, logits.shape[-1]))

    @jax.jit
    def of_batch(floats: Flat, batch: Batch, key: jax.Array | None) -> Flat:
        count = _examples(batch)
        extra = {
            "keys": None if key is None else jax.random.split(key, count),
            "labels": None if labels is None else jnp.asarray(labels(batch)).reshape(count, -1),
            "keep": None if mask is None else jnp.asarray(mask(batch), bool).reshape(count, -1),
        }
        one = functools.partial(_of_example, log_probabilities, floats, variant, samples)
        return _sum_over_examples(one, (batch, extra), floats, count, examples_at_once)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Flat, new: Flat) -> Flat:
        return jax.tree.map(jnp.add, total, new)

    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
    total, examples = None, 0
    in_all = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    for i, batch in enumerate(batches):
        new = of_batch(floats, batch, None if key is None else jax.random.fold_in(key, i))
        total = new if total is None else add(total, new)
        examples += _examples(batch)
        if progress is not None:
            progress("diagonal_fisher", i + 1, in_all)
    if total is None or not examples:
        raise ValueError(f"{_NAME}: there is no example. Pass at least one batch.")
    means = {
        path: total[path] / examples if path in total else jnp.zeros(jnp.shape(leaf), jnp.float32)
        for path, leaf in flat.items()
    }
    return unflatten(structure, means)


def _examples(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _of_example(
    log_probabilities: Callable[[Flat, Any], jax.Array],
    floats: Flat,
    variant: Variant,
    samples: int,
    item: tuple[Any, dict[str, Any]],
) -> Flat:
    """Squared gradients of one example, in expectation over its labels."""
    example, extra = item
    # One forward pass; every label is then a backward pass of it.
    log_p, pull = jax.vjp(lambda f: log_probabilities(f, example), floats)  # (positions, classes)
    positions, classes = log_p.shape
    keep = jnp.ones(positions) if extra["keep"] is None else extra["keep"].astype(jnp.float32)
    if variant == "exact":
        # The root of p on the cotangent is p on the square.
        sizes = (jnp.exp(log_p / 2) * keep[:, None]).reshape(-1)
        cotangent_of = lambda i: (  # noqa: E731
            jnp.zeros(sizes.shape).at[i].set(sizes[i]).reshape(log_p.shape)
        )
        count, share = sizes.size, 1.0
    else:
        if variant == "sampled":
            drawn = jax.random.categorical(extra["keys"], log_p, shape=(samples, positions))
        else:
            drawn = extra["labels"][None]
        cotangent_of = lambda i: jax.nn.one_hot(drawn[i], classes) * keep[:, None]  # noqa: E731
        count, share = drawn.shape[0], 1.0 / drawn.shape[0]

    def step(total: Flat, i: jax.Array) -> tuple[Flat, None]:
        (grads,) = pull(cotangent_of(i))
        squares = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)
        return jax.tree.map(jnp.add, total, squares), None

    total, _ = jax.lax.scan(step, _zeros(floats), jnp.arange(count))
    return jax.tree.map(lambda x: share * x, total)


def _sum_over_examples(
    one: Callable[[Any], Flat], items: Any, floats: Flat, count: int, at_once: int
) -> Flat:
    """Sums over examples, of which `at_once` are held at a time."""
    at_once = min(at_once, count)
    whole = count // at_once * at_once
    several = lambda part: jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(part))  # noqa: E731

    def step(total: Flat, part: Any) -> tuple[Flat, None]:
        return jax.tree.map(jnp.add, total, several(part)), None

    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, at_once, *x.shape[1:]), items)
    total, _ = jax.lax.scan(step, _zeros(floats), parts)
    if whole < count:
        total, _ = step(total, jax.tree.map(lambda x: x[whole:], items))
    return total


def _zeros(floats: Flat) -> Flat:
    return {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in floats.items()}
