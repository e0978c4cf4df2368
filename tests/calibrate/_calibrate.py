"""Statistics by NumPy, matrix by matrix."""

from __future__ import annotations

import numpy as np

ALL = frozenset({"sum", "abs_sum", "gram", "second_moment", "min", "max"})


def numpy_statistics(rows):
    rows = np.asarray(rows, np.float64)
    width = rows.shape[-1]
    return {
        "count": np.asarray(len(rows)),
        "sum": rows.sum(0),
        "abs_sum": np.abs(rows).sum(0),
        "second_moment": (rows**2).sum(0),
        "gram": rows.T @ rows,
        "min": rows.min(0, initial=np.inf) if len(rows) else np.full(width, np.inf),
        "max": rows.max(0, initial=-np.inf) if len(rows) else np.full(width, -np.inf),
    }


def stacked(parts):
    """Statistics of every matrix of a (nested) stack."""
    if isinstance(parts, np.ndarray) and parts.ndim == 2:
        return numpy_statistics(parts)
    inner = [stacked(part) for part in parts]
    return {name: np.stack([one[name] for one in inner]) for name in inner[0]}


def joined(batches_of_rows):
    """Rows of several batches, matrix by matrix."""
    first = batches_of_rows[0]
    if isinstance(first, np.ndarray) and first.ndim == 2:
        return np.concatenate(batches_of_rows)
    return [joined(list(parts)) for parts in zip(*batches_of_rows, strict=True)]


def oracle(model, batches):
    found = [model.rows(model.params, batch) for batch in batches]
    return {path: stacked(joined([rows[path] for rows in found])) for path in found[0]}


def assert_statistics(stats, expected, tolerance=1e-5):
    """Float32 sums of some ten products of order one, of which few roundings remain."""
    for path, one in expected.items():
        for name, value in one.items():
            actual = stats.get(path, name)
            assert actual is not None, (path, name)
            assert actual.shape == value.shape, (path, name)
            np.testing.assert_allclose(
                actual, value, rtol=tolerance, atol=tolerance, err_msg=f"{path} {name}"
            )


def batches_of(model, count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [model.batch(rng) for _ in range(count)]


def needs_of(model, names=ALL):
    return dict.fromkeys(model.params, names)
