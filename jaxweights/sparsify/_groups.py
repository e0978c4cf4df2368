"""Comparison groups: which weights of a matrix are ranked together."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.core._select import smallest
from jaxweights.sparsify._counts import count_zeros, count_zeros_traced

GroupName = Literal["leaf", "output", "input_block", "global"]
Tail = Literal["error", "dense", "partial"]

# Up to here ranks come from comparing all pairs, beyond from selection.
_LARGEST_COMPARED_RUN = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Which weights of an `(in, out)` matrix are ranked together, and how many of them stay.

    Built by `make_group`, which checks it.

    Args:
      name: "leaf", the whole matrix; "output", each column; "input_block", `block` consecutive
        inputs with all outputs; "global", all leaves together; "n_of_m", `of` consecutive inputs of
        one column.
      block: Inputs per block.
      keep: Weights kept of every `of`.
      of: Length of a run.
      tail: What becomes of a last run that is shorter than `of`.
    """

    name: str = "leaf"
    block: int | None = None
    keep: int | None = None
    of: int | None = None
    tail: Tail = "error"

    def sizes(self, in_dim: int, out_dim: int) -> tuple[int, ...]:
        """The distinct group sizes in a matrix, for groups whose zeros a sparsity counts."""
        if self.name == "output":
            return (in_dim,)
        if self.name != "input_block":
            return (in_dim * out_dim,)
        block = self.block or in_dim
        lengths = (min(block, in_dim), in_dim % block)
        return tuple(dict.fromkeys(length * out_dim for length in lengths if length))

    def unfit(self, in_dim: int, out_dim: int, sparsity: float | None) -> str | None:
        """What is wrong with a matrix of this shape, or None; `sparsity` where it is static."""
        if self.of is not None and in_dim % self.of and self.tail == "error":
            return (
                f"input axis {in_dim} is not divisible by {self.of}. Pass tail='dense' or "
                "tail='partial', or leave this weight out with `partition`."
            )
        if sparsity is None or self.name in ("n_of_m", "global"):
            return None
        for size in self.sizes(in_dim, out_dim):
            zeros = count_zeros(sparsity, size)
            if 0 < size <= zeros:
                return (
                    f"sparsity={sparsity} asks for {zeros} zeros in each group of {size} weights "
                    f"(group={self.name!r}), which would keep nothing. Ask for at most "
                    f"{(size - 1) / size:.6g}, or rank larger groups."
                )
        return None


def make_group(
    asker: str,
    *,
    group: GroupName,
    block: int | None = None,
    keep: int | None = None,
    of: int | None = None,
    tail: Tail = "error",
) -> Group:
    """Checks the settings of a group.

    Args:
      asker: Who is named in errors.
      group: As in `Group`.
      block: As in `Group`.
      keep: As in `Group`.
      of: As in `Group`.
      tail: As in `Group`.

    Returns:
      The group.

    Raises:
      ValueError: If the settings are out of range or do not belong together.
      TypeError: If a number is not an integer.
    """
    if group not in get_args(GroupName):
        raise ValueError(
            f"{asker}: group={group!r} must be one of {', '.join(map(repr, get_args(GroupName)))}. "
            "Runs such as 2 of 4 are asked for with keep=2, of=4."
        )
    if tail not in get_args(Tail):
        raise ValueError(f"{asker}: tail={tail!r} must be 'error', 'dense' or 'partial'.")
    for name, number in (("block", block), ("keep", keep), ("of", of)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"{asker}: {name}={number!r} must be an integer.")
    if (block is None) == (group == "input_block") or (block is not None and block < 1):
        raise ValueError(
            f"{asker}: block={block} with group={group!r}: block, a positive number of inputs, "
            "belongs to group='input_block' and to no other."
        )
    if (keep is None) != (of is None):
        raise ValueError(f"{asker}: keep={keep}, of={of}: give both or neither.")
    if keep is None or of is None:
        if tail != "error":
            raise ValueError(f"{asker}: tail={tail!r} has a meaning only with keep and of.")
        return Group(group, block)
    if not 1 <= keep <= of:
        raise ValueError(
            f"{asker}: keep={keep}, of={of}: must be 1 <= keep <= of. keep counts the weights that "
            "stay in every run, not the zeros."
        )
    if group != "leaf":
        raise ValueError(
            f"{asker}: group={group!r} and keep={keep}, of={of} are two groups. Give one of them."
        )
    return Group("n_of_m", None, keep, of, tail)


