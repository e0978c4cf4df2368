"""Reads, computes and writes with every core, holding no more than a budget.

Each worker takes a piece from its first byte read to its last byte written, so that it stays in the
core's cache and no worker waits for another. What depends on the order of the pieces of a tensor,
checksums and sums, takes turns.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxweights.core._paths import fail
from jaxweights.stream._destination import Destination
from jaxweights.stream._flow import Flow, Task, look_at, make_entries, take_in
from jaxweights.stream._jobs import Job, Piece, Survey, cut
from jaxweights.stream._memory import Budget, resident_bytes
from jaxweights.stream._meter import Meter, Progress

# What compiling adds to a process: pages of the compiler itself, and what it leaves behind. It is
# most where DARE and DELLA restore norms, five programs of two shapes.
_COMPILER = 64 << 20
_SMALLEST_LIMIT = 24 << 20  # what the smallest stream needs besides


def run_jobs(
    function: str,
    jobs: Sequence[Job],
    destination: Destination,
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Makes and writes every tensor that is not done.

    Args:
      function: Start of the error messages.
      jobs: One for each tensor, in the order in which they are made.
      destination: Where they go.
      memory: Most bytes that the process may hold; None leaves tensors that cannot be cut what
        they need.
      progress: Called with (task, bytes so far, bytes in all), of what is read and written.

    Raises:
      ValueError: If a tensor does not fit into the memory.
    """
    held = resident_bytes()
    limit = None if memory is None else memory - held - _COMPILER
    if limit is not None and limit < _SMALLEST_LIMIT:
        raise ValueError(
            f"{function}: memory={memory} leaves nothing beside the {held} bytes that the process "
            f"holds before it reads anything, and {_COMPILER} that compiling takes. Give "
            f"{held + _COMPILER + 4 * _SMALLEST_LIMIT} or more."
        )
    budget = Budget(limit)
    todo = [job for job in jobs if job.name not in destination.done]
    # Several pieces in flight, one for each worker.
    share = budget.limit // 4
    cuts = {job.name: list(cut(job, share)) for job in jobs}
    if limit is not None:
        every = [piece for job in todo for piece in cuts[job.name]]
        fail(function, [_too_large(p, limit, memory) for p in every if p.cost > limit])

    def append(piece: Piece, data: np.ndarray) -> None:
        inputs = flow.checksums_of(piece.job) if piece.is_last else None
        destination.append(piece.job.name, data, inputs)

    def pieces(group: Sequence[Job]) -> list[Piece]:
        return [piece for job in group for piece in cuts[job.name]]

    users = collections.Counter(id(job.survey) for job in jobs if job.survey is not None)
    with Flow(budget, Meter(jobs, todo, progress)) as flow:
        tasks: list[Task] = []
        surveyed: dict[int, Survey] = {}
        for job in _various_first(todo, cuts):
            own = cuts[job.name]
            alone = job.survey is None or users[id(job.survey)] == 1
            if alone and (len(own) == 1 or _held(job, own) <= share):
                make = functools.partial(flow.make_whole, job, own, append)
                tasks.append(Task(_held(job, own), make))
            elif job.survey is None:
                tasks += flow.each(own, make_entries, append)
            else:
                surveyed[id(job.survey)] = job.survey
        flow.run(tasks)
        for survey in surveyed.values():
            about = [job for job in jobs if job.survey is survey]
            made = [job for job in about if job.name not in destination.done]
            with budget.holding(sum(job.kept * job.entries for job in about)):
                again = True
                while again:
                    flow.run_pieces(pieces(about), look_at, take_in)
                    again = survey.decide()
                flow.run_pieces(pieces(made), make_entries, append)


def _various_first(jobs: Sequence[Job], cuts: Mapping[str, Sequence[Piece]]) -> list[Job]:
    """The jobs, of which those come first whose only piece is the first of its length.

    Each length has programs of its own. Workers that begin with different ones compile at the same
    time; with the same, one would wait for what another compiles.
    """
    first: dict[tuple[int, ...], Job] = {}
    for job in jobs:
        [piece, *more] = cuts[job.name]
        if not more:
            length = job.shape if piece.padded is None else (piece.padded,)
            first.setdefault(length, job)
    early = {job.name for job in first.values()}
    return [*first.values(), *(job for job in jobs if job.name not in early)]


def _too_large(piece: Piece, limit: int, memory: int | None) -> str:
    assert memory is not None
    return (
        f"{piece.job.name!r}: needs {piece.cost} bytes at once, because its method looks at the "
        f"whole tensor, but memory={memory} leaves {limit}. Give {memory - limit + piece.cost} or "
        "more."
    )


def _held(job: Job, pieces: Sequence[Piece]) -> int:
    """Bytes that are held while one worker makes a tensor, whose operands it holds meanwhile."""
    made = max(piece.cost - piece.cost_of_operands for piece in pieces)
    return made + sum(piece.cost_of_operands for piece in pieces) + job.kept * job.entries
