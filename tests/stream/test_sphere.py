"""Spherical merges of checkpoints give what `apply` gives in memory, and hold only slices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.stream import _grouping, _jobs, transform_checkpoint
from jaxweights.stream._grouping import Grouping
from jaxweights.stream._jobs import Operand, cut
from jaxweights.stream._transform import transform_job

METHODS = {
    "slerp": functools.partial(jw.merge.slerp, t=0.3, norm="interpolate"),
    "nuslerp": functools.partial(jw.merge.nuslerp, weights=[1, 2]),
    "nuslerp outputs": functools.partial(jw.merge.nuslerp, deltas=True, group="output"),
    "nuslerp inputs": functools.partial(jw.merge.nuslerp, group="input"),
    "multislerp": functools.partial(jw.merge.multislerp, deltas=True),
    "karcher": functools.partial(jw.merge.karcher, weights=[1, 2, 3]),
    "model_stock": jw.merge.model_stock,
    "model_stock outputs": functools.partial(jw.merge.model_stock, group="output"),
    "model_stock mergekit": functools.partial(jw.merge.model_stock, compat="mergekit"),
    "karcher of five": functools.partial(jw.merge.karcher, deltas=True),
}
MODELS = {"slerp": 1, "nuslerp": 2, "nuslerp outputs": 2, "nuslerp inputs": 2, "karcher of five": 5}
# Rows and columns of the matrices, layers of the stacks, and a vector.
SHAPES = {
    "a.kernel": (60, 50),
    "b.kernel": (3, 40, 30),
    "c.kernel": (2, 5, 8, 30),
    "d.bias": (33,),
}
LAYOUT = {
    "a.kernel": jw.Axes(inputs=(-1,), outputs=(-2,)),
    "b.kernel": jw.Axes(),
    "c.kernel": jw.Axes(inputs=(-3, -2), outputs=(-1,)),
}


def _trees(count, dtype=np.float32):
    draws = [np.random.default_rng(i) for i in range(count + 1)]
    base = {n: draws[0].normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    common = {n: draws[0].normal(size=s) for n, s in SHAPES.items()}
    tuned = [
        {n: x + 0.1 * (common[n] + draw.normal(size=x.shape)) for n, x in base.items()}
        for draw in draws[1:]
    ]
    return [{n: x.astype(dtype) for n, x in tree.items()} for tree in (base, *tuned)]


def _streamed(folder, tx, trees):
    for i, tree in enumerate(trees):
        write_safetensors(folder / str(i), tree)
    models = [folder / str(i) for i in range(1, len(trees))]
    transform_checkpoint(tx, folder / "0", folder / "out", models=models, layout=LAYOUT)
    return dict(open_checkpoint(folder / "out").items())


def _in_memory(tx, trees):
    base, *models = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    return jw.apply(tx, base, models=models, layout=LAYOUT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("piece, run", [(1 << 20, 1 << 17), (1 << 10, 1 << 8)], ids=str)
def test_a_stream_gives_what_memory_gives(tmp_path, monkeypatch, method, piece, run):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", piece)
    monkeypatch.setattr(_grouping, "RUN", run)
    trees = _trees(MODELS.get(method, 3))
    tx = METHODS[method]()
    got, want = _streamed(tmp_path, tx, trees), _in_memory(tx, trees)
    for name in SHAPES:
        # Factors are known to a few steps of float32; entries are of size 1.
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(got[name] - trees[0][name]).max() > 1e-3


@pytest.mark.parametrize("method", ["karcher", "nuslerp outputs"])
def test_bfloat16_results_are_those_of_memory(tmp_path, method):
    trees = _trees(MODELS.get(method, 3), ml_dtypes.bfloat16)
    tx = METHODS[method]()
    got, want = _streamed(tmp_path, tx, trees), _in_memory(tx, trees)
    for name in SHAPES:
        differ = got[name].astype(np.float32) != np.asarray(want[name], np.float32)
        assert differ.mean() < 1e-3  # where a sum lies between two values


@pytest.mark.parametrize("method", ["slerp", "karcher", "nuslerp", "model_stock", "multislerp"])
@pytest.mark.parametrize("case", ["alike", "close", "tiny", "zero", "zero delta", "far"])
def test_where_little_is_left_of_a_difference_it_is_measured(tmp_path, method, case):
    base, *tuned = _trees(MODELS.get(method, 3))
    if case == "alike":
        tuned = [{n: x.copy() for n, x in tuned[0].items()} for _ in tuned]
    elif case == "close":  # by norms a hundred times farther apart than directions
        tuned = [{n: (1 + 0.01 * i) * base[n] + 1e-4 * (x[n] - base[n]) for n in x}
                 for i, x in enumerate(tuned)]  # fmt: skip
    elif case == "tiny":
        base, *tuned = [{n: 1e-22 * x for n, x in tree.items()} for tree in (base, *tuned)]
    elif case == "zero":
        tuned = [{n: 0 * x for n, x in tuned[0].items()}, *tuned[1:]]
    elif case == "zero delta":
        tuned = [{n: x.copy() for n, x in base.items()}, *tuned[1:]]
    else:  # less than 20 degrees from opposite
        tuned = [{n: 2 * (x[n] - base[n]) - base[n] for n in x} for x in tuned[:1]] + tuned[1:]
    trees = [{n: x.astype(np.float32) for n, x in tree.items()} for tree in (base, *tuned)]
    tx = METHODS[method]()
    got, want = _streamed(tmp_path, tx, trees), _in_memory(tx, trees)
    size = max(np.abs(x).max() for x in jax.tree.leaves(trees))
    for name in SHAPES:
        # Directions that are nearly opposite tell the arc between them less well.
        atol = (2e-5 if case == "far" else 2e-6) * size
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(151_936, 8_192), (96, 4_096, 14_336), (1 << 31,)], ids=str)
def test_no_slice_grows_with_the_tensor(method, shape):
    class Nothing:
        def shape(self, name):
            return shape

        def dtype(self, name):
            return np.dtype(ml_dtypes.bfloat16)

    operands = [Operand(Nothing(), "w", str(i)) for i in range(MODELS.get(method, 3) + 1)]
    layout = {"w": jw.Axes()} if len(shape) > 1 else None
    tx = METHODS[method]()
    job = transform_job("w", operands, tx, dtype=np.dtype(ml_dtypes.bfloat16), layout=layout)
    assert job.entrywise
    budget = 16 << 20
    # The slices of all layers are alike.
    pieces = list(
        cut(dataclasses.replace(job, shape=shape[1:] if len(shape) > 2 else shape), budget)
    )
    assert max(piece.cost for piece in pieces) <= budget
    assert sum(piece.count for piece in pieces) == np.prod(shape[-2:])


@pytest.mark.parametrize(
    "shape, axes, lengths",
    [
        ((4, 6), (0, 1), (1, 24, 1)),
        ((4, 6), (1,), (4, 6, 1)),
        ((4, 6), (0,), (1, 4, 6)),
        ((3, 4, 6), (1,), (3, 4, 6)),
        ((3, 4, 1, 6), (1, 3), (3, 24, 1)),
        ((3, 3, 4, 6), (0, 1, 2), (1, 36, 6)),
        ((5,), (0,), (1, 5, 1)),
        ((), (), (1, 1, 1)),
        ((4, 6, 5), (0, 2), None),
        ((4, 0), (0, 1), None),
    ],
    ids=str,
)
def test_vectors_lie_along_the_middle_of_three_axes(shape, axes, lengths):
    found = Grouping.of(shape, axes)
    assert found == (None if lengths is None else Grouping(*lengths))


def test_the_number_of_models_and_opposite_directions_are_refused(tmp_path):
    trees = _trees(2)
    with pytest.raises(ValueError, match=r"merge.slerp: 2 models were given.*`karcher` merges"):
        _streamed(tmp_path, jw.merge.slerp(), trees)
    opposite = {n: -x for n, x in trees[0].items()}
    with pytest.raises(ValueError, match=r"'.*': the two vectors point in opposite directions"):
        _streamed(tmp_path / "opposite", jw.merge.slerp(), [trees[0], opposite])
    with pytest.raises(ValueError, match=r"'.*': the weighted directions of the models cancel"):
        _streamed(tmp_path / "cancel", jw.merge.karcher(), [trees[1], trees[0], opposite])
