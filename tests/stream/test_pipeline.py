"""Pieces go through in their order, whatever threads do and wherever files keep their bytes."""

import functools
import json
import os
import threading
import time
import types

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.stream import _flow, _jobs, _pipeline, _workers, transform_checkpoint
from jaxweights.stream._destination import _OPEN_FILES, _OpenFiles
from jaxweights.stream._jobs import Job, Operand, Piece, Survey
from jaxweights.stream._mean import mean_job
from jaxweights.stream._memory import Budget, resident_bytes
from jaxweights.stream._run import stream_jobs
from jaxweights.stream._transform import transform_job
from jaxweights.stream._turns import Stopped, Turns
from jaxweights.stream._virtual import Made

SHAPE = (300, 200)


def _piece(start, count, entries):
    job = Job("w", (entries,), np.dtype(np.float32), ())
    return Piece(job, start, count, count)


def _checkpoint(folder, seed, dtype=ml_dtypes.bfloat16, shift=0):
    draw = np.random.default_rng(seed)
    # A tensor of odd length in front, so that the others start wherever they happen to.
    tensors = {"a": np.zeros(shift, np.uint8), "w": draw.normal(size=SHAPE).astype(dtype)}
    write_safetensors(folder, tensors)
    if shift:
        _move_to_front(folder / "model.safetensors", shift)
    return open_checkpoint(folder)


