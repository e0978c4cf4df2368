"""What every merge shares: models checked against the tree, weights checked, one cast."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._host import on_host, where_not_finite
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Path, fail, path_key
from jaxweights.core._stored import stored_as
from jaxweights.weights._weight import is_weight

Nonfloat = Literal["base", "first", "require_equal", "error"]
Rounding = Literal["nearest", "stochastic"]
Weights = Sequence[float] | jax.Array | np.ndarray | None

_NONFLOAT = ("base", "first", "require_equal", "error")
_ROUNDINGS = ("nearest", "stochastic")
_LISTED = 5  # missing or extra paths that one error shows


@dataclasses.dataclass(frozen=True)
class Output:
    """How a merge stores its result; hashable.

    Args:
      dtype: Dtype of floating leaves; None keeps that of the tree.
      rounding: `"nearest"`, or `"stochastic"`: up or down at random so that the mean is exact.
      nonfloat: Where leaves that are not real floating come from.
    """

    dtype: Any = None
    rounding: Rounding = "nearest"
    nonfloat: Nonfloat = "base"

    @classmethod
    def checked(
        cls, name: str, dtype: DTypeLike | None, rounding: Rounding, nonfloat: Nonfloat
    ) -> Output:
        """Builds it from a user's arguments."""
        check_choice(name, "rounding", rounding, _ROUNDINGS)
        check_choice(name, "nonfloat", nonfloat, _NONFLOAT)
        dtype = None if dtype is None else jnp.dtype(dtype)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{name}: out_dtype={dtype} is no floating dtype. Merged weights are fractions; "
                "pass float32 or bfloat16, and quantize afterwards."
            )
        return cls(dtype, rounding, nonfloat)

    def dtype_of(self, leaf: Any) -> Any:
        """Dtype in which the merged leaf is stored."""
        return jnp.dtype(leaf.dtype) if self.dtype is None else self.dtype

    def rounds_randomly(self, leaf: Any) -> bool:
        """Whether storing this leaf draws random numbers."""
        return self.rounding == "stochastic" and self.dtype_of(leaf) != compute_dtype(leaf)

    def store(self, value: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
        """The one cast."""
        if self.rounding == "nearest" or value.dtype == dtype:
            return stored_as(value, dtype)
        return round_stochastically(value, dtype, key)


def check_choice(name: str, argument: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a setting that is not one of those listed."""
    if value not in choices:
        raise ValueError(
            f"{name}: {argument}={value!r} is not one of {', '.join(map(repr, choices))}."
        )


def compute_dtype(leaf: Any) -> Any:
    """float64 for float64 leaves, float32 for all others."""
    return jnp.dtype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)


def round_stochastically(value: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
    """Rounds to one of the two nearest values of `dtype`, so that the expectation is `value`."""
    assert key is not None
    nearest = stored_as(value, dtype)
    error = value - nearest.astype(value.dtype)
    towards = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jax.lax.optimization_barrier(jnp.nextafter(nearest, towards))
    gap = jnp.abs(other.astype(value.dtype) - nearest.astype(value.dtype))
    chance = jnp.where(jnp.isfinite(gap), jnp.abs(error) / gap, 0)
    moves = jax.random.uniform(key, value.shape, value.dtype) < chance
    return jnp.where(moves, other, nearest)


def check_weights(name: str, weights: Weights, *, normalize: bool, absolute: bool = False) -> Any:
    """Checks weights that are numbers; arrays may be traced, and are taken as they come."""
    if weights is None or isinstance(weights, Tracer):
        return weights
    try:
        values = np.asarray(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: weights={weights!r} must be one number per model.") from error
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name}: weights={weights!r} must be one number per model.")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: weights={values.tolist()} must be finite.")
    # Relative to the weights, so that a user's choice of unit does not matter.
    total = np.abs(values).sum() if absolute else abs(values.sum())
    if normalize and total <= 1e-8 * np.abs(values).sum():
        raise ValueError(
            f"{name}: weights={values.tolist()} sum to {values.sum():g}, so they cannot be "
            "normalised. Change them, or pass normalize=False."
        )
    return values


def check_positive_weights(name: str, weights: Weights) -> Any:
    """As `check_weights`, for methods whose divisors are sums of weight times data."""
    values = check_weights(name, weights, normalize=True)
    if values is not None and not isinstance(values, Tracer) and (values < 0).any():
        raise ValueError(
            f"{name}: weights={values.tolist()} must not be negative: they multiply sums of "
            "squares, which are divided by."
        )
    return values


def per_model(name: str, argument: str, value: Any, count: int) -> Any:
    """One value per model, from one for all or from a sequence."""
    if value is None or np.ndim(value) == 0:
        return (value,) * count
    if len(value) != count:
        given = f"{count} model{'s were' if count != 1 else ' was'} given"
        raise ValueError(
            f"{name}: {argument} has {len(value)} entries, but {given}. Pass one per model, in "
            "the order of models."
        )
    return value


def label(names: Sequence[str] | None, i: int) -> str:
    """What errors call a model."""
    return f"models[{i}]" + (f" ({names[i]!r})" if names is not None else "")


def check_names(name: str, names: Sequence[str] | None) -> None:
    """Refuses names that would give two models the same random numbers."""
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{name}: names={list(names)} must differ, one per model.")


def model_key(key: jax.Array, path: Path, model: str) -> jax.Array:
    """Randomness of one leaf of one model, whatever else is merged."""
    return jax.random.fold_in(path_key(key, path), zlib.crc32(model.encode()))


def selected(flat: Flat, context: Context) -> Flat:
    """The leaves that may change."""
    only = context.only
    return flat if only is None else {path: leaf for path, leaf in flat.items() if path in only}


def require_models(
    name: str, flat: Flat, context: Context, names: Sequence[str] | None, *, delta: bool
) -> tuple[Flat, ...]:
    """The models, after every mismatch with the tree was reported at once.

    Args:
      name: What errors call the transform.
      flat: The tree.
      context: Holds the models.
      names: What the user calls them.
      delta: Whether the method takes differences to the tree.

    Returns:
      The models.
    """
    models = context.require("models", name)
    if not models:
        raise ValueError(f"{name}: models is empty. Pass at least one tree like params.")
    if names is not None:
        per_model(name, "names", names, len(models))
    problems: list[str] = []
    for i, model in enumerate(models):
        missing = [path for path in flat if path not in model]
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            problems.append(
                f"{label(names, i)} lacks {missing[:_LISTED]}{more}. Give it those leaves, or "
                "leave them out with `partition`."
            )
        problems += [
            problem
            for path, leaf in flat.items()
            if path in model and (problem := _mismatch(path, leaf, model[path], label(names, i)))
        ]
        if delta and _is_same(flat, model):
            problems.append(
                f"{label(names, i)} is the base itself, so its delta is zero. The base is the tree "
                "that is transformed; leave it out of models."
            )
    problems += [
        f"{path!r}: is a {type(leaf).__name__}, and merging needs dense weights. Merge before "
        "representing it, or merge jaxweights.materialize(params)."
        for path, leaf in flat.items()
        if is_weight(leaf)
    ]
    fail(name, problems)
    return models


def _mismatch(path: Path, leaf: Any, other: Any, model: str) -> str | None:
    if is_weight(other):
        return (
            f"{path!r}: is a {type(other).__name__} in {model}, and merging needs dense weights. "
            "Pass jaxweights.materialize(model)."
        )
    ours, theirs = np.shape(leaf), np.shape(other)
    if ours != theirs:
        remedy = "All models must share shapes; drop or resize this leaf before merging."
        if len(ours) == 2 and len(theirs) == 2 and ours[1] == theirs[1]:
            remedy += " Where only the vocabulary differs, resize the embedding to the base's rows."
        return f"{path!r}: is {theirs} in {model} but {ours} in the base. {remedy}"
    if is_float(leaf) != is_float(other):
        kinds = [getattr(x, "dtype", type(x).__name__) for x in (other, leaf)]
        return (
            f"{path!r}: is {kinds[0]} in {model} but {kinds[1]} in the base. Convert one of them "
            "before merging."
        )
    return None


def _is_same(flat: Flat, model: Flat) -> bool:
    paths = [path for path, leaf in flat.items() if is_float(leaf)]
    return bool(paths) and all(model.get(path) is flat[path] for path in paths)


LeafFn = Callable[[Path, Any, list[Any]], tuple[jax.Array, jax.Array]]


def merge_leaves(
    name: str,
    flat: Flat,
    models: tuple[Flat, ...],
    context: Context,
    output: Output,
    names: Sequence[str] | None,
    merge_leaf: LeafFn,
) -> Flat:
    """Merges leaf by leaf; all non-finite leaves are one error.

    Args:
      name: What errors call the transform.
      flat: The tree.
      models: The models.
      context: For progress.
      output: The policy for leaves that are not floating.
      names: What the user calls the models.
      merge_leaf: `(path, leaf, leaves of the models) -> (merged leaf, whether all is finite)`.

    Returns:
      The merged tree.
    """
    new, finite, unequal = dict(flat), {}, []
    floating = [path for path, leaf in flat.items() if is_float(leaf)]
    for path in [path for path in flat if path not in set(floating)]:
        new[path], problem = _nonfloat(path, flat[path], [m[path] for m in models], output)
        unequal += [problem] if problem else []
    fail(name, unequal)
    for done, path in enumerate(floating, start=1):
        leaf = flat[path]
        new[path], finite[path] = merge_leaf(path, leaf, [model[path] for model in models])
        if context.progress is not None:
            context.progress(path, done, len(floating))
    if not any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in finite.values()):
        bad = [path for path, good in finite.items() if not good]
        fail(name, [_nonfinite(path, flat, models, names) for path in bad])
    return new


def _nonfloat(path: Path, leaf: Any, others: list[Any], output: Output) -> tuple[Any, str | None]:
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    if output.nonfloat == "error":
        return leaf, f"{path!r}: is {dtype}, which has no mean. Leave it out with `partition`."
    if output.nonfloat == "first":
        return others[0], None
    if output.nonfloat == "base":
        return leaf, None
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in (leaf, *others)):
        return leaf, (
            f"{path!r}: nonfloat='require_equal' compares values, which are not there under jit. "
            "Merge outside of jit, or pass nonfloat='base'."
        )
    differing = [i for i, other in enumerate(others) if not _equal(leaf, other)]
    if not differing:
        return leaf, None
    return leaf, (
        f"{path!r}: is {dtype} and differs in {', '.join(f'models[{i}]' for i in differing)}. "
        "Pass nonfloat='base' to keep the base's, or nonfloat='first'."
    )


def _equal(first: Any, second: Any) -> bool:
    raw = lambda x: jax.random.key_data(x) if _is_key(x) else x  # noqa: E731
    if _is_key(first) != _is_key(second):
        return False
    return bool(np.array_equal(on_host(raw(first)), on_host(raw(second))))


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _nonfinite(
    path: Path, flat: Flat, models: tuple[Flat, ...], names: Sequence[str] | None
) -> str:
    sources = {"the base": flat, **{label(names, i): m for i, m in enumerate(models)}}
    found = []
    for source, tree in sources.items():
        bad = where_not_finite(tree[path])
        if len(bad):
            found.append(
                f"{len(bad)} of {tree[path].size} values of {source} are not finite, the first at "
                f"{bad[0].tolist()}"
            )
    if not found:
        return (
            f"{path!r}: the merged values overflow {jnp.result_type(flat[path])}. Pass "
            "out_dtype=float32, or smaller weights."
        )
    return (
        f"{path!r}: {'; '.join(found)}. Repair the checkpoint, or leave this weight out with "
        "`partition`."
    )


def all_finite(*values: jax.Array) -> jax.Array:
    """Whether no value is NaN or infinite, by one reduction each."""
    checks = [jnp.isfinite(jnp.max(jnp.abs(x.astype(jnp.float32)))) for x in values if x.size]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)
