"""Progress on standard error: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

Progress = Callable[[str, int, int], None]
Unit = Literal["steps", "bytes"]

_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def show_progress(quiet: bool = False, unit: Unit = "steps") -> Iterator[Progress]:
    """Shows progress while the body runs.

    Args:
      quiet: Whether to show nothing.
      unit: What is counted; bytes are shown with their rate and the time left.

    Yields:
      A function of (task, done, total); total 0 means unknown.
    """
    if quiet:
        yield lambda task, done, total: None
    elif sys.stderr.isatty():
        with _bars(unit) as show:
            yield show
    else:
        yield _Lines(unit)


@contextlib.contextmanager
def _bars(unit: Unit) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    if unit == "bytes":
        columns += (DownloadColumn(), TransferSpeedColumn())
    columns += (TimeRemainingColumn(),)
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total or None)
            bars.update(tasks[task], completed=done, total=total or None)  # type: ignore[arg-type]

        yield show


class _Lines:
    """One line when a task begins, one every ten seconds, one when it ends."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._first: dict[str, int] = {}  # what an earlier run had done
        self._ended: set[str] = set()

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if task not in self._started:
            self._started[task] = now
            self._said[task] = now
            self._first[task] = done
            print(f"{task} ...", file=sys.stderr, flush=True)
        if total and done >= total:
            if task not in self._ended:
                self._ended.add(task)
                seconds = now - self._started[task]
                print(f"{task}: done, {seconds:.1f} s", file=sys.stderr, flush=True)
        elif now - self._said[task] > _EVERY_SECONDS:
            self._said[task] = now
            share = f"{100 * done / total:.0f} %" if total else str(done)
            rate = (done - self._first[task]) / (now - self._started[task])
            if total and rate > 0:
                share += f" ({done} of {total})" if self._unit == "steps" else ""
                share += f", {rate / 1e6:.0f} MB/s" if self._unit == "bytes" else ""
                share += f", {(total - done) / rate:.0f} s left"
            print(f"{task}: {share}", file=sys.stderr, flush=True)
