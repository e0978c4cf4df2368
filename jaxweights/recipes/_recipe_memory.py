"""What a recipe's `memory` says, and what does not go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxweights.recipes._bytes import parse_bytes
from jaxweights.recipes._check import Problems
from jaxweights.recipes._yaml import Located


def check_memory(
    root: Located, sections: dict[str, Any], steps: Sequence[Any], problems: Problems
) -> None:
    """Makes `memory` a number, and refuses beside it what needs the whole model."""
    given = sections.get("memory")
    if given is None:
        return
    found = parse_bytes(str(given))
    sections["memory"] = found
    if not found:
        problems.add(root.keys["memory"], f"memory: {given!r} is no size. Write such as 4GB.")
    evaluate, output = sections.get("evaluate"), sections.get("output")
    beside = {
        "evaluate": evaluate is not None
        and evaluate.retrieval
        and "`evaluate.retrieval` runs the whole model",
        "distill": sections.get("distill") and "`distill` trains the whole model",
        "models": sections.get("models") and "`models` are merged leaf by leaf (`stream: always`)",
        "stream": sections.get("stream", "auto") == "always"
        and "`stream` is for methods without statistics",
        "output": output is not None
        and "orbax" in output.formats
        and "the format orbax (native) stacks all layers",
    }
    for key, reason in beside.items():
        if reason:
            problems.add(
                root.keys.get(key, root.keys["memory"]),
                f"memory: holds one block of layers at a time, but {reason}. Remove one of them.",
            )
    for step in steps:
        if step.plain.scope == "tree":
            problems.add(
                step.line,
                f"{step.method} looks at all layers together, but `memory` holds one block of "
                "layers at a time. Remove `memory`, or choose a method that works within a layer, "
                "such as quantize.gptq, quantize.awq or quantize.smooth.",
            )
