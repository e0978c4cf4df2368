"""What methods that read Gram matrices say about the leaves that they could not calibrate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._host import on_host
from jaxweights.core._paths import Path
from jaxweights.core._stats import Statistic, Stats
from jaxweights.quantize._settings import check_callable, is_word

OnFailure = Literal["error", "round_to_nearest"]


class LeafReport(NamedTuple):
    """How one leaf was quantized; arrays of the shape of its stack, `()` without one.

    Attributes:
      status: Strings: the method, `"<method>_damped:0.1"` where its Gram matrix needed more damping
        than was asked for, or `"round_to_nearest:no_tokens"` and
        `"round_to_nearest:not_positive_definite"` where there was no use of it.
      error: `output_error`, relative; float32.
      tokens: Tokens that the Gram matrix was summed over.
    """

    status: np.ndarray
    error: np.ndarray
    tokens: np.ndarray


ReportLeaf = Callable[[Path, LeafReport], object]


def check_failures(asker: str, on_failure: OnFailure, report: Any = None) -> None:
    """Refuses an unknown setting, and a report that cannot be called."""
    check_callable(asker, report=report)
    if not is_word(on_failure, ("error", "round_to_nearest")):
        raise ValueError(
            f"{asker}: on_failure={on_failure!r} is unknown. Choose 'error' or 'round_to_nearest'."
        )


def status_of(method: str, tokens: np.ndarray, damping: np.ndarray, asked: float) -> np.ndarray:
    """Statuses as in `LeafReport`, from tokens and damping of the shape of the stack.

    Example:
      >>> status_of("gptq", np.array([9, 9, 0]), np.array([0.01, 0.1, 0.01]), 0.01).tolist()
      ['gptq', 'gptq_damped:0.1', 'round_to_nearest:no_tokens']
    """

    def one(tokens: int, damping: float) -> str:
        if tokens == 0:
            return "round_to_nearest:no_tokens"
        if np.isnan(damping):
            return "round_to_nearest:not_positive_definite"
        raised = np.float32(damping) > np.float32(asked)
        return f"{method}_damped:{damping:.2g}" if raised else method

    tokens, damping = np.broadcast_arrays(tokens, damping)
    found = [one(int(t), float(d)) for t, d in zip(tokens.flat, damping.flat, strict=True)]
    return np.asarray(found, dtype=np.str_).reshape(tokens.shape)


def describe_failure(path: Path, tokens: np.ndarray, damping: np.ndarray) -> str | None:
    """Says which matrices of a leaf could not be factored, and why; None if all could."""
    empty = on_host(tokens) == 0
    failed = np.isnan(on_host(damping)) & ~empty
    singular = "its Gram matrix is not positive definite even with damping=1, or not finite"
    for bad, reason, remedy in (
        (empty, "no calibration token reached it", "Calibrate on more data"),
        (failed, singular, "Calibrate again"),
    ):
        if bad.any():
            return (
                f"{path!r}: {reason}{places_of(bad)}. {remedy}, pass on_failure="
                "'round_to_nearest', or leave this weight out with `partition`."
            )
    return None


def nonfinite_statistics(stats: Stats, paths: Iterable[Path], name: Statistic) -> list[str]:
    """Complaints about statistics that hold NaN or infinity; none of those that are traced.

    Of Gram matrices only diagonals are read: what is not finite in an input shows there.
    """
    problems = []
    for path in paths:
        found = stats.get(path, name)
        if isinstance(found, Tracer | jax.ShapeDtypeStruct | None):
            continue
        with jax.ensure_compile_time_eval():  # the statistic is concrete, whatever is traced around
            if name == "gram":
                found = jnp.diagonal(found, axis1=-2, axis2=-1)
            finite = bool(jnp.isfinite(found).all())
        if not finite:
            problems.append(
                f"{path!r}: the statistic {name!r} is not finite: its inputs held NaN or were too "
                "large. Calibrate in a wider dtype, or leave this weight out with `partition`."
            )
    return problems


def warn_of_fallback(asker: str, path: Path, status: np.ndarray, *, reports: bool = True) -> None:
    """Warns where a matrix was rounded to nearest for want of a usable Gram matrix.

    Args:
      asker: What the warning calls the transform.
      path: The leaf.
      status: From `status_of`.
      reports: Whether the transform's report would tell the same.
    """
    fallen = np.char.startswith(status, "round_to_nearest")
    if fallen.any():
        reasons = sorted({one.split(":")[1] for one in status[fallen].flat})
        more = "Calibrate on more data, or leave this weight out with `partition`."
        remedy = "Pass report=... to be told instead of warned." if reports else more
        warnings.warn(
            f"{asker}: {path!r}: was rounded to nearest ({', '.join(reasons)}){places_of(fallen)}. "
            f"{remedy}",
            stacklevel=2,
        )


def warn_of_few_tokens(
    asker: str, path: Path, tokens: np.ndarray, inputs: int, damping: np.ndarray
) -> None:
    """Warns where fewer tokens were seen than a matrix has inputs, but any."""
    tokens = on_host(tokens)
    few = (tokens < inputs) & (tokens > 0)
    if few.any():
        most = float(np.max(np.broadcast_to(damping, tokens.shape)[few]))
        warnings.warn(
            f"{asker}: {path!r}: {int(tokens[few].min())} tokens were seen{places_of(few)}, fewer "
            f"than its {inputs} inputs: only the damping ({most:.2g} of the mean diagonal) makes "
            "its Gram matrix invertible. Calibrate on more data.",
            stacklevel=2,
        )


def places_of(bad: np.ndarray) -> str:
    """Which matrices of a stack are bad, in brackets; nothing without a stack."""
    if not bad.ndim:
        return ""
    places = [i[0] if len(i) == 1 else tuple(i) for i in np.argwhere(bad).tolist()]
    return f" (matrices {places[:8]} of its stack)"
