"""Where a checkpoint comes from: recipe, versions, source and errors, as strictly checked JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

from jaxweights.checkpoint._json import dump_json, parse_json

_PACKAGES = ("jaxweights", "jax", "jaxlib", "numpy", "ml_dtypes")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a checkpoint came about.

    Args:
      recipe: The recipe that was run, as plain JSON values.
      versions: Versions by name of program.
      source: Fingerprint of the checkpoint that was read (`Checkpoint.fingerprint`), if any.
      errors: Numbers by name, by path of the leaf they are about, such as
        `{"layers/mlp/kernel": {"relative_error": 0.01}}`.
      timestamp: When, as an ISO 8601 text; None keeps results equal to the byte.

    Raises:
      ValueError: If a field holds what JSON cannot, all such fields in one message.

    Example:
      >>> made = Provenance(recipe={"chain": ["wanda"]}, versions={"jax": "0.10.2"})
      >>> Provenance.from_json(made.to_json()) == made
      True
    """

    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    source: str | None = None
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    timestamp: str | None = None

    def __post_init__(self) -> None:
        """Refuses what could not be written."""
        problems = _problems(dataclasses.asdict(self))
        if problems:
            raise ValueError(f"Provenance: {'; '.join(problems)}.")

    @classmethod
    def collect(
        cls,
        *,
        recipe: Mapping[str, Any],
        source: str | None = None,
        errors: Mapping[str, Mapping[str, float]] | None = None,
        timestamp: str | None = None,
    ) -> Provenance:
        """Makes a provenance with the versions of the programs that are running.

        Args:
          recipe: The recipe that was run.
          source: Fingerprint of what was read.
          errors: Numbers by name, by path.
          timestamp: When, as an ISO 8601 text.

        Returns:
          The provenance.
        """
        plain_errors = {
            path: {name: float(value) for name, value in numbers.items()}
            for path, numbers in (errors or {}).items()
        }
        return cls(dict(recipe), library_versions(), source, plain_errors, timestamp)

    def to_json(self) -> str:
        """Its text, as it is written into checkpoints."""
        return dump_json({"format": _FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "Provenance") -> Provenance:
        """Reads what `to_json` wrote.

        Args:
          text: The JSON.
          where: Start of the error messages.

        Returns:
          The provenance.

        Raises:
          ValueError: If it is not exactly that, all wrong fields in one message.
        """
        value = parse_json(text.encode() if isinstance(text, str) else text, where=where)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict):
            raise ValueError(f"{where}: must be a JSON object.")
        if value.get("format") != _FORMAT:
            raise ValueError(
                f"{where}: has format {value.get('format')!r}; this library reads {_FORMAT}. It "
                "was written by another version or is damaged."
            )
        fields = {name: value[name] for name in value if name != "format"}
        problems = [f"{name!r} is missing" for name in names if name not in fields]
        problems += [f"{name!r} is unknown" for name in fields if name not in names]
        problems += _problems(fields)
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}.")
        return cls(**fields)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide about results."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            import jaxweights  # used from its source folder, without being installed

            if package == "jaxweights":
                versions[package] = getattr(jaxweights, "__version__", "unknown")
    return versions


def _problems(fields: dict[str, Any]) -> list[str]:
    """What is wrong with the fields that are there."""
    problems = []
    for name in ("recipe", "versions", "errors"):
        if not isinstance(fields.get(name, {}), dict):
            problems.append(f"{name!r} is {type(fields[name]).__name__}, not an object")
        else:
            problems += _not_json(fields.get(name, {}), name)
    for name in ("source", "timestamp"):
        if not isinstance(fields.get(name), str | None):
            problems.append(f"{name!r} is {fields[name]!r:.80}, not text")
    if problems:
        return problems
    for program, version in fields.get("versions", {}).items():
        if not isinstance(version, str):
            problems.append(f"'versions/{program}' is {version!r:.80}, not text")
    for path, numbers in fields.get("errors", {}).items():
        if not isinstance(numbers, dict) or any(
            type(number) not in (int, float) for number in numbers.values()
        ):
            problems.append(f"'errors/{path}' is {numbers!r:.80}, not numbers by name")
    return problems


def _not_json(value: Any, path: str) -> list[str]:
    """Places below `path` whose values JSON would lose or change."""
    if value is None or isinstance(value, str | bool | int):
        return []
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"'{path}' is {value}, which JSON cannot hold"]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in _not_json(item, f"{path}/{i}")]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return [p for key, item in value.items() for p in _not_json(item, f"{path}/{key}")]
    return [f"'{path}' is {type(value).__name__}, which JSON cannot hold"]
