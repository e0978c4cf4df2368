"""Functions of arrays and settings that are compiled once for each choice of settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function at its first call with certain settings and shapes.

    Called as they are, functions with loops are traced and compiled anew at every call, which takes
    a thousand times what they compute. Inside another `jit` this changes nothing.

    Args:
      fn: Takes arrays by position and by keyword, and settings by keyword. Settings that cannot be
        hashed, such as lists, leave it uncompiled.

    Returns:
      The same function, with its signature and docstring.

    Example:
      >>> @compiled
      ... def power(x, *, exponent):
      ...     return x**exponent
      >>> float(power(jnp.float32(3), exponent=2))
      9.0
    """
    loosely: Callable[..., R] = fn

    @functools.partial(jax.jit, static_argnames="settings")
    def run(args: Any, arrays: dict[str, Any], settings: tuple[tuple[str, type, Any], ...]) -> R:
        return loosely(*args, **arrays, **{name: value for name, _, value in settings})

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arrays = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array | np.ndarray)}
        # With their types: 4 and 4.0 are equal, but one of them may be refused.
        settings = tuple((k, type(v), v) for k, v in sorted(kwargs.items()) if k not in arrays)
        try:
            hash(settings)
        except TypeError:
            return fn(*args, **kwargs)
        return run(args, arrays, settings)

    return call
