"""Merges that look at more than an entry give in slices what they give in memory."""

import functools
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint
from jaxweights.stream import (
    _chance,
    _fusion,
    _jobs,
    _ranks,
    _row_ranks,
    _sce,
    transform_checkpoint,
)
from jaxweights.stream._jobs import cut
from jaxweights.stream._row_ranks import row_ranks
from tests.stream._merging import LAYOUT, SHAPES, in_memory, job_of, streamed, trees

_merge = jw.merge
_CHANCE = {"density": [0.5, 0.3, 1.0], "epsilon": [0.2, 0.1, 0.0], "weights": [0.5, -0.3, 0.8]}
_SHARES = {"density": [0.5, 0.3, 1.0], "weights": [0.5, -0.3, 0.8]}
# What is drawn, ranked or counted is equal to the bit; sums of float32 are not.
EXACT = {
    "della": functools.partial(_merge.della, **_CHANCE),
    "della linear": functools.partial(_merge.della_linear, **_CHANCE, normalize=True),
    "della as it is": functools.partial(_merge.della, **_CHANCE, rescale="none"),
    "ties by layer": functools.partial(
        _merge.delta_merge, sparsifier="magnitude", **_SHARES, consensus="sum", normalize="entries"
    ),
    "majority by layer": functools.partial(
        _merge.delta_merge,
        sparsifier="magnitude",
        **_SHARES,
        consensus="sum",
        sign_ties="majority",
    ),
    "della by majority": functools.partial(
        _merge.delta_merge, sparsifier="ranked", **_CHANCE, consensus="sum", sign_ties="majority"
    ),
    "arcee fusion": _merge.arcee_fusion,
    "nearswap": functools.partial(_merge.nearswap, t=0.01),
    "ram": functools.partial(_merge.ram, epsilon=0.01),
    "ram plus": functools.partial(_merge.ram_plus, epsilon=0.03, gain=0.5, most=3.0),
}
SUMMED = {
    "ties with norms": functools.partial(
        _merge.delta_merge, sparsifier="magnitude", **_SHARES, consensus="sum", rescale="l1"
    ),
    "ties with norms by majority": functools.partial(
        _merge.delta_merge,
        sparsifier="magnitude",
        **_SHARES,
        consensus="sum",
        rescale="l2",
        sign_ties="majority",
    ),
    "breadcrumbs in linf": functools.partial(
        _merge.delta_merge, sparsifier="outliers", **_SHARES, outliers=0.1, rescale="linf"
    ),
    "breadcrumbs with norms": functools.partial(
        _merge.delta_merge, sparsifier="outliers", **_SHARES, outliers=0.1, rescale="l1"
    ),
    "dare": functools.partial(_merge.dare_linear, density=[0.5, 0.3, 1.0]),
    "della of mergekit": functools.partial(_merge.della, **_CHANCE, compat="mergekit"),
    "dare of mergekit": functools.partial(_merge.dare_linear, density=0.3, compat="mergekit"),
    "della in l2": functools.partial(
        _merge.delta_merge, sparsifier="ranked", **_CHANCE, rescale="l2"
    ),
    "dare in linf by majority": functools.partial(
        _merge.delta_merge,
        sparsifier="bernoulli",
        **_SHARES,
        rescale="linf",
        consensus="sum",
        sign_ties="majority",
    ),
    "sce": functools.partial(_merge.sce, density=0.3),
    "sce of mergekit": functools.partial(_merge.sce, density=0.9, compat="mergekit"),
    "sce of all": _merge.sce,
}
METHODS = EXACT | SUMMED
MODELS = {"nearswap": 1, "arcee fusion": 1}


def _merged(folder, method, dtype=np.float32):
    given = trees(MODELS.get(method, 3), dtype)
    tx = METHODS[method]()
    got, want = streamed(folder, tx, given, layout=LAYOUT), in_memory(tx, given)
    for name in SHAPES:
        assert got[name].dtype == dtype
        assert (got[name] != given[0][name]).mean() > 0.02  # it does something
    return got, want


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("piece", [1 << 20, 1 << 10], ids=["whole", "pieces"])
def test_a_stream_gives_what_memory_gives(tmp_path, monkeypatch, method, piece):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", piece)
    got, want = _merged(tmp_path, method)
    for name in SHAPES:
        # Unoptimized, as tests are compiled, products are rounded before they are added, or not.
        # Entries are below 5, so that this and the last bits of sums are two steps.
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_results_are_those_of_memory(tmp_path, monkeypatch, method):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    got, want = _merged(tmp_path, method, ml_dtypes.bfloat16)
    for name in SHAPES:
        differ = got[name].astype(np.float32) != want[name].astype(np.float32)
        assert differ.mean() < 1e-3  # where a sum lies between two values


