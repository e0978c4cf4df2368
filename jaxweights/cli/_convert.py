"""jaxweights convert: a checkpoint in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxweights.cli._bytes import byte_count

# As `recipes._write.Format` has them, which is imported only when there is something to write.
FORMATS = (
    "safetensors",
    "orbax",
    "gptq",
    "gptq_v2",
    "awq",
    "compressed-tensors",
    "bitsandbytes",
    "gguf",
)
SUMMARY = "write a checkpoint in another format"
DESCRIPTION = """\
Writes a checkpoint of any format that can be read (safetensors, GPTQ, AWQ, compressed-tensors,
bitsandbytes, FP8, GGUF, a result of `jaxweights run`) as safetensors under the names that other
tools read, as Orbax, or as a checkpoint that transformers, vLLM or llama.cpp load. Config and
tokenizer travel along.

Represented weights become dense in safetensors and stay as they are in Orbax, where only the
blocks of a GGUF file become dense, too. The quantized formats and GGUF hold the integers of
quantized weights as they are: nothing is rounded again, and weights that the format cannot hold are
refused with a list of them, as is a checkpoint without any, except for GGUF.

--bits rounds dense matrices inside the layers to the nearest on the way (symmetric, a scale for
each --group-size inputs); for GGUF these are Q4_0, Q5_0 or Q8_0 as llama.cpp rounds them. Methods
that look at data are for `jaxweights run`.

One tensor is in memory at a time, unless the source is a tree of parameters or the destination is
Orbax. Nothing appears at the destination before all of it is written."""
EXAMPLES = """\
examples:
  jaxweights convert model.gguf model --to safetensors
  jaxweights convert SmolLM2-135M model.gguf --to gguf --bits 4 --memory 2GB
  jaxweights convert runs/smollm2 small --to safetensors --dtype bfloat16
  jaxweights convert Qwen2.5-0.5B-Instruct-GPTQ-Int4 out --to compressed-tensors --target vllm"""

# How the words of the library's errors are said here.
WORDS = (
    (r"\bgroup_size=", "group_size is --group-size"),
    (r"\bpad='zero'", "pad='zero' is --pad"),
    (r"\bbits=", "bits is --bits"),
    (r"`partition`", "`jaxweights quantize --skip PATTERN` leaves weights as they are"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint: a file or a folder")
    parser.add_argument(
        "destination", metavar="DESTINATION", help="a folder to make, or a .gguf file"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "--target", choices=("vllm",), help="also demand what the kernels of this reader need"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast dense weights; without it they stay as they are",
    )
    parser.add_argument(
        "--bits", type=int, choices=range(2, 9), metavar="BITS", help="round to 2 to 8 bits"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="inputs that share a scale; without it, all"
    )
    parser.add_argument(
        "--pad", action="store_true", help="let the last group be shorter, where N does not divide"
    )
    parser.add_argument(
        "--memory", type=byte_count, metavar="BYTES", help="hold no more than this, such as 1GB"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder, at the end"
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.checkpoint import Provenance, open_checkpoint
    from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
    from jaxweights.cli._progress import show_progress
    from jaxweights.cli._tensors import resolve

    path, destination = resolve(Path(options.source)), Path(options.destination)
    single = options.to == "gguf" and destination.suffix == ".gguf"
    check_destination(
        "jaxweights convert", destination, overwrite=options.overwrite, directory=not single
    )
    refuse_unrelated("jaxweights convert", destination)
    source = open_checkpoint(path)
    lazily = source.is_torch and options.to != "orbax"
    _refuse_unused(options, lazily)
    fingerprint = source.fingerprint()
    settings = {"to": options.to, "dtype": options.dtype}
    if options.bits is not None:
        settings |= {"bits": options.bits, "group_size": options.group_size}
        settings |= {"pad": "zero"} if options.pad else {}
    provenance = Provenance.collect(recipe={"convert": settings}, source=fingerprint)
    with show_progress(options.quiet) as progress:
        convert = _by_tensor if lazily else _in_memory
        convert(source, destination, options, provenance, progress)
    result = {
        "source": str(path),
        "fingerprint": fingerprint,
        "destination": str(destination),
        "format": options.to,
        "files": [destination.name] if single else _names(destination),
    }
    return result, f"Written to {destination}: {', '.join(result['files'])}"


def _refuse_unused(options: argparse.Namespace, lazily: bool) -> None:
    if options.group_size is not None and options.bits is None:
        raise ValueError("--group-size belongs to --bits, which says how many bits to round to.")
    if options.pad and options.group_size is None:
        raise ValueError("--pad belongs to --group-size, which says how long the groups are.")
    if options.target is not None and options.to in ("safetensors", "orbax", "gguf"):
        raise ValueError(
            f"--target {options.target} is about GPTQ, AWQ and compressed-tensors, not "
            f"{options.to}. Leave it out, or choose another format."
        )
    given = [f"--{n}" for n in ("bits", "memory") if getattr(options, n) is not None]
    if given and not lazily:
        raise ValueError(
            f"{' and '.join(given)}: only for checkpoints that are read and written tensor by "
            "tensor, unlike trees of parameters and Orbax. Leave it out, or convert to "
            "safetensors first."
        )


def _by_tensor(
    source: Any, destination: Path, options: argparse.Namespace, provenance: Any, progress: Any
) -> None:
    from jaxweights.recipes._convert import Rounding, convert_checkpoint

    rounding = (
        None if options.bits is None else Rounding(options.bits, options.group_size, options.pad)
    )
    convert_checkpoint(
        source,
        destination,
        options.to,
        dtype=options.dtype,
        rounding=rounding,
        memory=options.memory,
        target=options.target,
        provenance=provenance,
        overwrite=options.overwrite,
        progress=progress,
    )


def _in_memory(
    source: Any, destination: Path, options: argparse.Namespace, provenance: Any, progress: Any
) -> None:
    from jaxweights.models import load_pretrained
    from jaxweights.recipes._write import write_checkpoint

    progress("Reading", 0, 1)
    # GGUF's blocks are read as numbers where integers are not asked for.
    dequantize = None if options.to in ("safetensors", "orbax") else False
    pretrained = load_pretrained(source.path, dtype=options.dtype, dequantize=dequantize)
    progress("Reading", 1, 1)
    progress("Writing", 0, 1)
    write_checkpoint(
        destination,
        options.to,
        pretrained,
        pretrained.params,
        provenance=provenance,
        overwrite=options.overwrite,
        target=options.target,
    )
    progress("Writing", 1, 1)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.iterdir())
