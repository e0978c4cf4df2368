"""Transform: the one abstraction, and its neutral element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, Path
from jaxweights.core._stats import Needs

State = Any
Scope = Literal["entry", "matrix", "leaf", "block", "tree"]
SCOPES: tuple[Scope, ...] = ("entry", "matrix", "leaf", "block", "tree")  # from narrow to wide


class NeedsFn(Protocol):
    """Says which statistics a transform wants of which leaves; shapes suffice."""

    def __call__(self, params: Params, *, named: bool = False) -> Needs:
        """Returns the needs; `named` as in `Context`."""
        ...


def one_rule(path: Path) -> str:
    """The rule of every leaf, of a transform that has no rules."""
    del path
    return ""


def needs_nothing(params: Params, *, named: bool = False) -> Needs:
    """The needs of a transform that reads no statistics."""
    del params, named
    return {}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pure change of a parameter tree: optax's pair plus a declaration of needs.

    Args:
      init: `params -> state`.
      update: `(params, state, context) -> (params, state)`.
      needs: `params -> {path: statistics}`, over-complete: it may list leaves that turn out to
        be no matrices of the model.
      name: What errors and plans call it, such as `sparsify.wanda`.
      reads_statistics: Whether `update` reads `context.stats`.
      moves_inputs: Whether it permutes, rotates or rescales input axes, after which statistics
        of the model before it are no longer true.
      scope: What a result depends on, besides the settings: `"entry"`, on the same entry of the
        tree and of the models, so that any slice of a leaf may be transformed alone; `"matrix"`,
        on the same matrix of a stack (or vector, where there is none); `"leaf"`, on the same leaf;
        `"block"`, on leaves that read and write each other's activations, such as a norm and the
        matrices behind it, in the same layer; `"tree"`, on anything. Streams use it.
      settings: What was asked for, where a stream carries it out in another way; else None.
      rule_of: In words, which of its rules takes a path. Tied leaves, which stay one array, must
        have one.
      for_leaf: Gives what is done to a path, as a transform of a tree that holds this leaf alone;
        for transforms whose rules would find nothing else there.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Context], tuple[Params, State]]
    needs: NeedsFn = needs_nothing
    name: str = "transform"
    reads_statistics: bool = False
    moves_inputs: bool = False
    scope: Scope = "tree"
    settings: Any = None
    rule_of: Callable[[Path], str] = one_rule
    for_leaf: Callable[[Path], Transform] | None = None

    def on(self, path: Path) -> Transform:
        """What is done to a path, as a transform of a tree that holds this leaf alone."""
        return self if self.for_leaf is None else self.for_leaf(path)


def widest(scopes: Iterable[Scope]) -> Scope:
    """The scope of transforms that are used together."""
    return max((SCOPES[0], *scopes), key=SCOPES.index)


def stateless(
    update: Callable[[Params, Context], Params],
    *,
    name: str,
    needs: NeedsFn = needs_nothing,
    reads_statistics: bool = False,
    moves_inputs: bool = False,
    scope: Scope = "tree",
    settings: Any = None,
) -> Transform:
    """Makes a transform of a function of parameters and context.

    Args:
      update: `(params, context) -> params`.
      name: What errors call it.
      needs: As in `Transform`.
      reads_statistics: As in `Transform`.
      moves_inputs: As in `Transform`.
      scope: As in `Transform`.
      settings: As in `Transform`.

    Returns:
      The transform, whose state is empty.

    Example:
      >>> import jax, jaxweights as jw
      >>> halve = stateless(
      ...     lambda params, context: jax.tree.map(lambda w: w / 2, params), name="halve"
      ... )
      >>> jw.apply(halve, {"bias": jnp.ones(2)})["bias"]
      Array([0.5, 0.5], dtype=float32)
    """
    return Transform(
        init=lambda params: (),
        update=lambda params, state, context: (update(params, context), state),
        needs=needs,
        name=name,
        reads_statistics=reads_statistics,
        moves_inputs=moves_inputs,
        scope=scope,
        settings=settings,
    )


def identity() -> Transform:
    """Leaves every leaf as it is: what a rule of `partition` says of what shall not change.

    Returns:
      The transform.

    Example:
      >>> import jaxweights as jw
      >>> rounding = jw.quantize.round_to_nearest(bits=4)
      >>> tx = jw.partition((".*/up", rounding), (..., identity()))
      >>> tree = {"mlp": {"up": jnp.ones((8, 4)), "down": jnp.ones((4, 8))}}
      >>> jw.apply(tx, tree)["mlp"]["down"] is tree["mlp"]["down"]
      True
    """
    return stateless(lambda params, context: params, name="identity", scope="entry")
