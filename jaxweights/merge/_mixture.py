"""Mixtures: merges as functions of their coefficients, with exact gradients in little memory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, Path, flatten, unflatten
from jaxweights.merge._models import Output, check_choice, compute_dtype, require_models
from jaxweights.merge._stacks import stack_axes

Groups = Literal["tree", "leaf", "layer"] | Callable[[Path], str]

_NAME = "merge.mixture"
_STATIC = {"static": True}


class _LeafGroups(NamedTuple):
    """The groups of one leaf: one, or one per index of its stack axes."""

    path: Path
    stack: tuple[int, ...]
    ids: tuple[int, ...]  # flattened over the stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    r"""A base, the deltas of N models to it, and which coefficient multiplies what.

    :math:`\theta(\lambda) = \theta_0 + \sum_i \lambda_{i,g} (\theta_i - \theta_0)` for every leaf
    (or layer of a stacked leaf) of group g; coefficients are `(models, groups)`.

    A pytree, so that it can be an argument of a jitted function; built by `mixture`.

    Args:
      base: The base.
      models: The models, as flat trees. NumPy arrays mapped from files are read leaf by leaf.
      names: Names of the groups.
      leaves: Which groups every floating leaf belongs to.
      out_dtype: Dtype of merged floating leaves; None keeps the base's.
    """

    base: Params
    models: tuple[Flat, ...]
    names: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    leaves: tuple[_LeafGroups, ...] = dataclasses.field(metadata=_STATIC)
    out_dtype: Any = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the coefficients: models and groups."""
        return len(self.models), len(self.names)

    def full(self, value: float) -> jax.Array:
        """Coefficients that are all `value`, float32."""
        return jnp.full(self.shape, value, jnp.float32)

    def merge(self, coefficients: jax.Array) -> Params:
        """The merged model; differentiable, under `jit` and `vmap` too.

        Args:
          coefficients: `(models, groups)`.

        Returns:
          A tree like the base.
        """
        coefficients = self._checked(coefficients)
        flat, structure = flatten(self.base)
        new = dict(flat)
        for leaf in self.leaves:
            base = flat[leaf.path]
            merged = before = jnp.asarray(base).astype(compute_dtype(base))
            for i, model in enumerate(self.models):
                share = coefficients[i, np.asarray(leaf.ids)]
                _settle(before)
                before = merged
                merged = _add_delta(merged, base, model[leaf.path], share, stack=leaf.stack)
            new[leaf.path] = merged.astype(self.out_dtype or base.dtype)
        return unflatten(structure, new)

    def value_and_grad(self, loss: Callable[..., Any]) -> Callable[..., tuple[Any, jax.Array]]:
        r"""Loss and its exact gradient in the coefficients, in memory that does not grow with N.

        One ordinary backward pass of the model gives :math:`G = \nabla_\theta L`; then
        :math:`\partial L / \partial \lambda_{i,g} = \sum_{leaf \in g} \langle G, \tau_i \rangle`,
        one leaf of one model at a time. What is alive is the merged model, its gradient and one
        leaf.

        Args:
          loss: `loss(params, *args)`, a scalar.

        Returns:
          `f(coefficients, *args) -> (loss, gradient (models, groups))`, compiled once. It is for
          the host; within `jit`, `jax.grad` of `merge` gives the same with all models resident.
        """
        run = self._value_and_grads(lambda params, extra, *args: loss(params, *args))

        def value_and_grad(coefficients: jax.Array, *args: Any) -> tuple[Any, jax.Array]:
            value, grad, _ = run(coefficients, jnp.zeros(()), *args)
            return value, grad

        return value_and_grad

    def evaluate(self, fn: Callable[..., Any], *, at_once: int = 1) -> Callable[..., Any]:
        """Evaluates many coefficients in one compiled call.

        Args:
          fn: `fn(params, *args)`, a pytree of arrays.
          at_once: Merged models that are in memory together, under `vmap`.

        Returns:
          `f(population (points, models, groups), *args)`: what `fn` returns, with the points in
          front; compiled once.
        """
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"{_NAME}: at_once={at_once} must be a positive integer.")

        @jax.jit
        def run(mixture: Mixture, population: jax.Array, args: tuple[Any, ...]) -> Any:
            one = lambda coefficients: fn(mixture.merge(coefficients), *args)  # noqa: E731
            return jax.lax.map(one, population, batch_size=at_once)

        return lambda population, *args: run(self, jnp.asarray(population, jnp.float32), args)

    def _checked(self, coefficients: Any) -> jax.Array:
        if np.shape(coefficients) != self.shape:
            raise ValueError(
                f"{_NAME}: coefficients have shape {np.shape(coefficients)}, but there are "
                f"{self.shape[0]} models and {self.shape[1]} groups. Pass shape {self.shape}; "
                "`full` gives such an array."
            )
        return jnp.asarray(coefficients)

    def _value_and_grads(self, loss: Callable[..., Any]) -> Callable[..., tuple[Any, Any, Any]]:
        """As `value_and_grad`, of `loss(params, extra, *args)`, and the gradient in `extra`."""
        paths = [leaf.path for leaf in self.leaves]

        @jax.jit
        def backward(params: Params, extra: Any, args: tuple[Any, ...]) -> Any:
            flat, structure = flatten(params)
            of = lambda floats, extra: loss(unflatten(structure, flat | floats), extra, *args)  # noqa: E731
            return jax.value_and_grad(of, argnums=(0, 1))({p: flat[p] for p in paths}, extra)

        def run(coefficients: jax.Array, extra: Any, *args: Any) -> tuple[Any, Any, Any]:
            value, (grads, of_extra) = backward(self.merge(coefficients), extra, args)
            return value, self._along_deltas(grads), of_extra

        return run

    def _along_deltas(self, grads: Flat) -> jax.Array:
        """Dot products of a gradient with every delta, per group; `(models, groups)`."""
        flat, _ = flatten(self.base)
        ids = np.concatenate([leaf.ids for leaf in self.leaves])
        rows = []
        for model in self.models:
            dots = []
            for path, stack, _ in self.leaves:
                _settle(*dots[-2:-1])
                dots.append(_dot_delta(grads[path], flat[path], model[path], stack=stack))
            rows.append(jax.ops.segment_sum(jnp.concatenate(dots), ids, len(self.names)))
        return jnp.stack(rows)


