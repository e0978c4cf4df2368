"""How programs for slices are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxweights.stream._workers import cores, workers

Result = TypeVar("Result")


def slice_program(function: Callable[..., Result], **how: Any) -> Callable[..., Result]:
    """As `jax.jit`, for programs that go entry by entry over slices that a core's cache holds.

    On a CPU whose cores all have a worker, programs that divide their work among threads only wait
    for each other; and the older of XLA's code generators makes loops that are as fast in half the
    time. Where entries are reduced to few numbers, generators may differ in the order: use
    `jax.jit` there.

    Args:
      function: What is compiled.
      **how: Further settings of `jax.jit`.

    Returns:
      The compiled function.
    """

    @functools.cache
    def compiled() -> Callable[..., Result]:
        return jax.jit(function, compiler_options=_options(), **how)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Result:
        return compiled()(*args, **kwargs)

    return run


def run_where_called() -> None:
    """Lets the thread that calls a program run it, on a CPU, instead of waking another one.

    Workers wait for each result at once. This is a setting of the whole process that must be made
    before JAX first looks for devices, so it is for programs, not libraries.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _options() -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    options: dict[str, Any] = {}
    if cores() == workers():
        options["xla_disable_hlo_passes"] = "cpu-parallel-task-assigner"
    if jax.__version_info__ < (0, 11):  # later ones refuse a flag that they do not know
        options["xla_cpu_use_fusion_emitters"] = False
    return options
