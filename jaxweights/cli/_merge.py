"""jaxweights merge: checkpoints merged as a mergekit configuration says."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from jaxweights.cli._bytes import byte_count

SUMMARY = "merge checkpoints as a mergekit configuration says"
DESCRIPTION = """\
Merges checkpoints of any size: slices are read, merged and written at the same time, and what is in
memory at once is bounded. CONFIG is a YAML file as mergekit reads it. Unknown keys and parameters
are errors, as are models that do not fit each other; nothing appears at the destination before all
of it is written."""
EXAMPLES = """\
examples:
  jaxweights merge ties.yml merged
  jaxweights merge ties.yml merged --memory 1GB --resume
  jaxweights merge ties.yml merged --report report.html
  jaxweights merge ties.yml merged --evaluate prose.txt --curve 5 --report report.html
  jaxweights merge ties.yml --explain

a configuration:
  merge_method: ties
  base_model: models/base
  models:
    - model: models/math
      parameters: {weight: 0.6, density: 0.5}
    - model: models/code
      parameters: {weight: [0.2, 0.8], density: 0.5}   # from the first layer to the last
  dtype: bfloat16

A killed run leaves the destination as it was; the same command with --resume goes on with it."""

# What an interrupted run leaves.
INTERRUPTED = "the destination is as it was; say --resume to go on, or run anew to start over"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("config", metavar="CONFIG", help="a merge configuration, in YAML")
    parser.add_argument("destination", metavar="OUT", nargs="?", help="a folder to make")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="only show the resolved value of every parameter for every tensor",
    )
    parser.add_argument(
        "--to", choices=("safetensors", "orbax"), default="safetensors", help="the format"
    )
    parser.add_argument(
        "--memory", type=byte_count, metavar="BYTES", help="hold no more than this, such as 1GB"
    )
    parser.add_argument(
        "--shard",
        type=byte_count,
        default=5 * 10**9,
        metavar="BYTES",
        help="most bytes a file of safetensors (5GB)",
    )
    parser.add_argument(
        "--compat",
        choices=("fixed", "mergekit"),
        default="fixed",
        help="mergekit: repeat those of its habits that --explain lists as differences",
    )
    parser.add_argument(
        "--missing",
        choices=("error", "take"),
        default="error",
        help="take: a tensor that some models lack comes from those that have it",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random methods (0)")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="make a page about the deltas too: cosines, sign conflicts, sizes by depth",
    )
    parser.add_argument(
        "--evaluate",
        metavar="TEXT",
        help="score the models and the merged one on a text file, or on pydoc-topics, moby-dick or "
        "brown; whole models are held for it, two at a time, with --curve three",
    )
    parser.add_argument(
        "--windows",
        type=_windows,
        default=(8, 512),
        metavar="COUNTxTOKENS",
        help="how much of the text, from its beginning (8x512)",
    )
    parser.add_argument(
        "--curve",
        type=int,
        default=0,
        metavar="POINTS",
        help="score this many models on the line from the base to each other, too",
    )
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing checkpoint and report, at the end",
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.cli._progress import show_progress
    from jaxweights.recipes.mergekit import Evaluation, explain_merge, run_merge
    from jaxweights.stream._memory import keep_freed_pages
    from jaxweights.stream._program import run_where_called

    common = {"compat": options.compat, "missing": options.missing, "seed": options.seed}
    if options.curve and options.evaluate is None:
        raise ValueError("--curve needs a text to score the models on. Say --evaluate TEXT, too.")
    if options.explain:
        for name in ("report", "evaluate"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--explain reads no values, so it has no --{name}. Leave one out."
                )
        return _explained(explain_merge(options.config, **common))
    if options.destination is None:
        raise ValueError("OUT is missing. Name the folder to make, or say --explain.")
    evaluate = None
    if options.evaluate is not None:
        evaluate = Evaluation(options.evaluate, *options.windows, curve=options.curve)
    keep_freed_pages()
    run_where_called()
    with show_progress(options.quiet, unit="bytes") as progress:
        done = run_merge(
            options.config,
            options.destination,
            format=options.to,
            memory=options.memory,
            max_shard_bytes=options.shard,
            overwrite=options.overwrite,
            resume=options.resume,
            report=options.report,
            evaluate=evaluate,
            progress=progress,
            **common,
        )
    result = {
        "destination": str(done.destination),
        "report": options.report,
        "tensors": done.tensors,
        "resumed": done.resumed,
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": round(done.seconds, 3),
        "scores": None if done.scores is None else dataclasses.asdict(done.scores),
        "checksums": done.checksums,
    }
    rate = (done.bytes_read + done.bytes_written) / 1e9 / max(done.seconds, 1e-9)
    text = (
        f"{done.tensors} tensors, {done.bytes_written / 1e9:.2f} GB written to {done.destination} "
        f"in {done.seconds:.1f} s ({rate:.1f} GB/s read and written)"
    )
    if done.resumed:
        text += f"; {done.resumed} tensors were there from before"
    if done.scores is not None:
        text += f"\n\n{_scored(done.scores)}"
    if options.report is not None:
        text += f"\nreport: {options.report}"
    return result, text


def _scored(scores: Any) -> str:
    width = max(map(len, scores.perplexity))
    lines = [scores.definition]
    lines += [f"  {label:<{width}}  {value:.4g}" for label, value in scores.perplexity.items()]
    if scores.curves:
        shares = "".join(f"{alpha:>9.3g}" for alpha in scores.alphas)
        lines += ["", f"  {'share of the other model':<{max(width, 24)}}{shares}"]
        for label, line in scores.curves.items():
            lines.append(f"  {label:<{max(width, 24)}}" + "".join(f"{x:>9.4g}" for x in line))
    return "\n".join(lines)


def _explained(explanation: Any) -> tuple[dict[str, Any], str]:
    rows = [
        {
            "tensor": tensor.job.name,
            "method": tensor.method,
            "shape": list(tensor.job.shape),
            "dtype": str(tensor.job.dtype),
            "depth": round(tensor.depth, 4),
            "inputs": tensor.inputs,
            "parameters": tensor.parameters,
        }
        for tensor in explanation.tensors
    ]
    lines = []
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        lines.append(f"{row['tensor']}  {shape} {row['dtype']}  {row['method']}")
        lines += [f"    {key}: {_value(value)}" for key, value in row["parameters"].items()]
    differs = [f"  - {sentence}" for sentence in explanation.differs]
    text = "\n".join([*lines, "", "Other than in mergekit:", *differs])
    return {"tensors": rows, "differs": list(explanation.differs)}, text


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{model} {_value(item)}" for model, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _windows(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*([0-9]+)\s*[x×]\s*([0-9]+)\s*", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of windows. Write 8x512.")
    return int(found[1]), int(found[2])