def mixture(
    base: Params,
    models: Sequence[Params],
    *,
    groups: Groups = "tree",
    layout: LayoutLike = None,
    out_dtype: DTypeLike | None = None,
) -> Mixture:
    """Prepares a merge whose coefficients are varied: learned, searched or drawn on a grid.

    Args:
      base: The model that the deltas are taken from.
      models: The fine-tuned models. For large ones, NumPy arrays that map files.
      groups: What shares a coefficient: the whole `"tree"` (one per model, task-wise), every
        `"leaf"`, every `"layer"` of every leaf (stacked layers and experts apart), or a function
        from paths to names of groups.
      layout: As in `apply`, for `"layer"`.
      out_dtype: Dtype of merged floating leaves; None keeps the base's.

    Returns:
      The mixture.

    Raises:
      ValueError: If a model does not fit the base.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"bias": jnp.zeros(2)}
      >>> mix = mixture(base, [{"bias": jnp.array([1.0, 0.0])}, {"bias": jnp.array([0.0, 2.0])}])
      >>> mix.merge(jnp.array([[0.5], [1.0]]))["bias"]
      Array([0.5, 2. ], dtype=float32)
      >>> loss = lambda params: jnp.sum(params["bias"])
      >>> mix.value_and_grad(loss)(mix.full(0.3))[1].tolist()
      [[1.0], [2.0]]

    Source: Ilharco et al. 2022, arXiv:2212.04089; Yang et al. 2023, arXiv:2310.02575.
    """
    if not callable(groups):
        check_choice(_NAME, "groups", groups, ("tree", "leaf", "layer"))
    output = Output.checked(_NAME, out_dtype, "nearest", "base")
    flat, _ = flatten(base)
    trees = tuple(flatten(model)[0] for model in models)
    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
    trees = require_models(_NAME, floats, Context(models=trees), None, delta=False)
    stacks: dict[Path, tuple[int, ...]] = dict.fromkeys(floats, ())
    if groups == "layer":
        stacks = stack_axes(_NAME, floats, resolve_layout(base, layout))
    names: dict[str, int] = {}
    leaves = []
    for path, leaf in floats.items():
        titles = _titles(path, [leaf.shape[a] for a in stacks[path]], groups)
        ids = tuple(names.setdefault(title, len(names)) for title in titles)
        leaves.append(_LeafGroups(path, stacks[path], ids))
    kept = tuple({path: tree[path] for path in floats} for tree in trees)
    return Mixture(base, kept, tuple(names), tuple(leaves), output.dtype)


def _titles(path: Path, stack: list[int], groups: Groups) -> list[str]:
    if callable(groups):
        return [groups(path)]
    if groups == "tree":
        return ["tree"]
    if not stack:
        return [path]
    indices = np.ndindex(*stack)
    return [f"{path}[{','.join(map(str, index))}]" for index in indices]


def _settle(*arrays: jax.Array) -> None:
    """Waits, so that no more than two leaves are on their way to the device at a time."""
    for x in arrays:
        if not isinstance(x, Tracer | jax.ShapeDtypeStruct):
            jax.block_until_ready(x)


@functools.partial(jax.jit, static_argnames="stack")
def _add_delta(
    merged: jax.Array, base: Any, model: Any, shares: jax.Array, *, stack: tuple[int, ...]
) -> jax.Array:
    """One model's delta added; `shares` has one coefficient per index of the stack."""
    sizes = [n if a in stack else 1 for a, n in enumerate(merged.shape)]
    share = shares.astype(merged.dtype).reshape(sizes)
    return merged + share * (model.astype(merged.dtype) - base.astype(merged.dtype))


@functools.partial(jax.jit, static_argnames="stack")
def _dot_delta(grad: Any, base: Any, model: Any, *, stack: tuple[int, ...]) -> jax.Array:
    """Dot product of a gradient with a delta, per index of the stack, flattened."""
    dtype = compute_dtype(base)
    product = grad.astype(dtype) * (model.astype(dtype) - base.astype(dtype))
    axes = tuple(a for a in range(product.ndim) if a not in stack)
    entries = math.prod(product.shape[a] for a in stack)
    return jnp.sum(product, axis=axes).reshape(entries).astype(jnp.float32)
