"""Strict JSON: what the headers, indices and manifests of checkpoints are read with."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000  # the largest header that the safetensors format allows


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses untrusted JSON, refusing what Python's parser lets pass.

    Args:
      data: UTF-8 text.
      where: Start of every error message, `<function>: <path>`.

    Returns:
      Plain dicts, lists, strings, numbers, booleans and None.

    Raises:
      ValueError: If the text is not UTF-8 or JSON, repeats a key, holds NaN or infinity, is
        nested too deeply, or has strings that are no valid text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise _Refused(f"the key {key!r} appears more than once")
        return out

    def constant(name: str) -> Any:
        raise _Refused(f"{name} is not JSON")

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        # Escapes such as "\ud800" pass the parser but can never be written or printed again.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Refused as error:
        raise ValueError(f"{where}: {error}. The file is damaged or was made to mislead.") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply. The file is damaged.") from None
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where}: not valid UTF-8 JSON ({error}). The file is damaged.") from None
    return value


def read_json_object(path: Path, *, where: str) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Args:
      path: File to read.
      where: Start of every error message.

    Returns:
      The object.

    Raises:
      ValueError: If the file is too large, is not strict JSON or holds something else.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{where}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read.")
    value = parse_json(path.read_bytes(), where=where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds {_kind(value)}; a JSON object was expected.")
    return value


def dump_json(value: Any) -> str:
    """JSON text as it is written into checkpoints: readable, stable, ending in a line break."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sayable(value: Any) -> Any:
    """The value with null for every infinite float and NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: sayable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [sayable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Refused(Exception):
    """Raised inside the parser's hooks; never leaves `parse_json`."""


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number")
