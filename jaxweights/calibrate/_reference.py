"""Reference: what each weight is multiplied with in another run of the model, row for row."""

from __future__ import annotations

from typing import Any

import jax

from jaxweights.calibrate._probe import Probe, changed_rows, patches_as_rows
from jaxweights.lift._walk import Named, Walk
from jaxweights.weights._matrix_weight import activations_as_rows


class Reference:
    """The inputs of each weight in one run of a model, in the order of its products.

    The model is run twice in one trace: first to fill this, then to be observed, when each product
    meets the rows of its like. Rows cannot leave a loop, nor be paired where tokens are sorted or
    dispatched, which two models need not do alike; such uses are refused.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[jax.Array]] = {}
        self._walk = Walk(observer=self._keep, identity=lambda record: record)

    @property
    def walk(self) -> Walk:
        """The walk that fills it."""
        return self._walk

    def next(self, path: str) -> jax.Array:
        """Rows `(*stack, tokens, in)` of the next product with a weight."""
        return self._rows[path].pop(0)

    def _keep(self, named: Named, x: jax.Array, kind: str, params: dict[str, Any]) -> None:
        probe = named.weight
        if not isinstance(probe, Probe):
            return
        if self._walk.inside:
            self._refuse(named.path, "is used inside a loop, a branch or a shard_map")
        if kind == "ragged_dot":
            self._refuse(named.path, "has inputs that are sorted by expert")
        if kind == "conv":
            rows, _ = patches_as_rows(named.path, x, probe, params)
        else:
            found = activations_as_rows(probe.view, probe.ndim, x, params["dimension_numbers"])
            if found is None or found.transposed:
                return
            rows = found.x
            if any(length > 1 for length in rows.shape[:-2]):
                self._refuse(named.path, "has inputs of their own for the matrices of a stack")
        self._rows.setdefault(named.path, []).append(changed_rows(probe.base, rows))

    def _refuse(self, path: str, problem: str) -> None:
        raise ValueError(
            f"calibrate: {path!r}: {problem}, where they cannot be paired with those of the "
            "reference model, as 'cross_gram' does. Scanned layers are gone through by "
            "pipeline(block_by_block=True); leave other weights out with `partition`, or choose "
            "a setting that does not need 'cross_gram', such as gptq(error_propagation=0, "
            "asymmetric_calibration=0)."
        )
