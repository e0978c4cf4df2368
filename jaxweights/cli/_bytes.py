"""Sizes as people write them, as an option's type."""

from __future__ import annotations

import argparse


def byte_count(text: str) -> int:
    """The number of bytes that `4000000000`, `4GB` or `4 GiB` says."""
    from jaxweights.recipes._bytes import parse_bytes

    found = parse_bytes(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Write 4000000000, 4GB or 4GiB.")
    return found
