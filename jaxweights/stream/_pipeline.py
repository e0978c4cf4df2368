"""Reads, computes and writes at the same time, holding no more than a budget."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxweights.core._paths import fail
from jaxweights.stream._destination import Destination
from jaxweights.stream._jobs import Job, Operand, Piece, Survey, cut
from jaxweights.stream._memory import Budget, Buffers, resident_bytes

Progress = Callable[[str, int, int], None]
_WORKERS = 2  # one computes while the other hands over
_SMALLEST_LIMIT = 64 << 20  # what the smallest stream needs beside what the process holds already
_TASK = "Streaming"


def run_jobs(
    function: str,
    jobs: Sequence[Job],
    destination: Destination,
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Makes and writes every tensor that is not done.

    Args:
      function: Start of the error messages.
      jobs: One for each tensor, in the order in which they are made.
      destination: Where they go.
      memory: Most bytes that the process may hold; None leaves tensors that cannot be cut what
        they need.
      progress: Called with (task, bytes so far, bytes in all), of what is read and written.

    Returns:
      Checksums of the operands that were read, by `label/name`.

    Raises:
      ValueError: If a tensor does not fit into the memory.
    """
    held = resident_bytes()
    limit = None if memory is None else memory - held
    if limit is not None and limit < _SMALLEST_LIMIT:
        raise ValueError(
            f"{function}: memory={memory} leaves nothing beside the {held} bytes that the process "
            f"holds before it reads anything. Give {held + 4 * _SMALLEST_LIMIT} or more."
        )
    budget = Budget(limit)
    todo = [job for job in jobs if job.name not in destination.done]
    # Several pieces in flight, so that reading, computing and writing overlap.
    cuts = {job.name: list(cut(job, budget.limit // 4)) for job in jobs}
    direct, surveyed = _split(jobs, todo, cuts)
    if limit is not None:
        every = [piece for job in todo for piece in cuts[job.name]]
        fail(function, [_too_large(p, limit, memory) for p in every if p.cost > limit])

    def append(piece: Piece, data: np.ndarray) -> None:
        destination.append(piece.job.name, data)

    def pieces(group: Sequence[Job]) -> list[Piece]:
        return [piece for job in group for piece in cuts[job.name]]

    with _Flow(budget, _Meter(jobs, todo, progress)) as flow:
        flow.run(pieces(direct), _look_and_make, append)
        for survey, looked_at, made in surveyed:
            again = True
            while again:
                flow.run(pieces(looked_at), _look, _add)
                again = survey.decide()
            flow.run(pieces(made), _make, append)
    return flow.checksums


def _too_large(piece: Piece, limit: int, memory: int | None) -> str:
    assert memory is not None
    return (
        f"{piece.job.name!r}: needs {piece.cost} bytes at once, because its method looks at the "
        f"whole tensor, but memory={memory} leaves {limit}. Give {memory - limit + piece.cost} or "
        "more."
    )


def _split(
    jobs: Sequence[Job], todo: Sequence[Job], cuts: dict[str, list[Piece]]
) -> tuple[list[Job], list[tuple[Survey, list[Job], list[Job]]]]:
    """Jobs that go through the pipeline at once, and those whose surveys need passes of their own.

    Returns:
      The former; and every survey of the latter with the jobs that it is about (those that are done
      too) and those of them that are made.
    """
    users = collections.Counter(id(job.survey) for job in jobs if job.survey is not None)
    direct: list[Job] = []
    waiting: dict[int, tuple[Survey, list[Job], list[Job]]] = {}
    for job in todo:
        survey = job.survey
        if survey is None or (users[id(survey)] == 1 and len(cuts[job.name]) == 1):
            direct.append(job)
        elif id(survey) in waiting:
            waiting[id(survey)][2].append(job)
        else:
            about = [other for other in jobs if other.survey is survey]
            waiting[id(survey)] = (survey, about, [job])
    return direct, list(waiting.values())


# What is done with the arrays of a piece, in a worker.


def _look(piece: Piece, arrays: list[Any]) -> Any:
    survey = piece.job.survey
    assert survey is not None
    return survey.look(piece.job, piece.start, piece.count, arrays)


def _add(piece: Piece, seen: Any) -> None:
    survey = piece.job.survey
    assert survey is not None
    survey.add(piece.job, piece.start, seen)


def _look_and_make(piece: Piece, arrays: list[Any]) -> np.ndarray:
    survey = piece.job.survey
    again = survey is not None
    while again and survey is not None:
        _add(piece, _look(piece, arrays))
        again = survey.decide()
    return _make(piece, arrays)


def _make(piece: Piece, arrays: list[Any]) -> np.ndarray:
    """The piece's entries, flat, as bytes."""
    job = piece.job
    result = arrays[0] if job.compute is None else job.compute(arrays, piece.start)
    result = np.asarray(result)
    if result.dtype != job.dtype:
        wide = " JAX holds float64 with jax_enable_x64 only." if job.dtype == np.float64 else ""
        raise ValueError(
            f"{job.name!r}: became {result.dtype}, but was planned as {job.dtype}.{wide}"
        )
    return result.reshape(-1)[: piece.count].view(np.uint8)


@dataclasses.dataclass
class _Read:
    """A piece whose operands were read, and the buffers that hold them."""

    piece: Piece
    arrays: list[np.ndarray]
    buffers: list[np.ndarray]


Work = Callable[[Piece, list[Any]], Any]
Sink = Callable[[Piece, Any], None]


class _Flow:
    """Three stages at once: a thread reads ahead, workers compute, the caller's thread takes in."""

    def __init__(self, budget: Budget, meter: _Meter) -> None:
        self.checksums: dict[str, str] = {}
        self._budget = budget
        self._meter = meter
        self._buffers = Buffers(budget.limit // 2)
        self._digests: dict[Operand, Any] = {}
        self._pool = ThreadPoolExecutor(_WORKERS, "jaxweights-compute")

    def __enter__(self) -> _Flow:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, pieces: Sequence[Piece], work: Work, sink: Sink) -> None:
        """Sends pieces through the stages; `sink` gets the results in order."""
        ready: queue.Queue[_Read | BaseException | None] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._read_ahead, args=(pieces, ready, stop), daemon=True)
        waiting: collections.deque[tuple[_Read, Future[Any]]] = collections.deque()
        thread.start()
        try:
            while (read := ready.get()) is not None:
                if isinstance(read, BaseException):
                    raise read
                waiting.append((read, self._pool.submit(_on_device, work, read)))
                while waiting and (len(waiting) > _WORKERS or waiting[0][1].done()):
                    self._take_in(*waiting.popleft(), sink)
            while waiting:
                self._take_in(*waiting.popleft(), sink)
        finally:
            stop.set()
            for read, future in waiting:
                future.cancel()
                self._budget.give(read.piece.cost)
            self._budget.wake()
            thread.join()

    def _take_in(self, read: _Read, future: Future[Any], sink: Sink) -> None:
        try:
            result = future.result()
            sink(read.piece, result)
            written = result.nbytes if isinstance(result, np.ndarray) else 0
        finally:
            for buffer in read.buffers:
                self._buffers.give(buffer)
            self._budget.give(read.piece.cost)
        self._meter.add(written + sum(array.nbytes for array in read.arrays))

    def _read_ahead(
        self, pieces: Sequence[Piece], ready: queue.Queue[Any], stop: threading.Event
    ) -> None:
        readers: dict[Operand, Callable[[int, np.ndarray], None]] = {}
        try:
            for piece in pieces:
                if not self._budget.take(piece.cost, unless=stop):
                    return
                if piece.start == 0:
                    readers = {o: o.source.reader(o.name) for o in piece.job.operands}
                ready.put(self._read(piece, readers))
            ready.put(None)
        except BaseException as error:  # it is raised where the results are waited for
            ready.put(error)

    def _read(self, piece: Piece, readers: dict[Operand, Any]) -> _Read:
        arrays, held = [], []
        for operand in piece.job.operands:
            shape = operand.shape if piece.padded is None else (piece.padded,)
            array, buffer = self._buffers.take(shape, operand.dtype)
            flat = array.reshape(-1)
            part = flat[: piece.count] if piece.padded is not None else flat
            readers[operand](piece.start, part)
            self._digest(operand, part, piece)
            flat[part.size :] = np.zeros((), operand.dtype)
            arrays.append(array)
            held.append(buffer)
        return _Read(piece, arrays, held)

    def _digest(self, operand: Operand, part: np.ndarray, piece: Piece) -> None:
        import xxhash

        place = f"{operand.label}/{operand.name}"
        if place in self.checksums:
            return
        if piece.start == 0:
            self._digests[operand] = xxhash.xxh3_128()
        self._digests[operand].update(part.view(np.uint8))
        if piece.is_last:
            self.checksums[place] = f"xxh3:{self._digests.pop(operand).hexdigest()}"


def _on_device(work: Work, read: _Read) -> Any:
    # XLA's CPU arrays share memory with aligned buffers; nobody writes those meanwhile.
    if read.piece.job.compute is None:
        return work(read.piece, list(read.arrays))
    return work(read.piece, [jax.device_put(array, may_alias=True) for array in read.arrays])


class _Meter:
    """Progress in bytes read and written."""

    def __init__(self, jobs: Sequence[Job], todo: Sequence[Job], progress: Progress | None) -> None:
        self._progress = progress
        self._total = sum(job.bytes_read + job.nbytes for job in jobs)
        self._done = self._total - sum(job.bytes_read + job.nbytes for job in todo)
        self.add(0)

    def add(self, nbytes: int) -> None:
        # Padding and second looks would lead beyond the end.
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(_TASK, self._done, self._total)