_OPTIMIZED = """
import pathlib, runpy, sys
here = runpy.run_path(sys.argv[1])
here["_jobs"].PIECE_ENTRIES = 1 << 10
for name in ("c.kernel", "d.bias"):  # programs for two shapes are enough
    del here["SHAPES"][name]
    here["LAYOUT"].pop(name, None)
for i, method in enumerate(here["EXACT"]):
    got, want = here["_merged"](pathlib.Path(sys.argv[2]) / str(i), method)
    print(method, sum(int((got[name] != want[name]).sum()) for name in got))
here["_sce"]._RUN = 1 << 8
small, _ = here["_merged"](pathlib.Path(sys.argv[2]) / "small", "sce")
here["_jobs"].PIECE_ENTRIES = 1 << 20
large, _ = here["_merged"](pathlib.Path(sys.argv[2]) / "large", "sce")
print("pieces", sum(int((small[name] != large[name]).sum()) for name in small))
"""


def test_programs_as_users_compile_them_give_the_bits_of_memory(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _OPTIMIZED, __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [*(f"{method} 0" for method in EXACT), "pieces 0"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((151_936, 8_192), jw.Axes(inputs=(-1,), outputs=(-2,))),
        ((3, 3, 4_096, 14_336), jw.Axes(inputs=(-1,), outputs=(-2,))),
        ((512, 1_024, 3, 3), jw.Axes(inputs=(-3, -2, -1), outputs=(-4,))),
    ],
    ids=str,
)
def test_no_slice_grows_with_the_tensor(method, shape, axes):
    job = job_of(METHODS[method](), shape, MODELS.get(method, 3), ml_dtypes.bfloat16, axes)
    budget = 16 << 20
    pieces = list(cut(job, budget))
    assert job.entrywise and len(pieces) > 2
    assert max(piece.cost for piece in pieces) <= budget
    assert sum(piece.count for piece in pieces) == np.prod(shape)


@pytest.mark.parametrize("method", ["dare of mergekit", "della of mergekit"])
def test_neither_memory_nor_the_size_of_pieces_changes_a_bit(tmp_path, monkeypatch, method):
    monkeypatch.setattr(_chance, "_LEAST_RUN", 1 << 8)
    results = []
    for i, piece in enumerate((1 << 20, 1 << 11, 1 << 10)):
        monkeypatch.setattr(_jobs, "PIECE_ENTRIES", piece)
        results.append(_merged(tmp_path / str(i), method)[0])
    for other in results[1:]:
        for name in SHAPES:
            np.testing.assert_array_equal(results[0][name], other[name], err_msg=name)


def test_masks_that_are_kept_are_those_that_are_drawn_anew(tmp_path, monkeypatch):
    kept, _ = _merged(tmp_path / "kept", "della of mergekit")
    monkeypatch.setattr(_chance, "_MOST_KEPT", 0)
    calls = []
    ranks = _chance.row_ranks
    monkeypatch.setattr(_chance, "row_ranks", lambda *given: calls.append(0) or ranks(*given))
    anew, _ = _merged(tmp_path / "anew", "della of mergekit")
    assert len(calls) == 2 * 7 * 2  # two models that drop entries, seven layers, twice
    for name in SHAPES:
        np.testing.assert_array_equal(kept[name], anew[name])


