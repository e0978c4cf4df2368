"""activation_matching: units are paired by what they compute on data, not by their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.align._assignment import best_assignment
from jaxweights.align._permute import follow
from jaxweights.align._spec import PermutationSpec
from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._paths import Params, fail

Activations = Mapping[str, jax.Array]
Measure = Literal["correlation", "covariance", "product"]


class ActivationMatching(NamedTuple):
    """What `activation_matching` found.

    Attributes:
      permutations: By name, int32 `(*stack, size)`; `apply_permutation` takes them to the second
        model.
      before: Mean similarity of units of the same number, by name.
      after: Mean similarity of the units that were paired, by name.
    """

    permutations: dict[str, np.ndarray]
    before: dict[str, float]
    after: dict[str, float]


class Moments(NamedTuple):
    """Sums over samples, float32; `*stack` is that of the permutation.

    Attributes:
      count: Samples, float32 scalar.
      cross: Sum of the products of what both models' units deviate, `(*stack, n, n)`.
      ours: Sum of the squares of the first model's deviations, `(*stack, n)`.
      theirs: As `ours`, of the second.
    """

    count: jax.Array
    cross: jax.Array
    ours: jax.Array
    theirs: jax.Array


def activation_matching(
    spec: PermutationSpec,
    activations_fn: Callable[[Params, Any], Activations],
    params_a: Params,
    params_b: Params,
    batches: Iterable[Any],
    *,
    measure: Measure = "correlation",
) -> ActivationMatching:
    """Renumbers the units of `params_b` so that paired units do alike on data.

    One exact assignment a permutation, on correlations over all samples. Means are taken in a first
    pass over the data and deviations from them in a second, both in float32; a unit that is
    constant in either model correlates with none. Permutations inside heads are matched after
    those of the heads, with two passes of their own.

    Args:
      spec: Names the axes.
      activations_fn: `(params, batch) -> {permutation: activations}` of shape `(*stack, ...,
        size)`, all axes between being samples; what it does not return stays. It is jitted.
      params_a: The model that stays.
      params_b: The model to renumber.
      batches: Data, read several times: a list, or an object that can be iterated anew.
      measure: What pairs are valued by: Pearson's `"correlation"`, the `"covariance"`, or the
        plain `"product"`, which needs one pass.

    Returns:
      The permutations, and the mean similarity before and after.

    Raises:
      TypeError: If `batches` is a single batch.
      ValueError: If there is no data, it can be read only once, or activations have another shape
        than their permutation or are not finite.

    Example:
      >>> a = {"up": jax.random.normal(jax.random.key(0), (4, 6))}
      >>> spec = jw.align.PermutationSpec.of(a, {"up": (None, "hidden")})
      >>> b = jw.align.apply_permutation(spec, a, {"hidden": jnp.array([2, 0, 1, 5, 3, 4])})
      >>> fn = lambda params, x: {"hidden": jnp.tanh(x @ params["up"])}
      >>> data = [jax.random.normal(jax.random.key(1), (64, 4))]
      >>> found = jw.align.activation_matching(spec, fn, a, b, data)
      >>> found.permutations["hidden"].tolist()
      [1, 2, 0, 4, 5, 3]

    Source: Li et al. 2016, Convergent learning, arXiv:1511.07543; Ainsworth et al. 2022,
    arXiv:2209.04836, section 3.1 (`measure="product"`).
    """
    name = "align.activation_matching"
    if measure not in ("correlation", "covariance", "product"):
        raise ValueError(
            f"{name}: measure={measure!r} is none of 'correlation', 'covariance', 'product'."
        )
    spec.check(params_a, f"{name}: params_a")
    spec.check(params_b, f"{name}: params_b")
    refuse_one_batch(name, batches)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name}: batches is an iterator, which can be read only once. Pass a list, or an "
            "object that can be iterated anew."
        )
    run = jax.jit(activations_fn)
    permutations = spec.identity()
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for names in _levels(spec):
        passes = _Passes(name, spec, run, params_a, params_b, names, permutations)
        found = passes.moments(batches, centred=measure != "product")
        moves = {}
        for key, moment in found.items():
            similarity = np.asarray(_similarity(moment, measure=measure))
            moves[key], before[key], after[key] = _solve(similarity)
        permutations = follow(spec, permutations, moves)
    return ActivationMatching(permutations, before, after)


def _levels(spec: PermutationSpec) -> list[list[str]]:
    """Permutations by how deep they lie in others."""
    depth: dict[str, int] = {}
    for name in spec.names:
        inside = [depth[above] + 1 for above in spec.over.get(name, ()) if above in depth]
        depth[name] = max(inside, default=0)
    return [[x for x in depth if depth[x] == i] for i in range(max(depth.values(), default=-1) + 1)]


class _Passes:
    """Passes over the data for some of the permutations."""

    def __init__(
        self,
        name: str,
        spec: PermutationSpec,
        run: Callable[[Params, Any], Activations],
        params_a: Params,
        params_b: Params,
        names: Sequence[str],
        permutations: dict[str, np.ndarray],
    ) -> None:
        self.name, self.spec, self.run = name, spec, run
        self.params_a, self.params_b, self.names = params_a, params_b, names
        # The other model's activations are read as if it had been permuted so far.
        self.permutations = permutations

    def _pairs(self, batches: Iterable[Any]) -> Iterator[dict[str, tuple[jax.Array, jax.Array]]]:
        """Activations of both models, `(*stack, samples, n)`."""
        seen = False
        for batch in batches:
            seen = True
            ours, theirs = self.run(self.params_a, batch), self.run(self.params_b, batch)
            fail(self.name, self._problems(ours))
            yield {
                name: (self._samples(name, ours[name]), self._moved(name, theirs[name]))
                for name in self.names
                if name in ours
            }
        if not seen:
            raise ValueError(f"{self.name}: batches is empty. Pass at least one batch.")

    def _problems(self, found: Activations) -> list[str]:
        unknown = [
            f"activations_fn returned {key!r}, which is no permutation of the spec: "
            f"{', '.join(map(repr, self.spec.names))}."
            for key in found
            if key not in self.spec.sizes
        ]
        wanted = {key: self.spec.shape_of(key) for key in found if key in self.spec.sizes}
        return unknown + [
            f"{key!r}: activations have shape {found[key].shape}. Expected {shape[:-1]} in front "
            f"and {shape[-1]} at the end, with samples between."
            for key, shape in wanted.items()
            if found[key].ndim <= len(shape) - 1
            or (*found[key].shape[: len(shape) - 1], found[key].shape[-1]) != shape
        ]

    def _samples(self, name: str, x: jax.Array) -> jax.Array:
        shape = self.spec.shape_of(name)
        return x.reshape(*shape[:-1], -1, shape[-1])

    def _moved(self, name: str, x: jax.Array) -> jax.Array:
        """The other model's units, in the places that outer permutations have given them."""
        x = self._samples(name, x)
        for axis, above in enumerate(self.spec.over.get(name, ())):
            if above in self.permutations:
                index = self.permutations[above]
                index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
                x = jnp.take_along_axis(x, jnp.asarray(index), axis=axis)
        return x

    def moments(self, batches: Iterable[Any], *, centred: bool) -> dict[str, Moments]:
        """Sums over the data of products of deviations from the mean, or from zero."""
        means: dict[str, Any] = {}
        total = 0
        for pairs in self._pairs(batches) if centred else ():
            count = next(iter(pairs.values()))[0].shape[-2] if pairs else 0
            total += count
            for name, (ours, theirs) in pairs.items():
                old = means.get(name, (0.0, 0.0))
                share = jnp.float32(ours.shape[-2]) / total
                means[name] = _next_mean(old, ours, theirs, share)
        sums: dict[str, Moments] = {}
        for pairs in self._pairs(batches):
            for name, (ours, theirs) in pairs.items():
                new = _moments(ours, theirs, means.get(name, (0.0, 0.0)))
                sums[name] = jax.tree.map(jnp.add, sums[name], new) if name in sums else new
        bad = [name for name, x in sums.items() if not bool(jnp.isfinite(x.cross).all())]
        fail(self.name, [f"{name!r}: activations are not finite. Check the model." for name in bad])
        return sums


