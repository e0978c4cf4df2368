"""Workers that take pieces from reading to writing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._mapped import mapped_tensor
from jaxweights.stream._jobs import Job, Operand, Piece
from jaxweights.stream._memory import ALIGNMENT, Budget, Buffers
from jaxweights.stream._meter import Meter
from jaxweights.stream._turns import Stopped, Turns
from jaxweights.stream._workers import workers

_PIECES_AHEAD = 4  # how far ahead of the workers a disk reads

# What is done with the arrays of a piece.


def look_at(piece: Piece, arrays: list[np.ndarray]) -> Any:
    survey = piece.job.survey
    assert survey is not None
    return survey.look(piece.job, piece.start, piece.count, arrays)


def take_in(piece: Piece, seen: Any) -> None:
    survey = piece.job.survey
    assert survey is not None
    survey.add(piece.job, piece.start, seen)


def make_entries(piece: Piece, arrays: list[np.ndarray]) -> np.ndarray:
    """The piece's entries, flat, as bytes."""
    job = piece.job
    if job.compute is None:
        return arrays[0].reshape(-1)[: piece.count].view(np.uint8)
    result = np.asarray(job.compute(arrays, piece.start))
    if result.dtype != job.dtype:
        wide = " JAX holds float64 with jax_enable_x64 only." if job.dtype == np.float64 else ""
        raise ValueError(
            f"{job.name!r}: became {result.dtype}, but was planned as {job.dtype}.{wide}"
        )
    return result.reshape(-1)[: piece.count].view(np.uint8)


@dataclasses.dataclass(frozen=True)
class Task:
    """What one worker does in one go, and the bytes that it holds meanwhile."""

    cost: int
    run: Callable[[], None]


Work = Callable[[Piece, list[np.ndarray]], Any]
Sink = Callable[[Piece, Any], None]


