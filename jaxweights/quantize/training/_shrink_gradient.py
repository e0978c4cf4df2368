"""shrink_gradient: a value that learns more slowly."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax

from jaxweights.core._layout import conventional_layout
from jaxweights.core._paths import (
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    nearest,
    unflatten,
)
from jaxweights.quantize._settings import check_share

if TYPE_CHECKING:
    import optax

_DEFAULT = 0.1  # of GLM-130B


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def shrink_gradient(x: jax.Array, alpha: float = _DEFAULT) -> jax.Array:
    r"""Returns a value unchanged and multiplies its gradient.

    What :math:`\alpha x + (1 - \alpha)\,\mathrm{stop\_gradient}(x)` means, without its rounding.

    Args:
      x: Any array, such as the looked-up rows of an embedding.
      alpha: What the gradient is multiplied with.

    Returns:
      `x`.

    Example:
      >>> value, gradient = jax.value_and_grad(shrink_gradient)(3.0, 0.5)
      >>> float(value), float(gradient)
      (3.0, 0.5)

    Source: Zeng et al. 2022, arXiv:2210.02414, section 2.2.
    """
    del alpha
    return x


@shrink_gradient.defjvp
def _shrink_gradient_jvp(alpha: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], alpha * tangents[0]


def shrink_embedding_gradients(
    alpha: float = _DEFAULT, *, embeddings: str | None = None
) -> optax.GradientTransformation:
    """Multiplies the gradients of embedding tables, against spikes of the loss in long trainings.

    Put it first in an `optax.chain`: after Adam, which forgets the size of gradients, it would
    scale the learning rate instead.

    Args:
      alpha: What gradients are multiplied with, 0 to 1.
      embeddings: Regular expression for the whole paths of the tables; None takes the leaves that
        are named like embeddings.

    Returns:
      The optax transformation.

    Raises:
      TypeError: If `embeddings` is no string.
      ValueError: If `alpha` is out of range; at `init`, if there is no such leaf.

    Example:
      >>> import optax
      >>> optimizer = optax.chain(jw.quantize.shrink_embedding_gradients(0.5), optax.sgd(1.0))
      >>> params = {"embedding": jnp.zeros((2, 1)), "head": {"kernel": jnp.zeros((1, 2))}}
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> updates["embedding"].tolist(), updates["head"]["kernel"].tolist()
      ([[-0.5], [-0.5]], [[-1.0, -1.0]])

    Source: Zeng et al. 2022, arXiv:2210.02414, section 2.2.
    """
    import optax

    name = "quantize.shrink_embedding_gradients"
    check_share(name, alpha=alpha)
    if embeddings is not None:
        check_pattern(f"{name}: embeddings", embeddings)

    def init(params: Params) -> optax.EmptyState:
        _tables(name, params, embeddings)
        return optax.EmptyState()

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        del params
        flat, structure = flatten(updates)
        for path in _tables(name, updates, embeddings):
            flat[path] = alpha * flat[path]
        return unflatten(structure, flat), state

    return optax.GradientTransformation(init, update)


def _tables(name: str, params: Params, embeddings: str | None) -> list[Path]:
    paths = flatten(params)[0]
    if embeddings is not None:
        found = matching(embeddings, paths)
        advice = (
            f"pattern {embeddings!r} matches no leaf. The nearest: {nearest(embeddings, paths)}."
        )
    else:
        layout = conventional_layout(params)
        found = [path for path, axes in layout.items() if axes.kind == "embedding"]
        advice = (
            f"no leaf is named like an embedding; there are {list(paths)[:5]}. Name the tables by "
            "embeddings='<regular expression>'."
        )
    fail(name, [] if found else [advice])
    return found
