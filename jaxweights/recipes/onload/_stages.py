"""Which transforms run block by block, and on what each of them is calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxweights.core import Path, Transform, chain
from jaxweights.core._transform import widest

Again = Literal["never", "each_step", "each_block"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A transform of each block.

    Args:
      transform: What is done.
      reads: After how many stages the blocks before are whose outputs it is calibrated on; None
        where it reads no statistics.
    """

    transform: Transform
    reads: int | None


def plan_stages(transforms: Sequence[Transform], again: Again) -> tuple[Stage, ...]:
    """Says what each transform is calibrated on.

    Args:
      transforms: In their order.
      again: `never`, all on the original model; `each_step`, each on the model that the one before
        it left; `each_block`, each on what the blocks give that it has itself transformed already.

    Returns:
      The stages.

    Example:
      >>> from jaxweights.quantize import gptq, smooth
      >>> [stage.reads for stage in plan_stages([smooth(), gptq(bits=4)], "each_block")]
      [1, 2]
    """
    if again == "never":
        whole = chain(*transforms)
        return (Stage(whole, 0 if whole.reads_statistics else None),)
    later = 1 if again == "each_block" else 0
    return tuple(
        Stage(tx, number + later if tx.reads_statistics else None)
        for number, tx in enumerate(transforms)
    )


def why_not_in_blocks(tx: Transform, inside: Iterable[Path]) -> str | None:
    """Why a transform cannot be run on one block without the others; None if it can.

    Args:
      tx: The transform.
      inside: The leaves of the blocks.
    """
    if widest(tx.on(path).scope for path in inside) != "tree":
        return None
    return (
        f"{tx.name} looks at all layers together (budgets, ranks and rotations of the whole "
        "model). Run it in memory, without a limit of memory, or choose a method that works within "
        "a layer, such as gptq, awq or smooth"
    )