class Flow:
    """Workers that take pieces from reading to writing.

    Args:
      budget: Bytes that they may hold together.
      meter: Is told what was done.
    """

    def __init__(self, budget: Budget, meter: Meter) -> None:
        self._checksums: dict[str, str] = {}
        self._x64: bool = jax.config.read("jax_enable_x64")  # of this thread
        self._budget = budget
        self._meter = meter
        self._buffers = Buffers(budget.limit // 2)
        self._digests: dict[tuple[str, Operand], Any] = {}
        self._readers = _Readers()
        self._turns = Turns()
        self._workers = workers()

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_: object) -> None:
        self._turns.stop()

    def run_pieces(self, pieces: Sequence[Piece], work: Work, sink: Sink) -> None:
        """Does work on pieces; `sink` gets the results in the order of each tensor's entries."""
        self.run(self.each(pieces, work, sink))

    def each(self, pieces: Sequence[Piece], work: Work, sink: Sink) -> list[Task]:
        """A task for each piece."""
        return [
            Task(piece.cost, functools.partial(self._take, piece, work, sink)) for piece in pieces
        ]

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs tasks, begun in their order; the first error ends all of them."""
        left = iter(tasks)
        lock = threading.Lock()
        errors: list[BaseException] = []

        def work() -> None:
            with jax.enable_x64(self._x64):
                take_tasks()

        def take_tasks() -> None:
            try:
                while not self._turns.stopped.is_set():
                    # Room is given in order, too: a piece that waits for its turn holds some.
                    with lock:
                        task = next(left, None)
                        if task is None:
                            return
                        if not self._budget.take(task.cost, unless=self._turns.stopped):
                            return
                    try:
                        task.run()
                    finally:
                        self._budget.give(task.cost)
            except Stopped:
                pass
            except BaseException as error:  # it is raised where the tasks are waited for
                errors.append(error)
                self._stop()

        count = min(self._workers, len(tasks))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # such as an interrupt from the keyboard
            self._stop()
            for thread in threads:
                if thread.is_alive():  # it may have come before the last one was started
                    thread.join()
            raise
        if errors:
            raise errors[0]

    def _take(self, piece: Piece, work: Work, sink: Sink) -> None:
        """Takes a piece from reading to writing."""
        survey = piece.job.survey
        samples = work is look_at and survey is not None and survey.samples
        with self._arrays(piece, samples=samples) as arrays:
            result = work(piece, arrays)
            with self._turns.turn(("taken", piece.job.name), piece):
                sink(piece, result)
            self._count(result, arrays)

    def make_whole(self, job: Job, pieces: Sequence[Piece], append: Sink) -> None:
        """Takes a tensor through all its passes; what is surveyed stays at hand till the end."""
        survey = job.survey
        if survey is None:
            for piece in pieces:
                with self._arrays(piece) as arrays:
                    self._make(piece, arrays, append)
            return
        with contextlib.ExitStack() as stack:
            read = functools.cache(lambda i: stack.enter_context(self._arrays(pieces[i])))
            again = True
            while again:
                for i, piece in enumerate(pieces):
                    take_in(piece, look_at(piece, read(i)))
                again = survey.decide()
            for i, piece in enumerate(pieces):
                self._make(piece, read(i), append)

    def _make(self, piece: Piece, arrays: list[np.ndarray], append: Sink) -> None:
        result = make_entries(piece, arrays)
        append(piece, result)
        self._count(result, arrays)

    def _stop(self) -> None:
        self._turns.stop()
        self._budget.wake()

    def _count(self, result: Any, arrays: Sequence[np.ndarray]) -> None:
        written = result.nbytes if isinstance(result, np.ndarray) else 0
        self._meter.add(written + sum(array.nbytes for array in arrays))

    @contextlib.contextmanager
    def _arrays(self, piece: Piece, *, samples: bool = False) -> Iterator[list[np.ndarray]]:
        """The operands' arrays of a piece, until the end of the block.

        Args:
          piece: The piece.
          samples: Whether few of the entries are looked at; then they are neither summed up nor
            padded.
        """
        with contextlib.ExitStack() as stack:
            read = [self._read(piece, i, stack, samples) for i in range(len(piece.job.operands))]
            if not samples:
                self._digest(piece, [part for _, part in read])
            yield [array for array, _ in read]

    def _read(
        self, piece: Piece, i: int, stack: contextlib.ExitStack, samples: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The array of operand `i`, and those of its bytes that come from the file.

        It is the file's own memory where that lies on a boundary on which XLA reads in place.
        """
        operand = piece.job.operands[i]
        dtype = operand.dtype
        shape = operand.shape if piece.padded is None else (piece.padded,)
        size = math.prod(shape)
        count = size if piece.padded is None else piece.count
        tensor = mapped_tensor(operand.source, operand.name) if count else None
        raw = None
        if tensor is not None:
            raw = tensor.view(piece.start, count)
            tensor.expect(piece.start + _PIECES_AHEAD * count, count)
            as_it_lies = samples or piece.job.compute is None
            if as_it_lies or (count == size and raw.ctypes.data % ALIGNMENT == 0):
                stack.callback(tensor.forget, piece.start, count)
                array = raw.view(dtype)
                return (array if as_it_lies else array.reshape(shape)), raw
        array, buffer = self._buffers.take(shape, dtype)
        stack.callback(self._buffers.give, buffer)
        flat = array.reshape(-1)
        part = flat[:count].view(np.uint8)
        if tensor is not None and raw is not None:
            np.copyto(part, raw)
            tensor.forget(piece.start, count)
        elif count:
            # In turn, because a reader may sum up what it reads.
            with self._turns.turn((piece.job.name, i), piece):
                self._readers.of(piece, i)(piece.start, flat[:count])
        flat[count:].view(np.uint8)[:] = 0  # bytes: narrow floats are filled far more slowly
        return array, part

    def checksums_of(self, job: Job) -> dict[str, str]:
        """Checksums of a tensor's operands, all of which were read, by `label/name`."""
        places = [f"{operand.label}/{operand.name}" for operand in job.operands]
        return {place: self._checksums[place] for place in places}

    def _digest(self, piece: Piece, parts: Sequence[np.ndarray]) -> None:
        """Adds bytes to the checksums of operands that are read for the first time."""
        import xxhash

        job = piece.job
        with self._turns.turn(("read", job.name), piece):
            for operand, part in dict(zip(job.operands, parts, strict=True)).items():
                key, place = (job.name, operand), f"{operand.label}/{operand.name}"
                if piece.start == 0 and place not in self._checksums:
                    self._digests[key] = xxhash.xxh3_128()
                if key not in self._digests:
                    continue
                self._digests[key].update(part)
                if piece.is_last:
                    self._checksums[place] = f"xxh3:{self._digests.pop(key).hexdigest()}"


class _Readers:
    """Functions that read operands of which no file holds the entries as they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[str, int], list[Any]] = {}  # the function, and entries read

    def of(self, piece: Piece, i: int) -> Callable[[int, np.ndarray], None]:
        """That of operand `i`; forgotten when all pieces have asked, as it may hold the tensor."""
        key, operand = (piece.job.name, i), piece.job.operands[i]
        with self._lock:
            if key not in self._found:
                self._found[key] = [operand.source.reader(operand.name), 0]
            found = self._found[key]
            found[1] += piece.count
            if found[1] >= piece.job.entries:
                del self._found[key]
            return found[0]
