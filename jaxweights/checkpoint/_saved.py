"""The closed list of classes that a checkpoint may name, and their settings as JSON."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np

C = TypeVar("C", bound=type[Any])

_NUMPY_NAMES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 complex64 complex128"
)
_ML_NAMES = (
    "bfloat16 int2 uint2 int4 uint4 float4_e2m1fn float8_e3m4 "
    "float8_e4m3 float8_e4m3fn float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu"
)
SAVED_DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NUMPY_NAMES.split()} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_NAMES.split()
}

_registered: dict[str, type] = {}


def register_saved(cls: C) -> C:
    """Lets `save_tree` and `load_tree` keep objects of a class; usable as a decorator.

    Files name classes, but never decide what is imported: only registered names are looked up.

    Args:
      cls: A dataclass, whose fields with `metadata={"static": True}` are settings and whose other
        fields are parts of the tree, or a `NamedTuple`.

    Returns:
      The class.

    Raises:
      TypeError: If it is neither.
      ValueError: If another class has its name.

    Example:
      >>> from typing import NamedTuple
      >>> @register_saved
      ... class CountState(NamedTuple):
      ...     count: int
    """
    if not _has_fields(cls):
        raise TypeError(f"register_saved: {cls!r} is neither a dataclass nor a NamedTuple.")
    known = _registered.get(cls.__name__)
    # A module that is loaded again brings a new class of the same origin.
    if known is not None and _origin(known) != _origin(cls):
        raise ValueError(
            f"register_saved: the name {cls.__name__!r} of {cls!r} is taken by {known!r}. Rename "
            "one of them; files refer to classes by this name."
        )
    _registered[cls.__name__] = cls
    return cls


def saved_classes() -> dict[str, type]:
    """Classes that files may name, by name."""
    import jaxweights.weights
    from jaxweights.core._layout import Layout
    from jaxweights.core._stats import Stats

    own = [c for c in vars(jaxweights.weights).values() if isinstance(c, type)]
    for cls in (*own, *_subclasses(jaxweights.weights.Weight), Layout, Stats):
        if dataclasses.is_dataclass(cls):
            register_saved(cls)
    return _registered


def _subclasses(cls: type) -> list[type]:
    """The package's own subclasses of a class, loaded so far."""
    direct = [c for c in cls.__subclasses__() if c.__module__.startswith("jaxweights.")]
    return direct + [deeper for c in direct for deeper in _subclasses(c)]


def name_of(value: Any) -> str | None:
    """Name under which the class of `value` is registered, or None."""
    cls = type(value)
    if _registered.get(cls.__name__) is cls:
        return cls.__name__
    return cls.__name__ if saved_classes().get(cls.__name__) is cls else None


def field_names(cls: type) -> tuple[list[str], list[str]]:
    """Names of a registered class's parts and of its settings."""
    if is_namedtuple(cls):
        return list(cls._fields), []  # type: ignore[attr-defined]
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    return [f.name for f in fields if f.name not in static], static


def fields_that_may_lack(cls: type) -> set[str]:
    """Names of the parts that are None, and of the settings that are False or 0, by default.

    Classes gain such fields between versions.
    """
    if is_namedtuple(cls):
        return set()

    def may_lack(field: Any) -> bool:
        if not field.metadata.get("static"):
            return field.default is None
        return isinstance(field.default, int) and not field.default  # False or 0

    return {field.name for field in dataclasses.fields(cls) if may_lack(field)}


