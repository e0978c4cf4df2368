"""How many threads work on slices."""

from __future__ import annotations

import os

_MOST_WORKERS = 8


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers() -> int:
    """Threads that each take a slice from reading to writing."""
    return min(cores(), _MOST_WORKERS)
