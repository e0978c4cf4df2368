"""One function behind task arithmetic, TIES, DARE, DELLA and Breadcrumbs: rows of one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, Path, flatten, path_key, unflatten
from jaxweights.core._transform import Scope as TransformScope
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._delta_leaf import (
    Combine,
    Compat,
    Consensus,
    Normalize,
    Rescale,
    Row,
    Scope,
    SignTies,
    Sparsifier,
    merge_delta_leaf,
)
from jaxweights.merge._delta_tree import DeltaJob, PerModel
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    check_names,
    check_weights,
    compute_dtype,
    merge_leaves,
    require_models,
    selected,
)


class DeltaMerge(NamedTuple):
    """What a row of the table was asked to do; a stream does it slice by slice."""

    row: Row
    density: PerModel
    outliers: PerModel
    epsilon: PerModel
    trim: PerModel
    weights: Any
    scale: Any
    names: Sequence[str] | None
    output: Output
    name: str


class DeltaSettings(TypedDict, total=False):
    """What every row of the table takes besides its own choices; see `delta_merge`."""

    weights: Weights
    scale: float | jax.Array
    names: Sequence[str] | None
    out_dtype: DTypeLike | None
    rounding: Rounding
    nonfloat: Nonfloat


def delta_merge(
    *,
    sparsifier: Sparsifier = "none",
    density: PerModel = 1.0,
    outliers: PerModel = 0.0,
    epsilon: PerModel = 0.0,
    rescale: Rescale = "none",
    trim: PerModel = 1.0,
    weights: Weights = None,
    consensus: Consensus = "none",
    combine: Combine = "sum",
    normalize: Normalize = "none",
    scale: float | jax.Array = 1.0,
    scope: Scope = "leaf",
    sign_ties: SignTies | None = None,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
    name: str = "merge.delta_merge",
) -> Transform:
    r"""Adds to the base a combination of the models' differences to it.

    The base :math:`\theta_0` is the tree that is transformed; the models are given to `apply`. With
    :math:`\tau_i = \theta_i - \theta_0`, every leaf becomes

    .. math:: \theta_0 + \lambda \sum_i M_i \, w_i \hat\tau_i / D

    | step | argument | what it does |
    |---|---|---|
    | sparsify | `sparsifier`, `density`, `outliers`, `epsilon` | keeps a share of each delta |
    | rescale | `rescale` | makes up for what was dropped |
    | trim | `trim` | keeps the largest of what a random sparsifier left |
    | weight | `weights` | multiplies each delta by its weight |
    | consensus | `consensus`, `sign_ties` | drops entries against the elected sign |
    | combine | `combine` | sums, or takes the entry of largest magnitude |
    | normalise | `normalize` | divides by the weights |
    | scale | `scale` | multiplies by λ and adds the base |

    All arithmetic is in float32 (float64 for float64 leaves), with one cast at the end. Rankings
    and norms never mix stacked layers or experts, which the layout given to `apply` names; other
    steps are elementwise. `weights` and `scale` may be traced arrays, and are differentiable.

    Args:
      sparsifier: `"none"`; `"magnitude"` keeps the largest; `"outliers"` drops the very largest
        and keeps the largest of the rest; `"bernoulli"` keeps each entry by chance (needs a key);
        `"ranked"` too, with a chance that grows with its rank among the inputs of one output.
      density: Share kept, in [0, 1]; one for all models or one per model. 1 keeps all.
      outliers: Share of the largest entries that `"outliers"` drops first; at most `1 - density`
        are dropped.
      epsilon: By how much the chance of the smallest entry is below the density, and that of the
        largest above it, with `"ranked"`.
      rescale: `"inverse_density"` divides by the chance to be kept; `"l1"`, `"l2"`, `"linf"`
        restore that norm of the delta.
      trim: Share of all entries that is kept, by magnitude, after `"bernoulli"`.
      weights: One number per model, any sign; None gives 1 each.
      consensus: `"sum"` elects, per entry, the sign of the weighted sum of the deltas, and
        leaves out the deltas of the other sign.
      combine: `"sum"`, or `"max"`: the weighted delta of largest magnitude.
      normalize: Divides by the sum of |weights| of all `"models"`, or of those that take part
        in the entry (`"entries"`: nonzero after sparsifying, and agreeing where there is a
        consensus).
      scale: λ, of the whole merged delta.
      scope: What `"magnitude"`, `"outliers"` and `trim` rank together: the inputs of one output
        (`"row"`), each matrix of a `"leaf"`, or the whole `"tree"` (within `partition`: the leaves
        of the rule).
      sign_ties: Sign elected where the sum is zero: `"positive"`, or that of the `"majority"` of
        entries of the scope. None: majority for the tree, positive for leaves.
      compat: How counts are rounded: `"paper"` to the nearest, `"mergekit"` down. Both keep at
        least one entry of a matrix where the density is not zero.
      names: Names of the models, for errors and for random masks: with them, masks do not
        depend on the order of the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key): deltas below half a step of a narrow
        dtype then survive on average.
      nonfloat: As in `mean`.
      name: What errors call the transform.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is out of range, or a model does not fit the tree.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((1, 4))}
      >>> model = {"kernel": jnp.array([[0.1, -4.0, 2.0, 0.3]])}
      >>> tx = jw.merge.delta_merge(sparsifier="magnitude", density=0.5)
      >>> jw.apply(tx, base, models=[model])["kernel"]
      Array([[ 0., -4.,  2.,  0.]], dtype=float32)

    Source: Yadav et al. 2023, arXiv:2306.01708; Yu et al. 2023, arXiv:2311.03099; Davari and
    Belilovsky 2023, arXiv:2312.06795; Ilharco et al. 2022, arXiv:2212.04089.
    Differs: (1) divisors sum |w|, not w, because a negative weight would otherwise cancel its own
    sign. (2) Exactly the stated number of entries is kept; ties go to the lowest index.
    """
    if sign_ties is None:
        sign_ties = "majority" if scope == "tree" else "positive"
    row = Row(sparsifier, rescale, consensus, combine, normalize, sign_ties, scope, compat)
    weights = check_weights(name, weights, normalize=normalize != "none", absolute=True)
    check_names(name, names)
    shares = {"density": density, "epsilon": epsilon, "outliers": outliers, "trim": trim}
    for argument, value in shares.items():
        _check_shares(name, argument, value)
    if sparsifier == "none" and np.any(np.asarray(density) != 1):
        raise ValueError(
            f"{name}: density={density} has no effect without a sparsifier. Pass sparsifier="
            "'magnitude', 'outliers', 'bernoulli' or 'ranked'."
        )
    if sparsifier != "outliers" and np.any(np.asarray(outliers) != 0):
        raise ValueError(f"{name}: outliers={outliers} goes with sparsifier='outliers' only.")
    if sparsifier != "bernoulli" and np.any(np.asarray(trim) != 1):
        raise ValueError(f"{name}: trim={trim} goes with sparsifier='bernoulli' only.")
    if sparsifier == "ranked":
        _check_chances(name, density, epsilon)
    elif np.any(np.asarray(epsilon) != 0):
        raise ValueError(f"{name}: epsilon={epsilon} goes with sparsifier='ranked' only.")
    if rescale == "inverse_density" and np.any(np.asarray(density) == 0):
        raise ValueError(
            f"{name}: density=0 cannot be rescaled by its inverse. Pass rescale='none'."
        )
    if not isinstance(scale, Tracer) and not np.isfinite(np.asarray(scale)).all():
        raise ValueError(f"{name}: scale={scale} must be finite.")
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(name, flat, context, names, delta=True)
        job = DeltaJob.of(name, row, flat, models, context, names, shares, weights)
        tree_masks = job.masks_of_tree() if scope == "tree" else None
        sign = (
            job.sign_of_tree(tree_masks) if tree_masks is not None and row.asks_majority else None
        )

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", name), path)
            return merge_delta_leaf(
                leaf,
                leaves,
                job.inputs(
                    path, job.masks_of_leaf(path) if tree_masks is None else tree_masks[path]
                ),
                jnp.asarray(scale, compute_dtype(leaf)),
                sign,
                key,
                row=row,
                plan=job.plan(path),
                output=output,
                dtype=output.dtype_of(leaf),
            )

        new = merge_leaves(name, flat, models, context, output, names, merge_leaf)
        return unflatten(structure, everything | new)

    settings = DeltaMerge(
        row, density, outliers, epsilon, trim, weights, scale, names, output, name
    )
    return stateless(update, name=name, scope=_scope(row, trim, output), settings=settings)


def _scope(row: Row, trim: PerModel, output: Output) -> TransformScope:
    """What one entry of the result depends on."""
    random = row.draws or output.rounding == "stochastic"
    if not random and not row.mixes_entries and row.scope != "tree":
        return "entry"
    ranks = row.sparsifier in ("magnitude", "outliers") or np.any(np.asarray(trim) < 1)
    return "tree" if row.scope == "tree" and (ranks or row.asks_majority) else "leaf"


def _check_shares(name: str, argument: str, value: Any) -> None:
    values = np.asarray(value, np.float64)
    if values.ndim > 1 or not values.size or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            f"{name}: {argument}={value} must lie in [0, 1], one for all models or one per model."
        )


def _check_chances(name: str, density: PerModel, epsilon: PerModel) -> None:
    """Refuses chances that leave (0, 1), where the density is not 1, which drops nothing."""
    try:
        densities, epsilons = np.broadcast_arrays(np.ravel(density), np.ravel(epsilon))
    except ValueError:
        raise ValueError(
            f"{name}: density={density} and epsilon={epsilon} must have one entry per model."
        ) from None
    for middle, half in zip(densities.tolist(), epsilons.tolist(), strict=True):
        if middle < 1 and not (middle - half > 0 and middle + half < 1):
            raise ValueError(
                f"{name}: density={middle:g} and epsilon={half:g} give chances from "
                f"{middle - half:g} to {middle + half:g}, which must lie between 0 and 1. Pass a "
                f"epsilon below {min(middle, 1 - middle):g}."
            )