def _move_to_front(file, shift):
    """Puts the bytes of the last, short tensor first, as other writers order them."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name, entry in header.items():
        if name == "w":
            entry["data_offsets"] = [n + shift for n in entry["data_offsets"]]
        elif name == "a":
            entry["data_offsets"] = [0, shift]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(
        len(text).to_bytes(8, "little") + text + data[-shift:] + data[: len(data) - shift]
    )


def _mean(folder, checkpoints, **options):
    operands = tuple(Operand(c, "w", str(i)) for i, c in enumerate(checkpoints))
    job = mean_job("w", operands[0].dtype, operands, weights=[0.3, 0.7], normalize=True)
    return stream_jobs("stream", [job], folder, recipe={}, identity={}, **options)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bytes_that_lie_on_no_boundary_give_the_same_result(tmp_path, dtype):
    straight = [_checkpoint(tmp_path / f"s{i}", i, dtype) for i in range(2)]
    crooked = [_checkpoint(tmp_path / f"c{i}", i, dtype, shift=3 + 4 * i) for i in range(2)]
    for one, other in zip(straight, crooked, strict=True):
        assert other.mapped("w").start % 2 == 1
        np.testing.assert_array_equal(one.read("w"), other.read("w"))
    first, second = _mean(tmp_path / "one", straight), _mean(tmp_path / "two", crooked)
    assert first.checksums == second.checksums
    a, b = (c.read("w").astype(np.float64) for c in straight)
    got = open_checkpoint(tmp_path / "one").read("w").astype(np.float64)
    step = np.finfo(dtype).eps if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(got, 0.3 * a + 0.7 * b, rtol=step, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_threads_changes_no_byte(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    monkeypatch.setattr(_workers, "cores", lambda: workers)
    # As if the tensor were too long for one thread.
    monkeypatch.setattr(_pipeline, "_held", lambda job, pieces: 1 << 60)
    checkpoints = [_checkpoint(tmp_path / str(i), i, shift=5) for i in range(2)]
    done = _mean(tmp_path / "out", checkpoints)
    monkeypatch.undo()
    assert done.checksums == _mean(tmp_path / "again", checkpoints).checksums
    names = [tmp_path / name / "jaxweights-provenance.json" for name in ("out", "again")]
    assert names[0].read_text() == names[1].read_text()


def test_a_file_that_becomes_shorter_is_an_error_and_ends_nothing_else(tmp_path):
    checkpoints = [_checkpoint(tmp_path / str(i), i) for i in range(2)]
    os.truncate(tmp_path / "1" / "model.safetensors", 1000)
    with pytest.raises(OSError, match="became shorter while it was being read"):
        _mean(tmp_path / "out", checkpoints)
    assert not (tmp_path / "out").exists()


def test_turns_come_in_order_whoever_asks_first():
    turns, order = Turns(), []

    def take(start):
        with turns.turn("w", _piece(start, 10, 30)):
            order.append(start)

    for _ in range(2):  # the last piece lets another round begin
        threads = [threading.Thread(target=take, args=(start,)) for start in (20, 10, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.01)
        for thread in threads:
            thread.join(10)
    assert order == [0, 10, 20] * 2


def test_a_turn_that_never_comes_is_given_up():
    turns, seen = Turns(), []

    def wait():
        with pytest.raises(Stopped), turns.turn("w", _piece(10, 10, 30)):
            pass
        seen.append("stopped")

    thread = threading.Thread(target=wait)
    thread.start()
    turns.stop()
    thread.join(10)
    assert seen == ["stopped"]


def test_files_that_are_written_to_stay_open_and_few_are(tmp_path):
    paths = [tmp_path / str(i) for i in range(_OPEN_FILES + 5)]
    for path in paths:
        path.write_bytes(b"....")
    files = _OpenFiles()
    with files.opened(paths[0]) as first:
        for path in paths[1:]:
            with files.opened(path) as file:
                file.write(memoryview(b"ab"), 1)
        assert len(files._open) == _OPEN_FILES
        first.write(memoryview(b"cd"), 2)
    files.close()
    assert paths[0].read_bytes() == b"..cd"
    assert {path.read_bytes() for path in paths[1:]} == {b".ab."}


class _Arrays:
    """A tensor that no file holds as it is, as in Orbax or GGUF."""

    def __init__(self, array):
        self._flat, self._shape = array.reshape(-1), array.shape

    def shape(self, name):
        return self._shape

    def dtype(self, name):
        return self._flat.dtype

    def reader(self, name):
        return lambda start, out: np.copyto(out, self._flat[start : start + out.size])


def test_a_tensor_may_be_merged_with_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    operand = Operand(_Arrays(values), "w")
    job = mean_job("w", values.dtype, (operand, operand), weights=[1.0, 2.0], normalize=False)
    run = functools.partial(stream_jobs, "stream", [job], tmp_path / "out", recipe={}, identity={})
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for got in (open_checkpoint(tmp_path / "out").read("w"), Made([job]).read("w")):
        np.testing.assert_allclose(got, 3 * values, rtol=1e-6)


def test_an_interrupt_while_workers_are_started_ends_those_that_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    monkeypatch.setattr(_workers, "cores", lambda: 3)
    monkeypatch.setattr(_pipeline, "_held", lambda job, pieces: 1 << 60)
    checkpoints = [_checkpoint(tmp_path / str(i), i) for i in range(2)]
    workers = []

    class Thread(threading.Thread):
        def start(self):
            if workers:
                raise KeyboardInterrupt
            workers.append(self)
            super().start()

    fake = types.SimpleNamespace(Thread=Thread, Lock=threading.Lock)
    monkeypatch.setattr(_flow, "threading", fake)
    with pytest.raises(KeyboardInterrupt):
        _mean(tmp_path / "out", checkpoints)
    assert not workers[0].is_alive()
    assert not (tmp_path / "out").exists()


def test_many_threads_in_little_memory_do_not_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    monkeypatch.setattr(_workers, "cores", lambda: 8)
    monkeypatch.setattr(_pipeline, "_held", lambda job, pieces: 1 << 60)
    # Room for two pieces, so that six threads wait for room while one waits for its turn.
    monkeypatch.setattr(_pipeline, "Budget", lambda limit: Budget(1 << 18))
    checkpoints = [_checkpoint(tmp_path / str(i), i) for i in range(2)]
    thread = threading.Thread(target=_mean, args=(tmp_path / "out", checkpoints), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert (tmp_path / "out").exists()


def test_a_tensor_that_is_made_twice_is_the_same():
    a = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    b = -a + 0.05 * np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    operands = Operand(_Arrays(a), "w", "a"), Operand(_Arrays(b), "w", "b")
    made = Made([transform_job("w", operands, jw.merge.slerp(), dtype=a.dtype)])
    np.testing.assert_array_equal(made.read("w"), made.read("w"))


def test_workers_hold_float64_where_their_caller_does(tmp_path):
    values = 1 + np.random.default_rng(0).normal(size=SHAPE) * 1e-12
    operands = tuple(Operand(_Arrays(x), "w", str(i)) for i, x in enumerate((values, values)))
    with jax.enable_x64(True):
        job = mean_job("w", values.dtype, operands, weights=[1.0, 1.0], normalize=True)
        stream_jobs("stream", [job], tmp_path / "out", recipe={}, identity={})
    got = open_checkpoint(tmp_path / "out").read("w")
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, values)


def test_a_dtype_that_jax_does_not_hold_is_refused_in_what_is_made():
    operand = Operand(_Arrays(np.ones(8)), "w")
    made = Made([Job("w", (8,), np.dtype(np.float64), (operand,), lambda x, _: np.float32(x[0]))])
    with pytest.raises(ValueError, match=r"'w': became float32, but was planned as float64"):
        made.read("w")


def test_memory_that_compiling_alone_would_take_is_refused(tmp_path):
    tensors = {"w": np.ones((64, 64), np.float32)}
    write_safetensors(tmp_path / "a", tensors)
    memory = resident_bytes() + (64 << 20)
    with pytest.raises(ValueError, match=r"leaves nothing beside .* that compiling takes. Give"):
        transform_checkpoint(
            jw.merge.task_arithmetic(),
            tmp_path / "a",
            tmp_path / "out",
            models=[tmp_path / "a"],
            memory=memory,
        )
    assert not (tmp_path / "out").exists()


def test_tensors_of_new_lengths_come_first_so_that_workers_compile_different_programs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    monkeypatch.setattr(_workers, "cores", lambda: 1)
    made = []

    def job(name, length):
        values = np.full(length, len(name), np.float32)

        def compute(arrays, start):
            made.append(name)
            return arrays[0] + 1

        return Job(name, (length,), values.dtype, (Operand(_Arrays(values), name),), compute, True)

    # Two of one short piece, one of several pieces, two of one long piece.
    lengths = {"a": 500, "b": 600, "c": 20000, "d": 8192, "e": 8000}
    jobs = [job(name, length) for name, length in lengths.items()]
    done = stream_jobs("stream", jobs, tmp_path / "out", recipe={}, identity={})
    assert list(dict.fromkeys(made)) == ["a", "d", "b", "c", "e"]
    assert done.tensors == 5


class _Passes(Survey):
    """Looks at a tensor three times."""

    def __init__(self):
        self.sums = []
        self.left = 3

    def look(self, job, start, count, arrays):
        return arrays[0][:count].sum(dtype=np.float64)

    def add(self, job, start, seen):
        self.sums.append(seen)

    def decide(self):
        self.left -= 1
        return self.left > 0


@pytest.mark.parametrize(("held", "reads"), [(True, 1), (False, 4)])
def test_a_tensor_that_fits_is_read_once_for_all_its_passes(tmp_path, monkeypatch, held, reads):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 13)
    if not held:
        monkeypatch.setattr(_pipeline, "_held", lambda job, pieces: 1 << 60)
    values = np.arange(40000, dtype=np.float32)
    read = np.zeros(values.size, int)

    class Counted(_Arrays):
        def reader(self, name):
            fill = super().reader(name)

            def counted(start, out):
                read[start : start + out.size] += 1
                fill(start, out)

            return counted

    survey = _Passes()
    operands = (Operand(Counted(values), "w"),)
    job = Job("w", values.shape, values.dtype, operands, lambda a, _: a[0] + 1, True, survey=survey)
    stream_jobs("stream", [job], tmp_path / "out", recipe={}, identity={})
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "out").read("w"), values + 1)
    assert (read == reads).all()
    assert sum(survey.sums) == 3 * values.sum(dtype=np.float64)
