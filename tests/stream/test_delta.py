"""Delta merges slice by slice are those of whole trees."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import delta_merge
from jaxweights.merge._delta_leaf import Row
from jaxweights.stream import _delta, _jobs
from jaxweights.stream._delta import delta_job
from jaxweights.stream._delta_settings import DeltaSettings
from jaxweights.stream._draws import drawn_bits, kept, words_of
from jaxweights.stream._jobs import Operand, cut
from jaxweights.stream._virtual import Made

SHAPE = (300, 200)


class Arrays:
    """Tensors in memory that read like a checkpoint."""

    def __init__(self, array):
        self._array = array

    def shape(self, name):
        return self._array.shape

    def dtype(self, name):
        return self._array.dtype

    def reader(self, name):
        flat = self._array.reshape(-1)
        return lambda start, out: np.copyto(out, flat[start : start + out.size])


def _models(dtype):
    draws = np.random.default_rng(0)
    base = (0.02 * draws.normal(size=SHAPE)).astype(dtype)
    tuned = [
        (base.astype(np.float32) + 0.002 * draws.normal(size=SHAPE)).astype(dtype) for _ in range(3)
    ]
    return base, tuned


def _stream(row, base, tuned, dtype, **numbers):
    settings = DeltaSettings(
        row=row,
        weights=(0.5, -0.3, 0.8),
        density=numbers.get("density", (1.0,) * 3),
        outliers=numbers.get("outliers", (0.0,) * 3),
        scale=0.9,
        models=("a", "b", "c"),
        seed=numbers.get("seed", 0),
    )
    operands = [Operand(Arrays(x), "w", str(i)) for i, x in enumerate((base, *tuned))]
    job = delta_job("w", SHAPE, np.dtype(dtype), operands, settings)
    return Made([job]).read("w")


def _row(**choices):
    defaults = {
        "sparsifier": "none",
        "rescale": "none",
        "consensus": "none",
        "combine": "sum",
        "normalize": "none",
        "sign_ties": "positive",
        "scope": "leaf",
        "compat": "mergekit",
    }
    return Row(**(defaults | choices))


def test_draws_that_are_kept_are_those_that_are_drawn_anew(monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    base, tuned = _models(np.float32)
    row = _row(sparsifier="bernoulli", rescale="l1", consensus="sum")
    calls = []

    def counted(*settings):
        calls.append(settings)
        return drawn_bits(*settings)

    monkeypatch.setattr(_delta, "drawn_bits", counted)
    kept = _stream(row, base, tuned, np.float32, density=(0.5, 0.3, 1.0))
    once = len(calls)
    monkeypatch.setattr(_delta, "_MOST_KEPT", 0)
    anew = _stream(row, base, tuned, np.float32, density=(0.5, 0.3, 1.0))
    np.testing.assert_array_equal(kept, anew)
    assert len(calls) - once == 2 * once and once > 4


ROWS = {
    "task_arithmetic": ({}, {}),
    "normalised": ({"normalize": "models"}, {}),
    "ties": (
        {"sparsifier": "magnitude", "consensus": "sum", "normalize": "entries"},
        {"density": (0.2, 0.5, 1.0)},
    ),
    "ties paper": (
        {"sparsifier": "magnitude", "consensus": "sum", "compat": "paper"},
        {"density": (0.0, 0.33, 0.7)},
    ),
    "breadcrumbs": (
        {"sparsifier": "outliers", "consensus": "sum"},
        {"density": (0.5, 0.9, 0.3), "outliers": (0.1, 0.05, 0.2)},
    ),
}


def _both(name, dtype):
    """A merge slice by slice, and that of the tree."""
    choices, numbers = ROWS[name]
    row = _row(**choices)
    base, tuned = _models(dtype)
    got = _stream(row, base, tuned, dtype, **numbers)
    tx = delta_merge(
        sparsifier=row.sparsifier,
        consensus=row.consensus,
        normalize=row.normalize,
        compat=row.compat,
        sign_ties="positive",
        weights=[0.5, -0.3, 0.8],
        scale=0.9,
        **numbers,
    )
    models = [{"w": jnp.asarray(x)} for x in tuned]
    want = apply(tx, {"w": jnp.asarray(base)}, models=models)["w"]
    return got.astype(np.float32), np.asarray(want).astype(np.float32)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("piece", [1 << 20, 1 << 14], ids=["whole", "pieces"])
def test_slices_give_the_values_of_the_tree(monkeypatch, name, dtype, piece):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", piece)
    assert (len(list(cut(_job(piece), 1 << 30))) == 1) == (piece == 1 << 20)
    got, want = _both(name, dtype)
    # Unoptimized, as tests are compiled, one program rounds products before it adds them and the
    # other does not (fused multiply-adds). Four products are half a step off each, and sums of them
    # round apart by a step. As users compile them, they are equal to the bit: see the next test.
    gap = np.abs(got - want)
    base, tuned = _models(dtype)
    deltas = [x.astype(np.float32) - base.astype(np.float32) for x in tuned]
    largest = np.max([np.abs(x) for x in (base.astype(np.float32), want, *deltas)], axis=0)
    steps = np.spacing(largest.astype(dtype)).astype(np.float32)
    assert (gap <= 4 * steps).all()
    if dtype != np.float32:  # most such differences are rounded away
        assert (gap > 0).mean() < 0.01


_OPTIMIZED = """
import runpy, sys
import numpy as np
here = runpy.run_path(sys.argv[1])
here["_jobs"].PIECE_ENTRIES = 1 << 14
for name in here["ROWS"]:
    got, want = here["_both"](name, np.float32)
    print(name, int((got != want).sum()))