@pytest.mark.parametrize("sparsifier", ["bernoulli", "ranked"])
def test_the_sign_of_most_entries_decides_where_what_chance_leaves_cancels(
    tmp_path, monkeypatch, sparsifier
):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    draw, given = np.random.default_rng(0), ({}, {}, {})
    for name, shape in SHAPES.items():
        base = draw.integers(-8, 8, shape).astype(np.float32)
        step = np.where(draw.random(shape) < 0.8, -0.25, 0.25).astype(np.float32)
        for tree, x in zip(given, (base, base + step, base - step), strict=True):
            tree[name] = x
    epsilon = {"epsilon": 0.05} if sparsifier == "ranked" else {}
    made = {}
    for ties in ("majority", "positive"):
        tx = _merge.delta_merge(
            sparsifier=sparsifier, density=[0.9, 0.5], consensus="sum", sign_ties=ties, **epsilon
        )
        made[ties] = streamed(tmp_path / ties, tx, given)
        want = in_memory(tx, given)
        for name in SHAPES:
            np.testing.assert_array_equal(made[ties][name], want[name], err_msg=name)
    for name in SHAPES:
        differ = made["majority"][name] - made["positive"][name]
        assert (differ < 0).mean() > 0.1  # most signs are negative


def test_signs_are_elected_by_what_restores_norms(tmp_path, monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    draw, given = np.random.default_rng(0), ({}, {}, {}, {})
    for name, shape in SHAPES.items():
        base = draw.integers(-8, 8, shape).astype(np.float32)
        step = draw.choice(np.float32([-0.25, 0.25]), shape)
        # Of the first half of the entries, which ranking keeps, those of two models cancel.
        third = -0.25 * (np.arange(base.size) >= base.size // 2).reshape(shape).astype(np.float32)
        changed = (base, base + step, base - step, base + third)
        for tree, x in zip(given, changed, strict=True):
            tree[name] = x
    made = {}
    for ties in ("majority", "positive"):
        tx = _merge.delta_merge(
            sparsifier="magnitude",
            density=[0.5, 0.5, 0.9],
            rescale="l2",
            consensus="sum",
            sign_ties=ties,
        )
        made[ties] = streamed(tmp_path / ties, tx, given)
        want = in_memory(tx, given)
        for name in SHAPES:
            np.testing.assert_allclose(made[ties][name], want[name], rtol=0, atol=1e-6)
    differ = made["majority"]["a.kernel"] - made["positive"]["a.kernel"]
    assert (differ < 0).mean() > 0.4


def test_numbers_of_entries_go_on_beyond_the_32nd_bit():
    key = jax.random.key_data(jax.random.key(3))
    half = {"density": np.float32(0.5), "epsilon": np.float32(0), "along": 1}

    def drawn(start, size):
        place = np.asarray(divmod(start, 1 << 32), np.uint32)
        return np.asarray(_chance._mask(key, place, None, size=size, **half))

    whole = drawn((1 << 32) - 50, 150)
    np.testing.assert_array_equal(drawn(1 << 32, 100), whole[50:])
    assert (drawn(0, 100) != whole[50:]).any()
    want = jax.random.bernoulli(jax.random.key(3), 0.5, (100,))
    np.testing.assert_array_equal(drawn(0, 100), want)


def test_draws_that_do_not_go_by_place_take_the_whole_leaf():
    make = functools.partial(job_of, METHODS["della"](), (64, 32), 3, np.float32, jw.Axes())
    assert make().entrywise
    with jax.threefry_partitionable(False):
        assert not make().entrywise


@pytest.mark.parametrize("along, behind", [(7, 1), (1, 1), (6, 5), (200, 3)])
def test_ranks_are_those_of_counting(monkeypatch, along, behind):
    monkeypatch.setattr(_row_ranks, "_CHUNK", 256)
    rows = np.random.default_rng(0).integers(0, 9, (11, along, behind), np.uint32)
    got = row_ranks(rows.reshape(-1), along, behind).reshape(rows.shape)
    smaller = (rows[:, None] < rows[:, :, None]).sum(2)
    through = (rows[:, None] <= rows[:, :, None]).sum(2)
    np.testing.assert_array_equal(got, smaller + through - 1)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.6, 0.9])
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("sampled", [1 << 15, 1 << 8], ids=["ranked", "sampled"])
def test_sce_takes_ties_and_what_models_share_from_the_front(
    tmp_path, monkeypatch, density, compat, sampled
):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    monkeypatch.setattr(_sce, "_RUN", 1 << 8)
    monkeypatch.setattr(_ranks, "_SAMPLED_FROM", sampled)
    base, *tuned = trees(2)
    for name, x in base.items():
        draw = np.random.default_rng(5)
        shared = draw.integers(1, 9, x.shape).astype(np.float32)
        alone = draw.integers(0, 4, x.shape) * (draw.random(x.shape) < 0.5)  # half have a variance
        x[...] = 0
        tuned[0][name], tuned[1][name] = shared, shared + alone.astype(np.float32)
    tx = jw.merge.sce(density=density, compat=compat)
    got, want = streamed(tmp_path, tx, [base, *tuned]), in_memory(tx, [base, *tuned])
    for name in SHAPES:
        np.testing.assert_array_equal(got[name] != 0, want[name] != 0, err_msg=name)
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=0, err_msg=name)


