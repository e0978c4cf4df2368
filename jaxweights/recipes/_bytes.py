"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int | None:
    """The number of bytes that `4000000000`, `4GB` or `4 GiB` says; None if it says none.

    Example:
      >>> parse_bytes("1.5 GB"), parse_bytes("much")
      (1500000000, None)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?B)?\s*", text.upper())
    return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None


def say_bytes(count: float) -> str:
    """A number of bytes as `parse_bytes` reads it, rounded up.

    Example:
      >>> say_bytes(1_234_567_890), say_bytes(7_100_000)
      ('1.3GB', '8MB')
    """
    if count >= 10**9:
        return f"{-(-int(count) // 10**8) / 10:g}GB"
    return f"{-(-int(count) // 10**6)}MB"