"""


def test_programs_as_users_compile_them_give_the_bits_of_the_tree():
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _OPTIMIZED, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name} 0" for name in ROWS]


def _job(piece):
    return _jobs.Job("w", SHAPE, np.dtype(np.float32), (), lambda arrays, start: 0, True)


@pytest.mark.parametrize("rescale", ["l1", "inverse_density"])
def test_random_masks_do_not_depend_on_how_a_tensor_is_cut(monkeypatch, rescale):
    base, tuned = _models(np.float32)
    row = _row(sparsifier="bernoulli", rescale=rescale)
    density = {"density": (0.5, 0.1, 1.0)}
    whole = _stream(row, base, tuned, np.float32, **density)
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 14)
    pieces = _stream(row, base, tuned, np.float32, **density)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-8)
    other = _stream(row, base, tuned, np.float32, seed=1, **density)
    assert np.abs(other - whole).max() > 1e-4


def _mask(density, seed, path, model, start, count):
    words = words_of(drawn_bits(density, seed, path, model, start, count), start, count)
    assert words.dtype == np.uint32 and words.shape == (-(-count // 32),)
    return (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(-1)[:count]


@pytest.mark.parametrize("start, count", [(0, 128), (8, 32), (3, 101), (7, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_words_keep_the_entries_whose_bits_are_drawn(start, count, dtype):
    bits = np.random.default_rng(0).integers(0, 256, -(-(start % 8 + count) // 8), np.uint8)
    mask = np.unpackbits(bits, bitorder="little")[start % 8 :][:count].astype(bool)
    values = np.random.default_rng(1).standard_normal(count).astype(dtype)
    values[::5], values[1::7] = -0.0, np.inf
    with jax.enable_x64(dtype == np.float64):
        words = words_of(bits, start, count)
        assert words.ctypes.data % 64 == 0  # read in place
        left = jax.jit(kept)(values, words)
        assert left.dtype == dtype
        expected = np.where(mask, values, 0).astype(dtype)
        assert np.asarray(left).tobytes() == expected.tobytes()  # with the signs of zeros


@pytest.mark.parametrize("density", [0.0, 1e-4, 1 / 256, 0.3, 0.5, 0.75, 0.9987, 1.0])
def test_masks_keep_each_entry_with_its_chance_to_the_last_bit(density):
    n = 3_000_000
    mask = _mask(density, 3, "w", "a", 0, n)
    # Five standard deviations; eight bits alone would miss 1e-4 and 0.9987 by far more.
    assert abs(mask.mean() - density) <= 5 * np.sqrt(density * (1 - density) / n)
    for start in (1_048_570, 1_048_576, 131_072, 7):
        part = _mask(density, 3, "w", "a", start, 101)
        np.testing.assert_array_equal(part, mask[start:][:101])
    assert _mask(density, 3, "w", "a", 5, 0).size == 0


def test_masks_are_those_of_uniform_numbers_that_are_read_from_their_first_digits():
    n = 40_000
    steps = [_mask(k / 256, 3, "w", "a", 0, n) for k in range(257)]
    number = 256 - np.sum(steps, axis=0)  # the largest of k / 256 that is not above the number
    counts = np.bincount(number, minlength=256)
    assert counts.size == 256
    expected = n / 256
    assert ((counts - expected) ** 2 / expected).sum() < 345  # chi squared of 255, one in 10,000
    fine = _mask(77.3 / 256, 3, "w", "a", 0, n)
    np.testing.assert_array_equal(fine[number != 77], number[number != 77] < 77)
    share = fine[number == 77].mean()
    assert abs(share - 0.3) < 5 * np.sqrt(0.21 / counts[77])


def test_a_larger_density_keeps_what_a_smaller_one_keeps():
    pairs = [(0.301, 0.302), (0.5, 0.501), (0.4999, 0.5), (0.25, 0.75)]
    for small, large in pairs:
        low, high = (_mask(d, 3, "w", "a", 0, 500_000) for d in (small, large))
        assert (high | ~low).all()
        gap = large - small
        assert abs((high & ~low).mean() - gap) < 5 * np.sqrt(gap / 500_000)


def test_inverse_density_keeps_the_mean_and_l1_the_norm():
    zero = np.zeros(SHAPE, np.float32)
    ones = [np.ones(SHAPE, np.float32)] * 3
    n = zero.size
    for rescale, density in (("inverse_density", 0.3), ("l1", 0.3)):
        row = _row(sparsifier="bernoulli", rescale=rescale)
        merged = _stream(row, zero, ones, np.float32, density=(density,) * 3)
        mean = merged.mean() / (0.9 * (0.5 - 0.3 + 0.8))
        # Five standard deviations of the mean of three independent masks; the norm is exact.
        spread = np.sqrt((1 - density) / density / n) * np.hypot(np.hypot(0.5, 0.3), 0.8)
        assert abs(mean - 1) < (5 * spread if rescale == "inverse_density" else 1e-5)


def test_masks_of_other_seeds_paths_models_and_entries_are_independent():
    mask = _mask(0.5, 7, "w", "a", 0, 2_200_000)
    first = mask[:400_000]
    others = {
        "seed": _mask(0.5, 8, "w", "a", 0, first.size),
        "path": _mask(0.5, 7, "v", "a", 0, first.size),
        "model": _mask(0.5, 7, "w", "b", 0, first.size),
        "block": mask[1 << 20 :][: first.size],
        "neighbour": mask[1:][: first.size],
        "eighth": mask[8:][: first.size],
    }
    for what, other in others.items():
        assert abs((other == first).mean() - 0.5) < 5 * 0.5 / np.sqrt(first.size), what


def test_what_chance_drops_is_zero_and_what_it_keeps_is_rescaled():
    base, tuned = _models(np.float32)
    density = (0.5, 0.3, 1.0)
    got = _stream(_row(sparsifier="bernoulli", rescale="l1"), base, tuned, np.float32,
                  density=density)  # fmt: skip
    want = base.astype(np.float64)
    for weight, model, d, name in zip((0.5, -0.3, 0.8), tuned, density, "abc", strict=True):
        delta = model.astype(np.float64) - base
        kept = _mask(d, 0, "w", name, 0, delta.size).reshape(SHAPE)
        assert d == 1 or 0 < kept.mean() < 1
        want += 0.9 * weight * delta * kept * np.abs(delta).sum() / np.abs(delta[kept]).sum()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-8)


def test_values_that_are_not_finite_are_refused_by_model():
    base, tuned = _models(np.float32)
    tuned[1][3, 4] = np.nan
    row = _row(sparsifier="magnitude", consensus="sum")
    with pytest.raises(ValueError, match=r"'w': values of 2 \(1 values\) are not finite"):
        _stream(row, base, tuned, np.float32, density=(0.1, 0.1, 0.1))