def test_sce_warns_of_tensors_whose_models_hardly_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    monkeypatch.setattr(_sce, "_RUN", 1 << 8)
    base, first, second = trees(2)
    for name in ("a.kernel", "b.kernel"):
        second[name] = first[name].copy()
    second["b.kernel"][0, :20] += 1  # of the first of three layers half, which is more than 1 %
    tx = jw.merge.sce(density=0.5)
    with pytest.warns(
        UserWarning, match=r"merge.sce: \['a.kernel'\]: the models are equal"
    ) as told:
        streamed(tmp_path, tx, [base, first, second])
    assert len(told) == 1


@pytest.mark.parametrize("sampled", [1 << 15, 1 << 8], ids=["ranked", "sampled"])
def test_divergences_that_are_rounding_noise_are_ranked_with_their_sign(
    tmp_path, monkeypatch, sampled
):
    # Slices of the whole shape, so that one program computes the noise of both.
    shape = (64, 64)
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 4096)
    monkeypatch.setattr(_jobs, "_SMALL", 1)
    monkeypatch.setattr(_ranks, "_SAMPLED_FROM", sampled)
    base = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = base + 1e-4 * np.random.default_rng(1).normal(size=shape).astype(np.float32)
    given = [{"a.kernel": base}, {"a.kernel": model}]
    tx = jw.merge.arcee_fusion(compat="mergekit", whisker=0.2)
    axes = {"a.kernel": jw.Axes(inputs=(-1,), outputs=(-2,))}
    got = streamed(tmp_path, tx, given, layout=axes)["a.kernel"]
    scores = np.asarray(_fusion._scores(base, model, along=64, behind=1, compat="mergekit"))
    low, median, high = np.sort(scores)[[1023, 2047, 3071]]
    assert low < 0 < high  # half of the rows have a negative divergence
    copied = scores.reshape(shape) >= median + np.float32(0.2) * (high - low)
    np.testing.assert_array_equal(got, np.where(copied, model, base))


def test_the_number_of_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"merge.arcee_fusion: 2 models were given.*exactly 1"):
        streamed(tmp_path, jw.merge.arcee_fusion(), trees(2))


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_importances_of_few_values_and_many_zeros_are_ranked(tmp_path, share):
    draw = np.random.default_rng(0)
    base = np.repeat(draw.normal(size=(1, 1000)), 300, axis=0).astype(np.float32)
    steps = 0.01 * draw.integers(1, 3, size=base.shape) * (draw.random(base.shape) < share)
    steps[1::2] = steps[::2]  # rows come in pairs, so that most importances tie
    given = [{"a.kernel": base}, {"a.kernel": (base + steps).astype(np.float32)}]
    tx = jw.merge.arcee_fusion(whisker=0.1)
    axes = {"a.kernel": jw.Axes(inputs=(-1,), outputs=(-2,))}
    got = streamed(tmp_path, tx, given, layout=axes)["a.kernel"]
    np.testing.assert_array_equal(got, in_memory(tx, given, layout=axes)["a.kernel"])
    assert 0.05 < (got != base).mean() < share


@pytest.mark.parametrize("method", ["della of mergekit", "sce", "ram plus", "ties with norms"])
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(tmp_path, monkeypatch, method):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    given, tx = trees(3), METHODS[method]()
    settings = {"recipe": method, "layout": LAYOUT}
    whole = streamed(tmp_path, tx, given, **settings)
    (tmp_path / "out").rename(tmp_path / "whole")

    def interrupt(task, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    models = [tmp_path / str(i) for i in (1, 2, 3)]
    run = functools.partial(
        transform_checkpoint, tx, tmp_path / "0", tmp_path / "out", models=models, **settings
    )
    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert not (tmp_path / "out").exists()
    done = run(resume=True)
    assert 0 < done.resumed < len(SHAPES)
    for name, want in whole.items():
        np.testing.assert_array_equal(open_checkpoint(tmp_path / "out").read(name), want)
