"""partition: which transform acts on which leaf."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
from collections.abc import Mapping
from typing import Any

from jaxweights.core._context import Context
from jaxweights.core._paths import (
    Flat,
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    nearest,
    no_match,
    unflatten,
)
from jaxweights.core._stats import Needs, union_needs
from jaxweights.core._transform import Transform, identity

Rule = tuple[str | types.EllipsisType, Transform]


def partition(*rules: Rule) -> Transform:
    """Gives every leaf to the first rule that names it.

    A rule is a pair of a pattern and a transform. The pattern is a regular expression for the whole
    path, or `...` for all leaves that no earlier rule took. Leaves that no rule takes stay as they
    are. A leaf that a pattern names is transformed even where the transform would leave it alone
    by default (an embedding, a head), and refused where it cannot be; the leaves under `...`
    follow the transform's default.

    Args:
      *rules: Pairs of pattern and transform.

    Returns:
      One transform.

    Raises:
      TypeError: When built, if a rule is no pair of a pattern and a transform.
      ValueError: When built, if a pattern is no regular expression or stands behind `...`; when it
        first sees a tree, if a pattern takes no leaf, or tied leaves have different rules.

    Example:
      >>> import jaxweights as jw
      >>> tx = jw.partition(
      ...     (".*/mlp/.*", jw.sparsify.magnitude(sparsity=0.5)),
      ...     (..., jw.identity()),
      ... )
    """
    for i, rule in enumerate(rules):
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(
                f"partition: rule {i}: {reprlib.repr(rule)} is no pair of a pattern and a "
                "transform. Write partition((pattern, transform), ..., (..., identity())), and "
                "partition(*rules.items()) for a dict of rules."
            )
        pattern, transform = rule
        if not isinstance(transform, Transform):
            raise TypeError(
                f"partition: rule {i}: {reprlib.repr(transform)} is no transform. A rule is "
                "(pattern, transform), in this order."
            )
        if pattern is ...:
            if i + 1 < len(rules):
                raise ValueError(f"partition: rule {i}: rules behind `...` can match nothing.")
        else:
            check_pattern("partition", pattern)

    def assign(flat: Flat) -> list[Flat]:
        left = dict(flat)
        parts: list[Flat] = []
        problems: list[str] = []
        for pattern, _ in rules:
            paths = (
                list(left) if isinstance(pattern, types.EllipsisType) else matching(pattern, left)
            )
            if not paths and isinstance(pattern, str):
                shadowed = matching(pattern, flat)
                problems.append(
                    f"pattern {pattern!r} takes no leaf: earlier rules took all that it matches, "
                    f"such as {shadowed[0]!r}. Put it before them."
                    if shadowed
                    else no_match(pattern, flat)
                )
            parts.append({path: left.pop(path) for path in paths})
        fail("partition", problems)
        return parts

    def inner_context(pattern: str | types.EllipsisType, context: Context) -> Context:
        return dataclasses.replace(context, named=context.named or pattern is not ...)

    def init(params: Params) -> tuple[Any, ...]:
        parts = assign(flatten(params)[0])
        return tuple(tx.init(part) for (_, tx), part in zip(rules, parts, strict=True))

    def update(params: Params, state: tuple[Any, ...], context: Context) -> tuple[Params, Any]:
        flat, structure = flatten(params)
        merged, new_state = dict(flat), []
        for (pattern, tx), part, inner in zip(rules, assign(flat), state, strict=True):
            if part:
                part, inner = tx.update(part, inner, inner_context(pattern, context))
                merged |= part
            new_state.append(inner)
        return unflatten(structure, merged), tuple(new_state)

    def needs(params: Params, *, named: bool = False) -> Needs:
        parts = assign(flatten(params)[0])
        return union_needs(
            tx.needs(part, named=named or pattern is not ...)
            for (pattern, tx), part in zip(rules, parts, strict=True)
        )

    def rule_of(path: Path) -> str:
        for pattern, tx in rules:
            if isinstance(pattern, types.EllipsisType) or matching(pattern, [path]):
                inner = tx.rule_of(path)
                word = "`...`" if pattern is ... else repr(pattern)
                return f"rule {word}" + (f", {inner}" if inner else "")
        return "no rule"

    def for_leaf(path: Path) -> Transform:
        for pattern, tx in rules:
            if isinstance(pattern, types.EllipsisType):
                return tx.on(path)
            if matching(pattern, [path]):
                inner = tx.on(path)
                alone = partition((re.escape(path), inner))
                return dataclasses.replace(
                    alone, name=inner.name, scope=inner.scope, settings=inner.settings
                )
        return identity()

    transforms = [tx for _, tx in rules]
    return Transform(
        init,
        update,
        needs,
        name=f"partition({', '.join(tx.name for tx in transforms)})",
        reads_statistics=any(tx.reads_statistics for tx in transforms),
        moves_inputs=any(tx.moves_inputs for tx in transforms),
        rule_of=rule_of,
        for_leaf=for_leaf,
    )


def partition_by(choices: Mapping[Path, str], transforms: Mapping[str, Transform]) -> Transform:
    """Gives every path the transform that a table names, and leaves all others alone.

    Args:
      choices: Names by path, perhaps read from JSON.
      transforms: Transforms by name.

    Returns:
      A `partition`.

    Raises:
      ValueError: If a name is that of no transform; when it first sees a tree, if a path is not
        there.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> bits = {f"int{b}": jw.quantize.round_to_nearest(bits=b) for b in (2, 4)}
      >>> tx = partition_by({"up": "int4", "down": "int2"}, bits)
      >>> new = jw.apply(tx, {"up": jnp.ones((4, 4)), "down": jnp.ones((4, 4))})
      >>> new["up"].bits, new["down"].bits
      (4, 2)
    """
    fail(
        "partition_by",
        [
            f"{path!r}: {name!r} is no transform. The nearest: {nearest(name, transforms)}."
            for path, name in choices.items()
            if name not in transforms
        ],
    )
    paths: dict[str, list[Path]] = {}
    for path, name in choices.items():
        paths.setdefault(name, []).append(re.escape(path))
    rules = [("|".join(patterns), transforms[name]) for name, patterns in paths.items()]
    return partition(*rules, (..., identity()))
