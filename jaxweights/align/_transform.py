"""permute: a permutation that was found, as a transform."""

from __future__ import annotations

from jaxweights.align._permute import check_permutations, permute_flat
from jaxweights.align._spec import Permutations, PermutationSpec, misfits
from jaxweights.core._context import Context
from jaxweights.core._paths import Params, fail, flatten, unflatten
from jaxweights.core._transform import Transform, stateless


def permute(spec: PermutationSpec, permutations: Permutations) -> Transform:
    """Renumbers the hidden units of a model, leaf by leaf.

    As `apply_permutation`, for chains and for checkpoints larger than memory. Every leaf moves by
    itself, so leaves that the tree lacks are no error: a model keeps its function only after all
    its leaves have gone through.

    Args:
      spec: Names the axes; leaves that it does not describe stay.
      permutations: What a matching found; what is not listed stays.

    Returns:
      The transform; dtypes stay.

    Raises:
      ValueError: If a permutation is unknown or none, or a leaf has another shape than the spec
        says.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> spec = jw.align.PermutationSpec({"up": (None, "hidden")}, sizes={"hidden": 3})
      >>> tx = jw.align.permute(spec, {"hidden": [2, 0, 1]})
      >>> jw.apply(tx, {"up": jnp.array([[1., 2., 3.]])})["up"]
      Array([[3., 1., 2.]], dtype=float32)

    Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836.
    """
    name = "align.permute"
    found = check_permutations(name, spec, permutations)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        chosen = {
            path: leaf
            for path, leaf in flat.items()
            if path in spec.axes and (context.only is None or path in context.only)
        }
        fail(name, misfits(spec, chosen))
        return unflatten(structure, flat | permute_flat(spec, chosen, found))

    return stateless(update, name=name, moves_inputs=True, scope="leaf")
