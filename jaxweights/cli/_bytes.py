"""Sizes as people write them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """The number of bytes that `4000000000`, `4GB` or `4 GiB` says."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?B)?\s*", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Write 4000000000, 4GB or 4GiB.")
    return int(float(found[1]) * _UNITS[found[2] or ""])
