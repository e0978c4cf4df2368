"""Numbers found slice by slice are those of the whole tensors."""

import ml_dtypes
import numpy as np
import pytest

from jaxweights.analyze import deltas
from jaxweights.stream import _jobs
from jaxweights.stream._delta_stats import DeltaRequest, delta_stats
from jaxweights.stream._jobs import Operand


class _Arrays:
    """Arrays that read like a checkpoint."""

    def __init__(self, **arrays):
        self.arrays = arrays
        self.reads = 0

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def reader(self, name):
        flat = self.arrays[name].reshape(-1)
        self.reads += 1

        def fill(start, out):
            out[...] = flat[start : start + out.size]

        return fill


def _request(name, base, models, kept=None):
    labels = ["base", *(f"model{i}" for i in range(len(models)))]
    sources = [_Arrays(**{name: array}) for array in (base, *models)]
    operands = [Operand(s, name, label) for s, label in zip(sources, labels, strict=True)]
    return DeltaRequest(name, tuple(operands), kept)


def _draws(shape, count, dtype=np.float32, size=1e-2):
    draw = np.random.default_rng(len(shape))
    base = draw.normal(size=shape)
    common = draw.normal(size=shape)
    moved = [base + size * (common + draw.normal(size=shape)) for _ in range(count)]
    return [x.astype(dtype) for x in (base, *moved)]


def _numpy(base, models, kept=None):
    wide = [np.asarray(x).astype(np.float64).ravel() for x in (base, *models)]
    moved = np.stack([x - wide[0] for x in wide[1:]])
    norms = np.linalg.norm(moved, axis=1)
    largest = None
    if kept is not None:
        largest = [
            np.sum(np.sort(d * d)[::-1][:k]) / n**2
            for d, k, n in zip(moved, kept, norms, strict=True)
        ]
    return (
        norms / np.linalg.norm(wide[0]),
        moved @ moved.T / np.outer(norms, norms),
        np.mean((moved > 0).any(0) & (moved < 0).any(0)),
        largest,
    )


def _fields(stats):
    return stats.relative_norm, stats.cosine, stats.sign_conflict, stats.kept_energy


def _check(got, want):
    for ours, theirs in zip(_fields(got), want, strict=True):
        if theirs is None:
            assert ours is None
        else:  # products are rounded to float32, their sums are not
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-7)


@pytest.fixture
def short_slices(monkeypatch):
    """Slices of 16384 entries, so that small tensors are cut."""
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 14)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(), (5,), (40, 30), (300, 211)])
def test_numbers_are_those_of_numpy_and_of_the_analysis(short_slices, shape, dtype):
    base, *models = _draws(shape, 3, dtype, size=0.3)
    entries = int(np.prod(shape))
    kept = [max(round(0.2 * entries), 1)] * 3
    [got] = delta_stats([_request("w", base, models, tuple(kept))])
    _check(got, _numpy(base, models, kept))
    whole = deltas({"w": base}, [{"w": m} for m in models], layout={}, density=0.2)["w"]
    _check(got, [np.asarray(field) for field in whole])
    assert got.origin == "base" and got.models == ("model0", "model1", "model2")


def test_many_tensors_come_back_in_their_order(short_slices):
    shapes = [(7,), (200, 200), (3, 3), (150, 140)]
    drawn = [_draws(shape, 2) for shape in shapes]
    requests = [
        _request(f"w{i}", base, models, None if i < 2 else (5, 9))
        for i, (base, *models) in enumerate(drawn)
    ]
    found = delta_stats(requests, limit=1 << 20)
    assert [stats.name for stats in found] == ["w0", "w1", "w2", "w3"]
    for i, (stats, (base, *models)) in enumerate(zip(found, drawn, strict=True)):
        _check(stats, _numpy(base, models, None if i < 2 else (5, 9)))


@pytest.mark.parametrize("levels", [1, 3])
def test_the_energy_of_the_largest_is_exact_when_most_entries_tie(short_slices, levels):
    draw = np.random.default_rng(0)
    base = np.zeros(90_000, np.float32)
    model = draw.integers(1, levels + 1, base.size).astype(np.float32)
    kept = 40_000
    [got] = delta_stats([_request("w", base, [model], (kept,))])
    squares = np.sort(model.astype(np.float64) ** 2)[::-1]
    assert got.kept_energy[0] == pytest.approx(squares[:kept].sum() / squares.sum(), rel=1e-12)


def test_a_sample_that_saw_only_small_entries_is_made_good(short_slices):
    # Every 61st entry is sampled: those are small here, so that the first bracket misses.
    model = np.random.default_rng(1).normal(size=80_000).astype(np.float32)
    places = np.arange(model.size) % (1 << 14)
    model[places % 61 == 0] *= 1e-3
    base = np.zeros_like(model)
    for k in (100, 30_000):
        [got] = delta_stats([_request("w", base, [model], (k,))])
        assert got.kept_energy[0] == pytest.approx(_numpy(base + 1, [model + 1], (k,))[3][0], 1e-5)


def test_keeping_nothing_and_all_need_no_ranks():
    base, *models = _draws((20, 20), 2)
    [got] = delta_stats([_request("w", base, models, (0, 400))])
    np.testing.assert_array_equal(got.kept_energy, [0, 1])


def test_deltas_of_zero_give_defined_answers():
    base, moved = _draws((6, 6), 1)
    [got] = delta_stats([_request("w", base, [base, moved], (3, 3))])
    assert got.relative_norm[0] == 0 and got.kept_energy[0] == 1
    np.testing.assert_array_equal(got.cosine, [[0, 0], [0, 1]])
    [from_zero] = delta_stats([_request("w", 0 * base, [0 * base, moved])])
    np.testing.assert_array_equal(from_zero.relative_norm, [0, np.inf])


@pytest.mark.parametrize("size", [1e-18, 1e20])
def test_sizes_neither_vanish_nor_overflow(size):
    base, *models = (x * np.float32(size) for x in _draws((30, 30), 2, size=0.5))
    [got] = delta_stats([_request("w", base, models)])
    _check(got, _numpy(base, models))


def test_values_that_are_not_finite_are_named_with_their_model():
    base, first, second = _draws((30, 30), 2)
    second[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"'w': values of model1 \(1 values\) are not finite"):
        delta_stats([_request("w", base, [first, second])])


def test_progress_ends_with_all_that_was_to_be_read(short_slices):
    base, *models = _draws((200, 200), 2)
    said = []
    request = _request("w", base, models, (9, 9))
    delta_stats([request], progress=lambda *news: said.append(news))
    assert said[0] == ("Comparing deltas", 0, 3 * base.nbytes)
    assert said[-1] == ("Comparing deltas", 3 * base.nbytes, 3 * base.nbytes)


def test_what_is_not_ranked_is_read_once(short_slices):
    base, *models = _draws((200, 200), 1)
    request = _request("w", base, models)
    delta_stats([request])
    assert [operand.source.reads for operand in request.operands] == [1, 1]
