"""How represented weights print: in a line, arrays as dtype and shape."""

from __future__ import annotations

import dataclasses
from typing import Any

_TOLD_ELSEWHERE = ("dtype", "view", "full_group")


def show_weight(weight: Any) -> str:
    """A represented weight in one line, without its values.

    Args:
      weight: A dataclass of arrays and settings with a `shape` and a `dtype`. Arrays may be
        anything that a map over the tree puts in their place, such as shapes or shardings.

    Returns:
      The class, the dense shape and dtype, the settings, then the fields that hold arrays. Fields
      that are None are left out; axes are told where they are not the usual `(in, out)`.

    Example:
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> jw.apply(jw.quantize.round_to_nearest(bits=4, group_size=32), params)["kernel"]
      Quantized(64x32 float32, bits=4, group_size=32, codes=uint8[32,32], scale=float32[2,32])
    """
    settings, arrays = [], []
    for field in dataclasses.fields(weight):
        value = getattr(weight, field.name)
        if value is None or field.name in _TOLD_ELSEWHERE:
            continue
        part = f"{field.name}={_show(value)}"
        (settings if field.metadata.get("static") else arrays).append(part)
    group = _attribute(weight, "group_size")
    if group is not None and not any(part.startswith("group_size=") for part in settings):
        settings.append(f"group_size={group}")
    settings = [part for part in settings if not part.startswith("codes_per_byte=")]
    parts = [*_dense(weight), *_axes(weight), *settings, *arrays]
    return f"{type(weight).__name__}({', '.join(parts)})"


def show_array(value: Any) -> str:
    """Dtype and shape of an array, such as `float32[2,32]`."""
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _show(value: Any) -> str:
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return show_array(value) if is_array and not dataclasses.is_dataclass(value) else repr(value)


def _dense(weight: Any) -> list[str]:
    """Shape and dtype of the dense weight, where the fields still are arrays."""
    shape, dtype = _attribute(weight, "shape"), _attribute(weight, "dtype")
    if shape is None or dtype is None:
        return []
    return [f"{'x'.join(map(str, shape)) or 'scalar'} {dtype}"]


def _axes(weight: Any) -> list[str]:
    view = getattr(weight, "view", None)
    if view is None or getattr(view, "is_plain", True):
        return []
    return [f"inputs={view.axes.inputs}", f"outputs={view.axes.outputs}"]


def _attribute(weight: Any, name: str) -> Any:
    """An attribute computed from fields; None where these hold no arrays."""
    try:
        return getattr(weight, name, None)
    except Exception:  # printing must never fail, whatever a map put into the fields
        return None
