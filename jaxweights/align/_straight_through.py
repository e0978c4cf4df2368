"""straight_through_matching: the permutation whose midpoint has the lowest loss, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.align._descent import Descent
from jaxweights.align._permute import check_permutations, permute_flat
from jaxweights.align._spec import Permutations, PermutationSpec
from jaxweights.align._weight_matching import check_pair, draw_orders
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, flatten, unflatten
from jaxweights.merge._models import compute_dtype


class StraightThrough(NamedTuple):
    """What `straight_through_matching` found.

    Attributes:
      permutations: Those with the lowest loss halfway, by name, int32 `(*stack, size)`.
      loss: That loss.
      step: When they were met.
      losses: Loss halfway at every step, float64.
    """

    permutations: dict[str, np.ndarray]
    loss: float
    step: int
    losses: np.ndarray


def straight_through_matching(
    spec: PermutationSpec,
    loss_fn: Callable[[Params, Any], Any],
    params_a: Params,
    params_b: Params,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    optimizer: Any = None,
    start: Permutations | None = None,
    score_fn: Callable[[Params], Any] | None = None,
    max_sweeps: int = 100,
) -> StraightThrough:
    """Learns a permutation of `params_b` under which the midpoint to `params_a` has a low loss.

    A proxy model starts at `params_a`. At every step `params_b` is matched to it, from where the
    last match ended; the loss is that of the model halfway between `params_a` and the permuted
    `params_b`, and its gradient moves the proxy as if it were the permuted model. The best
    permutation met is kept. Every step costs a weight matching: this finds the lowest midpoints
    and takes by far the longest.

    Args:
      spec: Names the axes.
      loss_fn: `(params, batch) -> scalar`; it is traced.
      params_a: The model that stays.
      params_b: The model to renumber.
      batches: Training data, one batch a step.
      key: Draws the orders of the matches.
      optimizer: Moves the proxy; an optax transformation. None takes SGD with learning rate 0.01
        and momentum 0.9.
      start: Permutations to start from; None starts with none.
      score_fn: Loss of the model halfway, by which the best is kept; it is called when the
        permutation changes. None goes by the loss of the batch, which is noisy.
      max_sweeps: Most sweeps of a single match.

    Returns:
      The best permutations and the losses.

    Raises:
      ValueError: If there is no data, a model does not fit the spec, or no loss is finite.

    Example:
      >>> a = {"up": jax.random.normal(jax.random.key(0), (4, 6)), "down": jnp.ones((6, 1))}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = jw.align.PermutationSpec.of(a, axes)
      >>> b = jw.align.apply_permutation(spec, a, {"hidden": jnp.array([2, 0, 1, 5, 3, 4])})
      >>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> loss_fn = lambda params, x: jnp.mean((model(params, x) - model(a, x)) ** 2)
      >>> data = [jax.random.normal(jax.random.key(1), (64, 4))] * 3
      >>> found = jw.align.straight_through_matching(
      ...     spec, loss_fn, a, b, data, key=jax.random.key(2))
      >>> found.loss < 1e-12
      True

    Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836, section 3.3.
    """
    import optax

    name = "align.straight_through_matching"
    check_pair(name, spec, params_a, params_b)
    if max_sweeps < 1:
        raise ValueError(f"{name}: max_sweeps={max_sweeps} must be at least 1.")
    optimizer = optax.sgd(1e-2, momentum=0.9) if optimizer is None else optimizer
    (ours, structure), theirs = flatten(params_a), flatten(params_b)[0]
    seed = np.asarray(jax.random.bits(key, (4,), "uint32"))
    orders = draw_orders(spec, np.random.default_rng(seed))
    learned = {path: x for path, x in ours.items() if is_float(x)}
    proxy = {path: jnp.asarray(x, compute_dtype(x)) for path, x in learned.items()}
    fixed = {path: x for path, x in ours.items() if path not in learned}
    state = optimizer.init(proxy)

    def whole(middle: Flat) -> Params:
        return unflatten(structure, {path: middle.get(path, fixed.get(path)) for path in ours})

    @jax.jit
    def step(proxy: Flat, state: Any, permuted: Flat, batch: Any) -> tuple[Any, ...]:
        def loss_of(proxy: Flat) -> Any:
            straight = {p: permuted[p] + x - jax.lax.stop_gradient(x) for p, x in proxy.items()}
            return loss_fn(whole(_halfway(learned, straight)), batch)

        loss, grads = jax.value_and_grad(loss_of)(proxy)
        updates, state = optimizer.update(grads, state, proxy)
        return optax.apply_updates(proxy, updates), state, loss

    current = spec.identity() | check_permutations(name, spec, start or {})
    permuted = permute_flat(spec, theirs, current)
    best: tuple[float, int, dict[str, np.ndarray]] | None = None
    losses: list[float] = []
    scored: dict[bytes, float] = {}
    for i, batch in enumerate(batches):
        descent = Descent(name, spec, proxy | fixed, permuted, current)
        descent.run(orders, max_sweeps)
        current, permuted = descent.permutations, permuted | descent.theirs
        wide = {p: jnp.asarray(permuted[p], x.dtype) for p, x in proxy.items()}
        proxy, state, loss = step(proxy, state, wide, batch)
        losses.append(float(loss))
        score = losses[-1]
        if score_fn is not None:
            mark = b"".join(np.ascontiguousarray(current[key]).tobytes() for key in spec.names)
            if mark not in scored:
                scored[mark] = float(score_fn(whole(_halfway(learned, wide))))
            score = scored[mark]
        if np.isfinite(score) and (best is None or score < best[0]):
            best = score, i, current
    if not losses:
        raise ValueError(f"{name}: batches is empty. Pass at least one batch.")
    if best is None:
        raise ValueError(f"{name}: no loss was finite. Check the models and the loss.")
    return StraightThrough(best[2], best[0], best[1], np.array(losses))


def _halfway(ours: Flat, theirs: Flat) -> Flat:
    """The midpoint, in the dtypes of the first model."""
    return {
        path: ((a.astype(theirs[path].dtype) + theirs[path]) / 2).astype(a.dtype)
        for path, a in ours.items()
    }