def keep_mask(
    scores: jax.Array, group: Group, *, sparsity: float | jax.Array | None = None
) -> jax.Array:
    """Which weights of one matrix stay: in every group all but the lowest scores.

    Exactly as many are removed as `floor(sparsity * size)` says for the group's size, ties by the
    lowest flat index; nothing is sorted.

    Args:
      scores: `(in, out)`, floats; their sign is ignored.
      group: Any but "global".
      sparsity: Fraction of zeros in [0, 1), or an array; unused for runs.

    Returns:
      Bool, `(in, out)`, True where a weight stays.
    """
    in_dim, out_dim = scores.shape
    if scores.size == 0:
        return jnp.ones(scores.shape, bool)
    if group.keep is not None and group.of is not None:
        return n_of_m_mask(scores, keep=group.keep, of=group.of, tail=group.tail)
    assert sparsity is not None, "only runs do without"

    def zeros(size: int) -> int | jax.Array:
        if isinstance(sparsity, jax.Array):
            return count_zeros_traced(sparsity, size)
        return count_zeros(sparsity, size)

    if group.name == "leaf":
        return ~smallest(scores, zeros(in_dim * out_dim))
    if group.name == "output":
        return ~smallest(scores, zeros(in_dim), axis=0)
    block = min(group.block or in_dim, in_dim)
    whole = in_dim - in_dim % block
    pick = jax.vmap(lambda part: smallest(part, zeros(block * out_dim)))
    blocks = pick(scores[:whole].reshape(-1, block, out_dim)).reshape(whole, out_dim)
    rest = smallest(scores[whole:], zeros((in_dim - whole) * out_dim))
    return ~jnp.concatenate([blocks, rest])


def n_of_m_mask(
    scores: Float[Array, "in out"], *, keep: int, of: int, tail: Tail = "error"
) -> Bool[Array, "in out"]:
    """Keeps the `keep` highest scores in every run of `of` along the input axis.

    The input axis is the contracted one, the one that sparse tensor cores need. Ranks, not values,
    are compared, so that every run keeps exactly `keep` also where scores tie; of equal scores the
    lower input is removed first.

    Args:
      scores: `(in, out)`, floats; their sign is ignored.
      keep: Weights that stay in every run, 1 to `of`. Not the number of zeros.
      of: Length of a run.
      tail: What becomes of a last run of `t < of` inputs: "error" refuses it, "dense" keeps it
        whole, "partial" keeps `ceil(keep * t / of)` of it.

    Returns:
      Bool, `(in, out)`, True where a weight stays.

    Raises:
      ValueError: If `of` does not divide the input axis and `tail` is "error".

    Example:
      >>> n_of_m_mask(jnp.array([[3.0], [-4.0], [1.0], [2.0]]), keep=2, of=4)[:, 0].tolist()
      [True, True, False, False]
    """
    group = make_group("n_of_m_mask", group="leaf", keep=keep, of=of, tail=tail)
    in_dim, out_dim = scores.shape
    if (problem := group.unfit(in_dim, out_dim, None)) is not None:
        raise ValueError(f"n_of_m_mask: {problem}")
    length = in_dim % of
    whole = in_dim - length
    runs = scores[:whole].reshape(whole // of, of, out_dim)
    parts = [_keep_highest(runs, keep).reshape(whole, out_dim)]
    if length:
        kept = length if tail == "dense" else -(-keep * length // of)
        parts.append(_keep_highest(scores[None, whole:], kept)[0])
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _keep_highest(runs: jax.Array, keep: int) -> jax.Array:
    """Marks the `keep` highest of each run, `(runs, of, out)`."""
    length = runs.shape[1]
    if length > _LARGEST_COMPARED_RUN:
        return ~smallest(runs, length - keep, axis=1)
    bits = magnitude_bits(runs)
    lanes = [bits[:, i] for i in range(length)]  # (runs, out) each
    below = [jnp.zeros(lanes[0].shape, jnp.uint8) for _ in lanes]
    for i in range(length):
        for j in range(i):
            # Of equal scores the earlier one ranks lower.
            earlier_is_lower = (lanes[j] <= lanes[i]).astype(jnp.uint8)
            below[i] = below[i] + earlier_is_lower
            below[j] = below[j] + (jnp.uint8(1) - earlier_is_lower)
    return jnp.stack([rank >= jnp.uint8(length - keep) for rank in below], axis=1)


def protect_largest(scores: jax.Array, count: int) -> jax.Array:
    """Raises the `count` highest scores of a matrix above all others, to infinity."""
    if count == 0:
        return scores
    protected = ~smallest(scores, scores.size - count)
    return jnp.where(protected, jnp.asarray(jnp.inf, scores.dtype), scores)


def rank_removed_lowest(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores in which entries outside a mask rank below all others, kept zeros included.

    Args:
      scores: `(in, out)`, floats; their sign is ignored.
      mask: Bool, `(in, out)`, True where a weight was kept so far.

    Returns:
      Scores of the same dtype.
    """
    zero = jnp.zeros((), scores.dtype)
    lowest = jnp.asarray(jnp.finfo(scores.dtype).smallest_subnormal, scores.dtype)
    return jnp.where(mask, jnp.where(scores == zero, lowest, scores), zero)