@jax.jit
def _next_mean(
    old: tuple[Any, Any], ours: jax.Array, theirs: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean moved towards that of a batch, by the batch's share of all samples so far."""

    def move(mean: Any, x: jax.Array) -> jax.Array:
        batch = jnp.mean(x.astype(jnp.float32), axis=-2)
        return mean + (batch - mean) * share

    return move(old[0], ours), move(old[1], theirs)


@jax.jit
def _moments(ours: jax.Array, theirs: jax.Array, means: tuple[Any, Any]) -> Moments:
    def deviations(x: jax.Array, mean: Any) -> jax.Array:
        mean = jnp.asarray(mean, jnp.float32)
        x = x.astype(jnp.float32)
        # What is left of a constant is rounding: it is none of its deviation.
        left = x - (mean[..., None, :] if mean.ndim else mean)
        noise = 4 * jnp.finfo(jnp.float32).eps * jnp.abs(mean)
        # NaN is no rounding: it has to show.
        return jnp.where(jnp.abs(left) <= (noise[..., None, :] if mean.ndim else noise), 0.0, left)

    a, b = deviations(ours, means[0]), deviations(theirs, means[1])
    return Moments(
        jnp.float32(a.shape[-2]),
        jnp.einsum("...sn,...sm->...nm", a, b, precision="highest"),
        jnp.sum(a * a, axis=-2),
        jnp.sum(b * b, axis=-2),
    )


@functools.partial(jax.jit, static_argnames="measure")
def _similarity(moments: Moments, *, measure: Measure) -> jax.Array:
    if measure != "correlation":
        return moments.cross / moments.count

    def inverse(squares: jax.Array) -> jax.Array:
        alive = squares > 0
        return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, squares, 1.0)), 0.0)

    ours, theirs = inverse(moments.ours), inverse(moments.theirs)
    return moments.cross * ours[..., :, None] * theirs[..., None, :]


def _solve(similarity: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The assignments of a stack, and the mean similarity of pairs before and after."""
    n = similarity.shape[-1]
    flat = similarity.reshape(-1, n, n)
    solved = [best_assignment(matrix) for matrix in flat]
    before = np.mean([matrix.diagonal().mean() for matrix in flat])
    gain = np.mean([gain for _, gain in solved]) / n
    moves = np.stack([move for move, _ in solved]).reshape(similarity.shape[:-1])
    return moves, float(before), float(before + gain)
