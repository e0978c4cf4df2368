"""Task vectors and their sums."""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Params, flatten, unflatten
from jaxweights.core._transform import Transform
from jaxweights.merge._delta import DeltaSettings, delta_merge
from jaxweights.merge._models import compute_dtype, require_models


def task_arithmetic(*, normalize: bool = False, **settings: Unpack[DeltaSettings]) -> Transform:
    r"""Adds the weighted sum of the models' deltas to the base.

    :math:`\theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)`. A negative weight takes a skill
    away; weights `(1, 1, -1)` complete an analogy.

    Args:
      normalize: Whether to divide by the sum of |weights|.
      **settings: `weights`, `scale` (λ; 0.3 to 0.5 for sums of many tasks), `names`, `out_dtype`,
        `rounding`, `nonfloat`, as in `delta_merge`.

    Returns:
      The transform.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base, model = {"kernel": jnp.ones((1, 2))}, {"kernel": jnp.array([[1.0, 3.0]])}
      >>> jw.apply(jw.merge.task_arithmetic(scale=0.5), base, models=[model])["kernel"]
      Array([[1., 2.]], dtype=float32)

    Source: Ilharco et al. 2022, arXiv:2212.04089.
    """
    return delta_merge(
        normalize="models" if normalize else "none", name="merge.task_arithmetic", **settings
    )


def task_vector(model: Params, base: Params) -> Params:
    """Subtracts the base from a model, in float32.

    A tree like any other: scale, add and subtract task vectors with `jax.tree.map`.

    Args:
      model: The fine-tuned model.
      base: The model that it was tuned from.

    Returns:
      The deltas, with the structure of the base; zero for leaves that are not floating.

    Raises:
      ValueError: If the trees do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> task_vector({"b": jnp.array([3.0])}, {"b": jnp.array([1.0])})["b"]
      Array([2.], dtype=float32)
    """
    flat, structure = flatten(base)
    context = Context(models=(flatten(model)[0],))
    (other,) = require_models("merge.task_vector", flat, context, None, delta=False)
    deltas = {
        path: other[path].astype(compute_dtype(leaf)) - leaf.astype(compute_dtype(leaf))
        if is_float(leaf)
        else jnp.zeros(jnp.shape(leaf), jnp.float32)
        for path, leaf in flat.items()
    }
    return unflatten(structure, deltas)


def add_task_vector(base: Params, vector: Params, *, scale: float | jax.Array = 1.0) -> Params:
    """Adds a task vector to a model, in float32 with one cast.

    Args:
      base: The model.
      vector: From `task_vector`, or a sum of such.
      scale: Multiplies the vector; -1 takes it away.

    Returns:
      The model, in the dtypes of `base`; leaves that are not floating are kept.

    Raises:
      ValueError: If the trees do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> add_task_vector({"b": jnp.array([1.0])}, {"b": jnp.array([2.0])}, scale=-1)["b"]
      Array([-1.], dtype=float32)
    """
    flat, structure = flatten(base)
    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
    context = Context(models=(flatten(vector)[0],))
    (deltas,) = require_models("merge.add_task_vector", floats, context, None, delta=False)
    new = dict(flat)
    for path, leaf in floats.items():
        dtype = compute_dtype(leaf)
        moved = leaf.astype(dtype) + jnp.asarray(scale, dtype) * deltas[path].astype(dtype)
        new[path] = moved.astype(leaf.dtype)
    return unflatten(structure, new)
