"""Kernels that no statistics fit, as convolutions use them in several numbers of feature groups."""

from __future__ import annotations

from collections.abc import Iterable

from jaxweights.core._paths import Path, fail
from jaxweights.lift._infer_layout import Trace


def refuse_mixed_groups(trace: Trace, paths: Iterable[Path]) -> None:
    """Refuses kernels that are used in convolutions of different numbers of feature groups."""
    groups: dict[Path, set[int]] = {}
    for use in trace.uses:
        if use.kind in ("dot", "conv"):
            groups.setdefault(use.path, set()).add(use.groups)
    fail(
        "calibrate",
        [
            f"{path!r}: the model convolves with it in {sorted(groups[path])} feature groups by "
            "turns, so that no statistics serve all its uses. Leave this weight out of needs, with "
            "`partition`, or give each use a kernel of its own."
            for path in paths
            if len(groups.get(path, ())) > 1
        ],
    )
