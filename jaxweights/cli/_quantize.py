"""jaxweights quantize: a model in fewer bits, by one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from jaxweights.cli._merge import _windows as windows

# As `recipes._write.Format` has them, `orbax` under the name that says what it is for.
FORMATS = (
    "compressed-tensors",
    "gptq",
    "gptq_v2",
    "awq",
    "bitsandbytes",
    "gguf",
    "safetensors",
    "native",
)
SUMMARY = "quantize a model by a method, with data where it needs some"
DESCRIPTION = """\
Quantizes the matrices inside the layers of a model and writes what vLLM, transformers, llama.cpp
or jaxweights load, with config and tokenizer, a report and the recipe that did it. Embeddings and
heads stay floats.

Without settings: 4 bits, 128 inputs share a scale (8 bits: all inputs of an output), 128 sequences
of 512 tokens to calibrate on, compressed-tensors. Codes of compressed-tensors and gptq have no zero
points, as most readers expect; --set grid=affine gives them.

--method takes every method of the library that makes a model smaller, and the names rtn,
smoothquant, autoround, fp8_block, mxfp4, mxfp6, mxfp8, nvfp4_w4a4, mxfp4_w4a4, mxfp8_w8a8.
`smooth+gptq` is one after the other, `refine:gptq` one around another; smoothquant, or smooth
alone, goes on to 8-bit weights and inputs (`int8_dynamic`). `fp8_dynamic` rounds both to 8-bit
floats, nvfp4_w4a4 and the like to floats in small blocks, and `gptq+fp8_dynamic` is 4-bit weights
and 8-bit inputs.
--list shows all with their settings; --bits, --group-size, --pad and --act-order are settings that
most of them have, --set gives any other.

The command writes a recipe and runs it. --print-config shows it, for `jaxweights run` to go on
from; --explain shows what would become of which weight. What does not fit together is refused
before anything is computed.

--memory 4GB holds one block of layers at a time: for models that do not fit. Each block is
calibrated on what the quantized blocks before it give (--again never: on what the original ones
give). What the blocks pass on lies in files beside OUT; a killed run is gone on with by --resume.
--evaluate measures a language model so, too, before and after.