def is_namedtuple(cls: type) -> bool:
    """Whether a class was made by `NamedTuple`."""
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def encode_setting(value: Any) -> Any:
    """Writes a static field as JSON from which `decode_setting` makes an equal value.

    Args:
      value: None, a boolean, number, text, dtype, tuple, list, dict with text keys, or an object
        of a registered dataclass of those.

    Returns:
      JSON values; what JSON has no word for is an object with one key that starts with `$`.

    Raises:
      TypeError: If it is something else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, np.dtype) and value.name in SAVED_DTYPES:
        return {"$dtype": value.name}
    if isinstance(value, type(jnp.float32)) and jnp.dtype(value).name in SAVED_DTYPES:
        return {"$jax_dtype": jnp.dtype(value).name}
    if isinstance(value, type) and _is_scalar_type(value):
        return {"$numpy_dtype": np.dtype(value).name}
    if type(value) is tuple:
        return {"$tuple": [encode_setting(item) for item in value]}
    if type(value) is frozenset:
        return {"$frozenset": [encode_setting(item) for item in sorted(value)]}
    if type(value) is list:
        return [encode_setting(item) for item in value]
    if type(value) is dict and all(type(k) is str and k[:1] != "$" for k in value):
        return {k: encode_setting(item) for k, item in value.items()}
    name = name_of(value)
    if name is not None and dataclasses.is_dataclass(value):
        fields = {f.name: encode_setting(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$object": {"class": name, "fields": fields}}
    raise TypeError(f"{value!r:.80} of type {type(value).__name__} cannot be saved as a setting")


def decode_setting(value: Any) -> Any:
    """Makes the value that `encode_setting` wrote.

    Args:
      value: JSON values.

    Returns:
      The setting.

    Raises:
      ValueError: If it is not what `encode_setting` writes.
    """
    if isinstance(value, list):
        return [decode_setting(item) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key[:1] == "$"]
    if not tags:
        return {key: decode_setting(item) for key, item in value.items()}
    if len(value) != 1 or tags[0] not in _DECODERS:
        raise ValueError(f"{value!r:.80} is no setting")
    try:
        return _DECODERS[tags[0]](value[tags[0]])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{value!r:.80} is no setting ({error})") from None


def make(cls: type, fields: dict[str, Any]) -> Any:
    """Builds an object of a registered class, naming the class where it refuses its fields."""
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{cls.__name__} refuses its fields: {error}") from None


def registered_class(name: Any) -> type:
    """The class that a file names.

    Args:
      name: What the file says.

    Returns:
      The registered class of that name.

    Raises:
      ValueError: If none has it.
    """
    classes = saved_classes()
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"names the class {name!r}, which is not one of {', '.join(sorted(classes))}; import "
            "the module that defines it and registers it with register_saved"
        )
    return classes[name]


def unfit(cls: type, settings: dict[str, Any]) -> list[str]:
    """Settings that are not of the type that their class declares, in words.

    Checked on both sides: what is saved can be loaded, and a changed file cannot smuggle text in
    where a number is meant.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # of a class that is defined inside a function
        return []
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    return [
        f"{name!r} is {value!r:.80}, not {getattr(hints[name], '__name__', hints[name])}"
        for name, value in settings.items()
        if value is not defaults[name] and not _fits(value, hints[name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int  # a bool is no number here
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _decode_object(value: Any) -> Any:
    if value.keys() != {"class", "fields"}:
        raise ValueError(f"{value!r:.80} must have class and fields")
    cls = registered_class(value["class"])
    names = {f.name for f in dataclasses.fields(cls)}
    if value["fields"].keys() != names:
        raise ValueError(
            f"{cls.__name__} has the fields {sorted(names)}, not {list(value['fields'])}"
        )
    fields = {k: decode_setting(v) for k, v in value["fields"].items()}
    if problems := unfit(cls, fields):
        raise ValueError(f"{cls.__name__} refuses its fields: {'; '.join(problems)}")
    return make(cls, fields)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": lambda v: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[v],
    "$dtype": lambda v: SAVED_DTYPES[v],
    "$jax_dtype": lambda v: getattr(jnp, "bool_" if v == "bool" else SAVED_DTYPES[v].name),
    "$numpy_dtype": lambda v: SAVED_DTYPES[v].type,
    "$tuple": lambda v: tuple(decode_setting(item) for item in v),
    "$frozenset": lambda v: frozenset(decode_setting(item) for item in v),
    "$object": _decode_object,
}


def _has_fields(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls) or is_namedtuple(cls)


def _is_scalar_type(value: type) -> bool:
    return any(dtype.type is value for dtype in SAVED_DTYPES.values())


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
