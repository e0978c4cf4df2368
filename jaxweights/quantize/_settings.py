"""Checks of settings that many methods share: each refuses the wrong kind in words of our own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_word(value: Any, words: Collection[str]) -> bool:
    """Whether a setting is one of these words; of other kinds, arrays among them, none is."""
    return isinstance(value, str) and value in words


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a setting is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_numbers(asker: str, **settings: Any) -> None:
    """Refuses settings that are no real numbers, nor arrays of one; True and False are none.

    Raises:
      TypeError: Naming the first of them.
    """
    for name, value in settings.items():
        if not (is_whole(value) or isinstance(value, float | np.floating) or _is_scalar(value)):
            raise TypeError(f"{asker}: {name}={value!r} must be a number.")


def _is_scalar(value: Any) -> bool:
    """Whether it is an array of one real number without axes, maybe traced."""
    if not isinstance(value, jax.Array | np.ndarray) or value.ndim:
        return False
    return any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))


def check_positive(asker: str, **settings: Any) -> None:
    """Refuses settings that are no numbers above 0, or are not finite.

    Raises:
      TypeError: If one is no number.
      ValueError: If one is out of range.
    """
    check_numbers(asker, **settings)
    for name, value in settings.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{asker}: {name}={value!r} must be positive and finite.")


def check_share(asker: str, *, remedy: str = "", **settings: Any) -> None:
    """Refuses settings that are no numbers in [0, 1]; those that are traced have no value yet.

    Raises:
      TypeError: If one is no number.
      ValueError: If one is out of range.
    """
    check_numbers(asker, **settings)
    for name, value in settings.items():
        if not isinstance(value, Tracer) and not 0 <= value <= 1:
            raise ValueError(f"{asker}: {name}={value} must lie in [0, 1]{remedy}.")


def check_damping(asker: str, damping: Any) -> None:
    """Refuses what is no share of the mean diagonal."""
    check_share(asker, damping=damping, remedy=": it is a fraction of the mean diagonal")


def check_count(asker: str, name: str, value: Any, *, least: int = 1) -> None:
    """Refuses what is no whole number of at least so many; True and False are none.

    Raises:
      TypeError: If it is no integer.
      ValueError: If it is too small.
    """
    wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
    whole = is_whole(value)
    if not whole or value < least:
        error = ValueError if whole else TypeError
        raise error(f"{asker}: {name}={value!r} must be {wanted}.")


def check_between(asker: str, name: str, value: Any, low: int, high: int) -> int:
    """Refuses what is no whole number from `low` to `high`.

    Returns:
      The number as an int: one of NumPy is no weak type, and would widen the codes that it meets.

    Raises:
      TypeError: If it is no integer.
      ValueError: If it is out of range.
    """
    if not is_whole(value):
        raise TypeError(f"{asker}: {name}={value!r} must be an integer.")
    if not low <= value <= high:
        raise ValueError(f"{asker}: {name}={value} must lie between {low} and {high}.")
    return int(value)


def check_flags(asker: str, **settings: Any) -> None:
    """Refuses settings other than True and False.

    Raises:
      TypeError: Naming the first of them.
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise TypeError(f"{asker}: {name}={value!r} must be True or False.")


def check_names(asker: str, **settings: Any) -> None:
    """Refuses settings that are no collections of names; a name by itself is none.

    Raises:
      TypeError: Naming the first of them.
    """
    for argument, names in settings.items():
        several = isinstance(names, Collection) and not isinstance(names, str | bytes)
        if not several or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{asker}: {argument}={names!r} must be a sequence of names.")


def check_callable(asker: str, **settings: Any) -> None:
    """Refuses settings that are neither None nor can be called.

    Raises:
      TypeError: Naming the first of them.
    """
    for name, value in settings.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"{asker}: {name}={value!r} cannot be called. Pass a function, such as the "
                "`__setitem__` of a dict."
            )


def check_float_dtype(asker: str, **settings: Any) -> None:
    """Refuses dtypes other than the floating ones of 16 and 32 bits.

    Raises:
      TypeError: Naming the first of them.
    """
    for name, value in settings.items():
        if _dtype(value) not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"{asker}: {name}={value!r} must be float32, bfloat16 or float16.")


def _dtype(value: Any) -> Any:
    """The dtype that is meant, or None; arrays are none, though NumPy takes theirs."""
    if value is None or isinstance(value, jax.Array | np.ndarray | np.generic):
        return None
    try:
        return jnp.dtype(value)
    except TypeError:
        return None
