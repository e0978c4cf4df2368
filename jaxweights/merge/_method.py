"""A user's own merge method: one typed function of one leaf."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._paths import nearest
from jaxweights.core._transform import Transform
from jaxweights.merge._models import Output, all_finite, check_choice, compute_dtype
from jaxweights.merge._per_leaf import LeafJob, Merged, per_leaf

LeafMerge = Callable[..., jax.Array]
_COMMON = ("names", "out_dtype", "rounding", "nonfloat")
_KINDS = {float: "a number", int: "a whole number", bool: "True or False", str: "text"}


def method(
    fn: LeafMerge | None = None, *, scope: Literal["entry", "leaf"] = "leaf"
) -> Callable[..., Any]:
    """Makes a merge method of a function that merges one leaf.

    The function takes the base and the list of models, as float32 arrays (float64 for float64
    leaves), and its settings by keyword; it returns the merged array. Each layer or expert of a
    stacked leaf is merged by itself. What is made is a method like those of this module: it checks
    its settings when it is built, every model when it sees them, casts once at the end, and takes
    `names`, `out_dtype`, `rounding` and `nonfloat` besides.

    Args:
      fn: `fn(base, models, *, setting: type = default, ...)`. Types are `float` (a number, which
        may be traced), `Sequence[float]` (one per model; one number is for all), `int`, `bool`
        and `str`.
      scope: `"entry"` promises that entries of the result depend on the same entries alone, so
        that a stream may cut leaves.

    Returns:
      A factory of transforms; as a decorator with arguments, what makes it.

    Raises:
      TypeError: If the function has no such signature; when the factory is called, if a setting is
        unknown, missing or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> @jw.merge.method
      ... def largest_change(base, models, *, scale: float = 1.0):
      ...     deltas = jnp.stack(models) - base
      ...     chosen = jnp.argmax(jnp.abs(deltas), axis=0, keepdims=True)
      ...     return base + scale * jnp.take_along_axis(deltas, chosen, axis=0)[0]
      >>> base = {"w": jnp.zeros(3)}
      >>> models = [{"w": jnp.array([1.0, 0.0, -2.0])}, {"w": jnp.array([0.0, 3.0, 1.0])}]
      >>> jw.apply(largest_change(scale=0.5), base, models=models)["w"]
      Array([ 0.5,  1.5, -1. ], dtype=float32)
    """
    if fn is None:
        return functools.partial(method, scope=scope)
    check_choice("merge.method", "scope", scope, ("entry", "leaf"))
    known = _settings_of(fn)
    name = f"merge.{getattr(fn, '__name__', 'method')}"

    @functools.wraps(fn)
    def factory(**settings: Any) -> Transform:
        common = {key: settings.pop(key) for key in _COMMON if key in settings}
        numbers, choices = _checked(name, settings, known)
        output = Output.checked(
            name,
            common.get("out_dtype"),
            common.get("rounding", "nearest"),
            common.get("nonfloat", "base"),
        )

        def merge_leaf(job: LeafJob) -> Merged:
            dtype = compute_dtype(job.base)
            ready = {
                key: jnp.asarray(_per_model(name, key, value, known[key], len(job.models)), dtype)
                for key, value in numbers.items()
            }
            stack = job.stack if scope == "leaf" else ()
            merged = _merge_one(
                job.base,
                job.models,
                ready,
                job.key,
                fn=fn,
                choices=tuple(choices.items()),
                stack=stack,
                output=output,
                dtype=job.dtype,
            )
            return Merged(*merged)

        group = "leaf" if scope == "leaf" else None
        names = common.get("names")
        return per_leaf(name, merge_leaf, output=output, names=names, group=group, scope=scope)

    return factory


@functools.partial(jax.jit, static_argnames=("fn", "choices", "stack", "output", "dtype"))
def _merge_one(
    base: Any,
    models: list[Any],
    numbers: Mapping[str, jax.Array],
    key: jax.Array | None,
    *,
    fn: LeafMerge,
    choices: tuple[tuple[str, Any], ...],
    stack: tuple[int, ...],
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    wide = compute_dtype(base)
    arrays = [jnp.asarray(x).astype(wide) for x in (base, *models)]
    run = lambda base, models: fn(base, models, **numbers, **dict(choices))  # noqa: E731
    for axis in sorted(stack, reverse=True):
        run = jax.vmap(run, in_axes=axis, out_axes=axis)
    merged = jnp.asarray(run(arrays[0], arrays[1:]))
    if merged.shape != arrays[0].shape:
        raise TypeError(
            f"merge.{getattr(fn, '__name__', 'method')}: returned an array of shape "
            f"{merged.shape} for a leaf of shape {arrays[0].shape}. It must return one like base."
        )
    stored = output.store(merged.astype(wide), dtype, key)
    return stored, all_finite(stored, *arrays)


class _Setting(typing.NamedTuple):
    kind: type
    per_model: bool
    default: Any


def _settings_of(fn: LeafMerge) -> dict[str, _Setting]:
    """What the function takes by keyword, with types."""
    name = getattr(fn, "__name__", "method")
    hints = typing.get_type_hints(fn)
    positional, found, wrong = [], {}, []
    for key, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(key)
            continue
        kind = hints.get(key)
        many = typing.get_origin(kind) in (Sequence, list, tuple) and typing.get_args(kind)
        inner = typing.get_args(kind)[0] if many else kind
        if parameter.kind is not parameter.KEYWORD_ONLY or inner not in _KINDS:
            wrong.append(key)
        else:
            found[key] = _Setting(typing.cast(type, inner), bool(many), parameter.default)
    if len(positional) != 2 or wrong:
        bad = f"; {wrong} have no type that is known" if wrong else ""
        raise TypeError(
            f"merge.method: {name} takes {positional}{bad}. Write {name}(base, models, *, t: float "
            "= 0.5), with settings of type float, Sequence[float], int, bool or str behind the *."
        )
    taken = [key for key in found if key in _COMMON]
    if taken:
        raise TypeError(f"merge.method: {name}: {taken} are settings of every method. Rename them.")
    return found


def _checked(
    name: str, settings: Mapping[str, Any], known: Mapping[str, _Setting]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers, which may be traced, and other settings, after all were checked."""
    unknown = [key for key in settings if key not in known]
    if unknown:
        hint = f"The nearest: {nearest(unknown[0], [*known, *_COMMON])}."
        raise TypeError(f"{name}: unknown settings {unknown}. {hint}")
    values = {
        key: s.default for key, s in known.items() if s.default is not inspect.Parameter.empty
    }
    values |= settings
    missing = [key for key in known if key not in values]
    if missing:
        raise TypeError(f"{name}: {missing} must be given.")
    numbers, choices = {}, {}
    for key, value in values.items():
        setting = known[key]
        if not _fits(value, setting):
            wanted = _KINDS[setting.kind] + (", or one per model" if setting.per_model else "")
            raise TypeError(f"{name}: {key}={value!r} must be {wanted}.")
        (numbers if setting.kind is float else choices)[key] = value
    return numbers, choices


def _fits(value: Any, setting: _Setting) -> bool:
    if isinstance(value, Tracer | jax.Array | np.ndarray):
        return setting.kind is float and np.ndim(value) <= setting.per_model
    if setting.per_model and isinstance(value, list | tuple):
        return all(_fits(item, setting._replace(per_model=False)) for item in value)
    if setting.kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, setting.kind) and (setting.kind is bool or value is not True)


def _per_model(name: str, key: str, value: Any, setting: _Setting, count: int) -> Any:
    if not setting.per_model:
        return value
    if np.ndim(value) == 0:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {key} has {len(value)} entries for {count} models.")
    return value
