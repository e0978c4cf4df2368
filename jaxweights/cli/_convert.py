"""jaxweights convert: a checkpoint in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "write a checkpoint in another format"
DESCRIPTION = """\
Writes a checkpoint of any format that can be read (safetensors, GGUF, a result of
`jaxweights run`) as safetensors under the names that other tools read, or as Orbax. Config and
tokenizer travel along. Represented weights become dense in safetensors, and stay as they are in
Orbax.

Nothing appears at the destination before all of it is written."""
EXAMPLES = """\
examples:
  jaxweights convert model.gguf model --to safetensors
  jaxweights convert runs/smollm2 small --to safetensors --dtype bfloat16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint: a file or a folder")
    parser.add_argument("destination", metavar="DESTINATION", help="a folder to make")
    parser.add_argument("--to", required=True, choices=("safetensors", "orbax"), help="the format")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast dense weights; without it they stay as they are",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder, at the end"
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.checkpoint import Provenance
    from jaxweights.checkpoint._atomic import check_destination, refuse_unrelated
    from jaxweights.cli._progress import show_progress
    from jaxweights.cli._tensors import resolve
    from jaxweights.models import load_pretrained
    from jaxweights.recipes._write import write_checkpoint

    source, destination = resolve(Path(options.source)), Path(options.destination)
    check_destination(
        "jaxweights convert", destination, overwrite=options.overwrite, directory=True
    )
    refuse_unrelated("jaxweights convert", destination)
    with show_progress(options.quiet) as progress:
        progress("Reading", 0, 1)
        pretrained = load_pretrained(source, dtype=options.dtype)
        progress("Reading", 1, 1)
        fingerprint = pretrained.source.fingerprint()
        provenance = Provenance.collect(
            recipe={"convert": {"to": options.to, "dtype": options.dtype}}, source=fingerprint
        )
        progress("Writing", 0, 1)
        write_checkpoint(
            destination,
            options.to,
            pretrained,
            pretrained.params,
            provenance=provenance,
            overwrite=options.overwrite,
        )
        progress("Writing", 1, 1)
    result = {
        "source": str(source),
        "fingerprint": fingerprint,
        "destination": str(destination),
        "format": options.to,
        "files": sorted(p.relative_to(destination).as_posix() for p in destination.iterdir()),
    }
    return result, f"Written to {destination}: {', '.join(result['files'])}"
