"""chain: transforms one after another."""

from __future__ import annotations

from typing import Any

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, Path
from jaxweights.core._stats import Needs, union_needs
from jaxweights.core._transform import Transform, widest


def chain(*transforms: Transform) -> Transform:
    """Applies transforms in order, each to what the one before it returned.

    Statistics are those of the model before the first of them.

    Args:
      *transforms: What to apply.

    Returns:
      One transform, whose needs are the union of theirs.

    Raises:
      ValueError: If one that reads statistics stands behind one that moves input axes.

    Example:
      >>> import jaxweights as jw
      >>> tx = jw.chain(jw.sparsify.magnitude(sparsity=0.5), jw.quantize.round_to_nearest(bits=4))
      >>> tx.name
      'chain(sparsify.magnitude, quantize.round_to_nearest)'
    """
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"chain: {transform!r} is a {type(transform).__name__}. Pass transforms, such as "
                "sparsify.magnitude(sparsity=0.5)."
            )
    mover = None
    for transform in transforms:
        if mover is not None and transform.reads_statistics:
            raise ValueError(
                f"chain: {transform.name} reads statistics, but {mover.name} before it moves or "
                "rescales input axes, after which they are wrong. Use "
                f"pipeline(..., stages=[{mover.name}, {transform.name}]), which calibrates again "
                "in between."
            )
        mover = transform if transform.moves_inputs else mover

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(params: Params, state: tuple[Any, ...], context: Context) -> tuple[Params, Any]:
        new_state = []
        for transform, inner in zip(transforms, state, strict=True):
            params, inner = transform.update(params, inner, context)
            new_state.append(inner)
        return params, tuple(new_state)

    def needs(params: Params, *, named: bool = False) -> Needs:
        return union_needs(transform.needs(params, named=named) for transform in transforms)

    def for_leaf(path: Path) -> Transform:
        return chain(*(transform.on(path) for transform in transforms))

    ruled = any(transform.for_leaf is not None for transform in transforms)
    return Transform(
        init,
        update,
        needs,
        name=f"chain({', '.join(transform.name for transform in transforms)})",
        reads_statistics=any(transform.reads_statistics for transform in transforms),
        moves_inputs=mover is not None,
        scope=widest(transform.scope for transform in transforms),
        rule_of=lambda path: " and ".join(filter(None, (tx.rule_of(path) for tx in transforms))),
        for_leaf=for_leaf if ruled else None,
    )
