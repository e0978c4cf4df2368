"""The manifest of a saved tree: its structure, so that no target tree is needed to load it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import urllib.parse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.checkpoint._saved import (
    SAVED_DTYPES,
    decode_setting,
    encode_setting,
    field_names,
    fields_that_may_lack,
    make,
    name_of,
    registered_class,
    unfit,
)

Parts = tuple[str, ...]  # a place in the tree: keys, indices and field names as text
_SUB_BYTE = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}  # their bits
_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """What the manifest says of one array.

    Args:
      parts: Where it is in the tree.
      dtype: Its dtype; of a random key, that of its data.
      shape: Its shape.
      host: Whether it is a NumPy array.
      checksum: `xxh3:` and the xxh3 hash of its values, None where no single process had them all.
    """

    parts: Parts
    dtype: np.dtype
    shape: tuple[int, ...]
    host: bool
    checksum: str | None

    @property
    def path(self) -> str:
        """Its path in messages."""
        return "/".join(self.parts)


def encode_tree(tree: Any) -> tuple[dict[str, Any], dict[Parts, Any]]:
    """Describes a tree as JSON and lists its arrays.

    Args:
      tree: Dicts, lists, tuples, None, registered objects, arrays, Python scalars, random keys.

    Returns:
      The description, and the arrays by place.

    Raises:
      TypeError: If it holds anything else, naming all such places.
    """
    arrays: dict[Parts, Any] = {}
    problems: list[str] = []
    node = _encode(tree, (), arrays, problems)
    if problems:
        raise TypeError(
            f"save_tree: {'; '.join(problems)}. A saved tree is made of dicts, lists, tuples, "
            "arrays, numbers, text and registered classes; convert other containers (for flax: "
            "flax.core.unfreeze, nnx.to_pure_dict) or register the class with register_saved."
        )
    return node, arrays


def _encode(value: Any, parts: Parts, arrays: dict[Parts, Any], problems: list[str]) -> Any:
    def inner(part: Any, item: Any) -> Any:
        return _encode(item, (*parts, str(part)), arrays, problems)

    kind = type(value)
    if value is None:
        return {"kind": "none"}
    if kind.__name__ in _SCALARS and kind in _SCALARS.values():
        text = value.hex() if kind is float else value
        return {"kind": "scalar", "type": kind.__name__, "value": text}
    if kind is dict:
        wrong = [key for key in value if type(key) not in (str, int)]
        if wrong or len({str(key) for key in value}) < len(value):
            problems.append(f"'{'/'.join(parts)}' has keys that are not distinct text or integers")
        return {"kind": "dict", "items": [[key, inner(key, value[key])] for key in value]}
    if kind in (list, tuple):
        return {"kind": kind.__name__, "items": [inner(i, item) for i, item in enumerate(value)]}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _encode_array(value, parts, arrays, problems)
    name = name_of(value)
    if name is None:
        problems.append(f"'{'/'.join(parts)}' is a {kind.__module__}.{kind.__qualname__}")
        return None
    children, settings = field_names(kind)
    node = {
        "kind": "object",
        "class": name,
        "fields": {field: inner(field, getattr(value, field)) for field in children},
        "static": {},
    }
    for field in settings:
        try:
            node["static"][field] = encode_setting(getattr(value, field))
        except TypeError as error:
            problems.append(f"'{'/'.join((*parts, field))}': {error}")
    if wrong := _unfit(kind, {field: getattr(value, field) for field in settings}):
        problems.append(f"'{'/'.join(parts)}': {wrong}")
    if hasattr(value, "materialize"):
        # What the object stands for; a changed setting then shows when it is loaded.
        node["dense"] = {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
    return node


def array_node(
    shape: tuple[int, ...], dtype: np.dtype, *, host: bool, checksum: str | None
) -> dict[str, Any]:
    """The description of an array."""
    return {
        "kind": "array",
        "dtype": dtype.name,
        "shape": list(shape),
        "host": host,
        "checksum": checksum,
    }


def _encode_array(value: Any, parts: Parts, arrays: dict[Parts, Any], problems: list[str]) -> Any:
    if isinstance(value, Tracer):
        problems.append(f"'{'/'.join(parts)}' is traced; save outside of jit")
        return None
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _encode_array(jax.random.key_data(value), parts, arrays, problems)
        return {"kind": "key", "impl": str(jax.random.key_impl(value)), "data": data}
    if np.dtype(value.dtype).name not in SAVED_DTYPES:
        problems.append(f"'{'/'.join(parts)}' has dtype {value.dtype}")
        return None
    host = not isinstance(value, jax.Array)
    arrays[parts] = np.asarray(value) if host else value
    return array_node(
        value.shape, np.dtype(value.dtype), host=host, checksum=checksum_of(arrays[parts])
    )


def checksum_of(array: Any) -> str | None:
    """Checksum of an array's values; None if other processes hold some of them.

    TensorStore notices a damaged file only where its structure breaks, so values are summed up.
    """
    import xxhash

    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    data = np.ascontiguousarray(array).reshape(-1)
    raw = data.view(np.uint8)
    if data.dtype.name in _SUB_BYTE:  # what fills the rest of the byte has no meaning
        raw = raw & np.uint8((1 << _SUB_BYTE[data.dtype.name]) - 1)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(raw.data)}"


def digest_of(node: dict[str, Any]) -> str:
    """Hash of a description, which shows that it was edited."""
    text = json.dumps(node, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def array_records(node: Any) -> tuple[list[ArrayRecord], list[str]]:
    """Checks a description completely and lists the arrays that it speaks of.

    Args:
      node: The description, from an untrusted file.

    Returns:
      The arrays in tree order, and what is wrong, one text a place.
    """
    records: list[ArrayRecord] = []
    problems: list[str] = []
    _check(node, (), records, problems)
    return records, problems


_KEYS = {
    "none": set(),
    "scalar": {"type", "value"},
    "dict": {"items"},
    "list": {"items"},
    "tuple": {"items"},
    "array": {"dtype", "shape", "host", "checksum"},
    "key": {"impl", "data"},
    "object": {"class", "fields", "static"},
}


def _check(node: Any, parts: Parts, records: list[ArrayRecord], problems: list[str]) -> None:
    kind = node.get("kind") if isinstance(node, dict) else None
    keys = _KEYS.get(kind) if isinstance(kind, str) else None
    if keys is None:
        problems.append(f"'{'/'.join(parts)}' has the unknown kind {kind!r:.80}")
        return
    if node.keys() - {"kind", "dense"} != keys or ("dense" in node and kind != "object"):
        problems.append(f"'{'/'.join(parts)}' is a {kind} with {sorted(node.keys() - {'kind'})}")
        return
    try:
        for part, item in _children(node):
            _check(item, (*parts, part), records, problems)
        if kind == "array":
            records.append(_checked_record(node, parts))
        elif kind == "key":
            if node["data"].get("kind") != "array":
                raise ValueError("is a key without data")
            records.append(_checked_record(node["data"], parts))
        elif kind == "scalar":
            _scalar(node)
        elif kind == "object":
            _check_object(node)
    except (ValueError, TypeError, AttributeError) as error:
        problems.append(f"'{'/'.join(parts)}' {error}")


def _children(node: dict[str, Any]) -> list[tuple[str, Any]]:
    if node["kind"] == "dict":
        keys = [key for key, _ in node["items"]]
        if any(type(key) not in (str, int) for key in keys) or len({*map(str, keys)}) < len(keys):
            raise ValueError("has keys that are not distinct text or integers")
        return [(str(key), item) for key, item in node["items"]]
    if node["kind"] in ("list", "tuple"):
        return [(str(i), item) for i, item in enumerate(node["items"])]
    return list(node["fields"].items()) if node["kind"] == "object" else []


def _check_object(node: dict[str, Any]) -> None:
    cls = registered_class(node["class"])
    for given, wanted in zip((node["fields"], node["static"]), field_names(cls), strict=True):
        missing = [n for n in wanted if n not in given and n not in fields_that_may_lack(cls)]
        unknown = [name for name in given if name not in wanted]
        if missing or unknown:
            raise ValueError(
                f"is a {cls.__name__} with fields missing: {missing}, unknown: {unknown}; it was "
                "saved by another version or changed"
            )
    settings = {}
    for name, setting in node["static"].items():
        try:
            settings[name] = decode_setting(setting)
        except ValueError as error:
            raise ValueError(f"has the field {name!r}: {error}") from None
    if problems := _unfit(cls, settings):
        raise ValueError(f"has fields that {cls.__name__} does not allow: {problems}")


def _unfit(cls: type, settings: dict[str, Any]) -> str:
    return "; ".join(unfit(cls, settings)) if settings else ""


def _checked_record(node: dict[str, Any], parts: Parts) -> ArrayRecord:
    dtype, shape, host, checksum = (node[k] for k in ("dtype", "shape", "host", "checksum"))
    if dtype not in SAVED_DTYPES:
        raise ValueError(f"has the unknown dtype {dtype!r:.80}")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"has shape {shape!r:.80}, which is not a list of natural numbers")
    if math.prod(max(n, 1) for n in shape) * 16 >= 2**63 or len(shape) > 32:
        raise ValueError(f"has shape {shape!r:.80}, which is larger than any memory")
    if not isinstance(host, bool):
        raise ValueError(f"has host={host!r:.80}, which is not true or false")
    if not isinstance(checksum, str | None):
        raise ValueError(f"has checksum={checksum!r:.80}, which is not text")
    # JAX would silently narrow it.
    if not host and jax.dtypes.canonicalize_dtype(SAVED_DTYPES[dtype]) != SAVED_DTYPES[dtype]:
        raise ValueError(f"is {dtype}, which JAX holds only with jax_enable_x64")
    return ArrayRecord(parts, SAVED_DTYPES[dtype], tuple(shape), host, checksum)


def _scalar(node: dict[str, Any]) -> Any:
    kind, value = node["type"], node["value"]
    if kind == "float" and isinstance(value, str):
        return float.fromhex(value)
    if kind not in _SCALARS or kind == "float" or type(value) is not _SCALARS[kind]:
        raise ValueError(f"is the scalar {value!r:.80}, which is no {kind!r:.80}")
    return value


def build_tree(node: dict[str, Any], arrays: dict[Parts, Any], parts: Parts = ()) -> Any:
    """Makes the tree that a checked description speaks of.

    Args:
      node: The description, which `array_records` found nothing wrong with.
      arrays: Its arrays by place.
      parts: Where the description is in the whole tree.

    Returns:
      The tree.

    Raises:
      ValueError: If a class refuses its fields, or an object is not what it was.
    """
    kind = node["kind"]
    if kind == "none":
        return None
    if kind == "scalar":
        return _scalar(node)
    if kind == "array":
        return arrays[parts]
    if kind == "key":
        return _key(arrays[parts], node["impl"])
    inner = [build_tree(item, arrays, (*parts, part)) for part, item in _children(node)]
    if kind == "dict":
        return dict(zip([key for key, _ in node["items"]], inner, strict=True))
    if kind in ("list", "tuple"):
        return inner if kind == "list" else tuple(inner)
    settings = {name: decode_setting(setting) for name, setting in node["static"].items()}
    try:
        value = make(
            registered_class(node["class"]),
            dict(zip(node["fields"], inner, strict=True)) | settings,
        )
        _compare_dense(node, value)
    except ValueError as error:
        raise ValueError(f"'{'/'.join(parts)}': {error}") from None
    return value


def _key(data: Any, impl: str) -> Any:
    def wrap(data: Any) -> jax.Array:
        return jax.random.wrap_key_data(data, impl=impl)

    return jax.eval_shape(wrap, data) if isinstance(data, jax.ShapeDtypeStruct) else wrap(data)


def _compare_dense(node: dict[str, Any], value: Any) -> None:
    if not hasattr(value, "materialize"):
        return
    saved = node.get("dense")
    try:
        now = {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
    except Exception as error:  # whatever a class says whose arrays do not fit together
        now = f"nothing ({error})"
    if saved != now:
        raise ValueError(
            f"the {node['class']} stood for {saved} when it was saved, but now for {now}; its "
            "fields were changed"
        )


def object_at(node: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The description of one place of the tree."""
    for part in parts:
        node = dict(_children(node))[part]
    return node


def leaf_parts(node: dict[str, Any], parts: Parts = ()) -> list[Parts]:
    """Places of the tree's leaves: arrays, and objects that stand for one."""
    if node["kind"] == "array" or "dense" in node:
        return [parts]
    return [leaf for part, item in _children(node) for leaf in leaf_parts(item, (*parts, part))]


def with_leaves(
    node: dict[str, Any], leaves: dict[Parts, dict[str, Any]], parts: Parts = ()
) -> dict[str, Any]:
    """A description in which the leaves' own descriptions stand in place of what they were."""
    if parts in leaves:
        return leaves[parts]
    inner = [(part, with_leaves(item, leaves, (*parts, part))) for part, item in _children(node)]
    if node["kind"] == "dict":
        keys = [key for key, _ in node["items"]]
        return node | {"items": [[key, item] for key, (_, item) in zip(keys, inner, strict=True)]}
    if node["kind"] == "object":
        return node | {"fields": dict(inner)}
    return node | {"items": [item for _, item in inner]} if inner else node


def storage_name(part: str) -> str:
    """A part of a place as Orbax may hold it: it joins parts with dots and slashes."""
    return urllib.parse.quote(part, safe="").replace(".", "%2E") or "%"