Nothing appears at the destination before all of it is written."""
EXAMPLES = """\
examples:
  jaxweights quantize SmolLM2-135M out --method gptq --group-size 64 --calibration prose.txt
  jaxweights quantize Llama-3.2-1B out --method awq --format awq --calibration prose.txt
  jaxweights quantize Llama-3.2-1B out --method smoothquant --set alpha=0.8 --calibration prose.txt
  jaxweights quantize model out --method rtn --bits 8 --format gguf --evaluate moby-dick
  jaxweights quantize Llama-3.1-8B out --method fp8_dynamic --memory 8GB --evaluate moby-dick
  jaxweights quantize Mistral-7B out --method gptq --calibration prose.txt --memory 8GB
  jaxweights quantize model out --method refine:gptq --calibration prose.txt --print-config
  jaxweights quantize --list"""

# How the words of the library's errors are said here.
WORDS = (
    (r"\bgroup_size=", "group_size is --group-size"),
    (r"\bpad='zero'", "pad='zero' is --pad"),
    (r"\bbits=", "bits is --bits"),
    (r"\bwindows of\b", "windows and their length are --windows"),
    (r"\bsequences of\b", "sequences and their length are --samples and --length"),
    (r"`partition`", "what stays as it is is --skip PATTERN"),
    (r"`again: each_step`", "it is --again each_step"),
    (r"`again: each_block`", "it is --again each_block"),
    (r"\bmemory\b.*(Give|Remove)|`memory`", "memory is --memory, a batch --batch"),
)

_NAME = "quantize.yaml"  # of the recipe, in errors and in what is written
# What models that are not quantized store: floats, and such integers as position ids.
_PLAIN = {"float32", "float16", "bfloat16", "float64", "F32", "F16", "BF16", "F64"}
_PLAIN |= {"int64", "int32", "bool"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="a checkpoint, or a known package's name"
    )
    parser.add_argument("destination", metavar="OUT", nargs="?", help="the folder to make")
    parser.add_argument("--list", action="store_true", help="list the methods, and stop")
    parser.add_argument("--method", metavar="NAME", help="how, such as gptq")
    parser.add_argument("--bits", type=int, metavar="BITS", help="bits of a code")
    parser.add_argument(
        "--group-size", type=_group_size, metavar="N", help="inputs that share a scale; -1 for all"
    )
    parser.add_argument(
        "--pad", action="store_true", help="let the last group be shorter, where N does not divide"
    )
    parser.add_argument("--act-order", action="store_true", help="round large inputs' rows first")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="another setting of the method",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="leave weights as they are"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="compressed-tensors", help="what is written"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--calibration", metavar="TEXT", help="a text file, brown, moby-dick or pydoc-topics"
    )
    data.add_argument("--samples", type=int, metavar="N", help="sequences to read; 128")
    data.add_argument("--length", type=int, metavar="TOKENS", help="of a sequence; 512")
    data.add_argument("--batch", type=int, metavar="N", help="sequences at a time; 8")
    data.add_argument(
        "--again",
        choices=("never", "each_step", "each_block"),
        help="calibrate anew before each step, or each block of layers",
    )
    data.add_argument(
        "--distill",
        type=int,
        metavar="STEPS",
        help="train codes and scales on it afterwards, towards the original's outputs",
    )
    data.add_argument("--evaluate", metavar="TEXT", help="measure before and after with this text")
    data.add_argument("--windows", type=windows, metavar="NxLENGTH", help="how much of it; 12x1024")
    parser.add_argument(
        "--dequantize", action="store_true", help="make a quantized source dense first"
    )
    parser.add_argument(
        "--memory",
        type=_memory,
        metavar="BYTES",
        help="hold no more than this, such as 4GB: block by block",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a killed run with --memory stopped"
    )
    parser.add_argument("--print-config", action="store_true", help="show the recipe, and stop")
    parser.add_argument(
        "--explain", "--dry-run", action="store_true", help="show what would be done, and stop"
    )
    parser.add_argument("--no-report", action="store_true", help="write no report.html")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder, at the end"
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    if options.list:
        return _listed()
    try:
        return _quantize(options)
    except ValueError as error:
        raise ValueError(_said(str(error))) from error


def _quantize(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from jaxweights.cli._progress import show_progress
    from jaxweights.cli._run import _text
    from jaxweights.recipes import plan_recipe, run_recipe

    _refuse_missing(options)
    with show_progress(options.quiet) as progress:
        recipe = _recipe(options, progress)
        if options.print_config:
            return {"recipe": recipe.text}, recipe.text.rstrip("\n")
        if options.explain:
            plan = plan_recipe(recipe, progress=progress)
            return json.loads(plan.to_json()), str(plan)
        result = run_recipe(
            recipe, overwrite=options.overwrite, resume=options.resume, progress=progress
        )
    summary = {"directory": str(result.directory)} | result.summary
    return summary, _text(summary, recipe.output.report)


def _recipe(options: argparse.Namespace, progress: Any) -> Any:
    """The checked recipe of the command line."""
    from jaxweights.recipes import parse_recipe
    from jaxweights.recipes._compose import Wishes, compose

    settings = dict(options.set)
    for name in ("bits", "group_size"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    if options.group_size == -1:
        settings["group_size"] = None
    if options.pad:
        settings["pad"] = "zero"
    if options.act_order:
        settings["act_order"] = True
    given = (
        *("samples", "length", "batch", "again", "distill"),
        *("windows", "evaluate", "calibration", "memory"),
    )
    wishes = Wishes(
        str(options.source),
        str(options.destination),
        options.method,
        settings,
        "orbax" if options.format == "native" else options.format,
        skip=tuple(options.skip),
        dequantize=options.dequantize,
        report=not options.no_report,
        **{name: getattr(options, name) for name in given if getattr(options, name) is not None},
    )
    text = compose(wishes)  # before the source is looked at
    if not options.print_config:
        _refuse_existing(options)
    if not _is_decoder(options, progress):
        text = compose(dataclasses.replace(wishes, is_decoder=False))
    recipe = parse_recipe(text, name=_NAME)
    reads = any(step.transform.reads_statistics for step in recipe.steps)
    if options.calibration is not None and not reads and recipe.distill is None:
        raise ValueError(
            f"{recipe.steps[0].method} reads no data. Leave --calibration out, or choose a method "
            "that does, such as gptq."
        )
    return recipe


def _refuse_missing(options: argparse.Namespace) -> None:
    if not options.source:
        raise ValueError("SOURCE is missing. Name a checkpoint, or say --list for the methods.")
    if not options.destination:
        raise ValueError("OUT is missing. Name the folder to make.")
    if options.method is None:
        raise ValueError("--method is missing. Say which, such as gptq; --list shows all.")
    if Path(options.destination).suffix == ".gguf":
        raise ValueError(
            f"'{options.destination}' is a file's name. OUT is a folder, which gets model.gguf, a "
            "report and the recipe."
        )
    for name in ("samples", "length", "batch", "again", "distill"):
        if getattr(options, name) is not None and options.calibration is None:
            raise ValueError(f"--{name} belongs to --calibration, which says what is read.")
    if options.resume and options.memory is None:
        raise ValueError(
            "--resume belongs to --memory: only runs block by block can be gone on with."
        )
    if options.windows is not None and options.evaluate is None:
        raise ValueError("--windows belongs to --evaluate, which says what is read.")


def _refuse_existing(options: argparse.Namespace) -> None:
    """As the run does, before its model is looked at."""
    from jaxweights.checkpoint._check_destination import check_destination

    check_destination(
        "jaxweights quantize",
        options.destination,
        overwrite=options.overwrite or options.explain,
        directory=True,
    )


def _is_decoder(options: argparse.Namespace, progress: Any) -> bool:
    """Whether the source is a language model; refuses one that is quantized."""
    from jaxweights.checkpoint import open_checkpoint
    from jaxweights.cli._tensors import describe_tensors
    from jaxweights.models import LlamaConfig
    from jaxweights.models._load import read_config
    from jaxweights.recipes._model import locate
    from jaxweights.recipes._recipe import ModelSource

    is_path = Path(options.source).expanduser().exists()
    source = ModelSource(**{"path" if is_path else "package": options.source})
    checkpoint = open_checkpoint(locate(source, progress=progress)[0])
    stored = [(t["name"], t["stored"]) for t in describe_tensors(checkpoint) if len(t["shape"]) > 1]
    narrow = [(name, kind) for name, kind in stored if kind not in _PLAIN]
    if narrow and not options.dequantize:
        name, kind = narrow[0]
        raise ValueError(
            f"'{options.source}' is quantized already: {len(narrow)} of its tensors, such as "
            f"{name!r}, which is stored as {kind}. Start from the model that it was made of; or "
            "round it a second time, which costs quality: --dequantize. `jaxweights convert` "
            "writes its integers in another format."
        )
    return isinstance(read_config(checkpoint), LlamaConfig)


def _said(message: str) -> str:
    """An error of the recipe that the command line wrote, of which its user knows nothing."""
    message = re.sub(rf"(?m)^(jaxweights run: )?({re.escape(_NAME)}(?::\d+)?: )?", "", message)
    return message.replace(
        "but the recipe has no `calibrate` section. Add one,",
        "but there is no text to run it on. Say --calibration TEXT,",
    ).replace(
        "beside the weights, or remove this section.",
        "beside the weights, or leave out --calibration and --evaluate.",
    )


def _listed() -> tuple[dict[str, Any], str]:
    from jaxweights.recipes._compose import ALIASES, nameable

    found = nameable()
    width = max(map(len, found))
    lines = []
    for title, reads in (("with data", True), ("without data", False)):
        lines.append(f"{title}:")
        lines += [
            f"  {name:<{width}}  {', '.join(settings) or 'no settings'}"
            for name, (settings, needs) in found.items()
            if needs == reads
        ]
    lines.append("also:")
    for name, (full, settings) in ALIASES.items():
        said = "".join(f", {key}={value}" for key, value in settings.items())
        lines.append(f"  {name:<{width}}  {full}{said}")
    methods = {
        name: {"settings": settings, "reads_data": reads}
        for name, (settings, reads) in found.items()
    }
    return {
        "methods": methods,
        "also": {name: full for name, (full, _) in ALIASES.items()},
    }, "\n".join(lines)


def _group_size(text: str) -> int:
    size = int(text) if re.fullmatch(r"-?[0-9]+", text) else 0
    if size < 1 and size != -1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of inputs. Write 128, or -1.")
    return size


def _memory(text: str) -> str:
    from jaxweights.cli._bytes import byte_count

    byte_count(text)
    return text


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z_0-9]+", key):
        raise argparse.ArgumentTypeError(f"{text!r} is no setting. Write such as damping=0.05.")
    from jaxweights.recipes import RecipeError
    from jaxweights.recipes._yaml import parse_yaml

    try:
        return key, parse_yaml(value, name=key).plain() if value.strip() else None
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
