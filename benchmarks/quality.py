"""What rounding, GPTQ, magnitude and Wanda cost two real models.

    python benchmarks/quality.py  # both models, about a quarter of an hour on two cores
    python benchmarks/quality.py --model minilm  # one of them
    python benchmarks/quality.py --windows 4 --documents 200   # less text: quicker, noisier

SmolLM2-135M-Instruct is scored by perplexity on re-flowed prose (the beginning of Moby Dick) and
calibrated on its second half; MiniLM-L6 by retrieval on the Brown corpus (words 200 to 240 of a
file must find its words 240 to 280 among 500 files) and calibrated on the second half of every
file. Embeddings, heads, norms and biases stay as they are.

Read SmolLM2's numbers with its origin in mind: its weights come from a GGUF file and lie on the
grid of Q4_1 blocks (4 bits, 32 rows, a float minimum). That flatters 4-bit methods whose groups are
a multiple of those blocks, and leaves little for GPTQ to gain over rounding at 4 bits; 3 bits is
the honest comparison. MiniLM's weights are float32 as trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import jax

import jaxweights as jw
from jaxweights.recipes import MODELS, parse_recipe
from jaxweights.recipes._leaves import tree_bytes
from jaxweights.recipes._measure import prepare_calibration, prepare_measures
from jaxweights.recipes._model import load_model

GROUP = 64  # divides 384, 576 and 1536; 128 does not divide 576


def methods() -> dict[str, Any]:
    """The rows of the table."""
    rtn, gptq = jw.quantize.round_to_nearest, jw.quantize.gptq
    return {
        "int8, one scale per output, rounded": rtn(bits=8),
        "int8, one scale per output, GPTQ": gptq(bits=8),
        "int4, groups of 64, rounded": rtn(bits=4, group_size=GROUP, grid="affine"),
        "int4, groups of 64, GPTQ": gptq(bits=4, group_size=GROUP),
        "int3, groups of 64, rounded": rtn(bits=3, group_size=GROUP, grid="affine"),
        "int3, groups of 64, GPTQ": gptq(bits=3, group_size=GROUP),
        "50 % zeros, magnitude": jw.sparsify.magnitude(sparsity=0.5),
        "50 % zeros, Wanda": jw.sparsify.wanda(sparsity=0.5),
    }


def recipe_of(package: str, options: argparse.Namespace) -> Any:
    """The sections of a recipe that say what is read and measured."""
    is_encoder = "minilm" in package
    text = "brown" if is_encoder else "moby-dick"
    measure = (
        f"retrieval: {{text: brown, documents: {options.documents}}}"
        if is_encoder
        else f"perplexity: {{text: moby-dick, windows: {options.windows}}}"
    )
    return parse_recipe(
        f"model: {{package: {package}}}\n"
        f"calibrate: {{text: {text}, sequences: {options.sequences}, length: 128}}\n"
        "transforms: [{method: sparsify.magnitude, sparsity: 0.5}]\n"
        f"evaluate:\n  {measure}\n"
        "output: {directory: unused}\n"
    )


def measure_model(package: str, options: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(package, options)
    watch = _watch(time.perf_counter())
    model = load_model(recipe.model, progress=watch)
    (measure,) = prepare_measures(recipe, model, watch)
    data = prepare_calibration(recipe, model, watch)
    assert data is not None
    wanted: dict[str, frozenset[str]] = {}
    for tx in methods().values():
        for path, names in tx.needs(model.params).items():
            wanted[path] = wanted.get(path, frozenset()) | names
    rows = {"dense": {"bytes": tree_bytes(model.params)} | measure.score(model.params, "dense")}
    stats = jw.calibrate(model.forward, model.params, data.batches, needs=wanted, progress=watch)
    for name, tx in methods().items():
        params = jw.apply(tx, model.params, stats=stats)
        jax.block_until_ready(jax.tree.leaves(params))
        rows[name] = {"bytes": tree_bytes(params)} | measure.score(params, name)
        del params
    return {
        "model": model.name,
        "source": model.source,
        "measure": measure.definition,
        "calibration": data.definition,
        "rows": rows,
    }


def _watch(start: float) -> Any:
    said: set[str] = set()

    def show(task: str, done: int, total: int | None) -> None:
        if total and done >= total and task not in said:
            said.add(task)
            print(f"{time.perf_counter() - start:7.1f} s  {task}", file=sys.stderr, flush=True)

    return show


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    is_retrieval = "recall_at_1" in rows["dense"]
    fields = ("recall_at_1", "mrr", "cosine") if is_retrieval else ("perplexity",)
    heads = {"recall_at_1": "recall@1", "mrr": "MRR", "cosine": "cosine to dense"}
    lines = [f"**{found['model']}**", "", found["measure"], found["calibration"], ""]
    lines.append("| weights | MB | " + " | ".join(heads.get(f, f) for f in fields) + " |")
    lines.append("|---|---:|" + "---:|" * len(fields))
    for name, row in rows.items():
        numbers = " | ".join(_number(field, row[field]) for field in fields)
        lines.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {numbers} |")
    return "\n".join(lines)


def _number(field: str, value: float) -> str:
    if field != "perplexity":
        return f"{value:.3f}" if field != "cosine" else f"{value:.4f}"
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("minilm", "smollm2", "both"), default="both")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, for perplexity")
    parser.add_argument("--documents", type=int, default=500, help="for retrieval")
    parser.add_argument("--sequences", type=int, default=128, help="of 128 tokens, to calibrate on")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    chosen = [name for name in MODELS if options.model in ("both", *name.split("-"))]
    results = [measure_model(package, options) for package in chosen]
    if options.json:
        print(json.dumps(results, indent=1))
        return
    versions = f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
    print("\n\n".join(table(found) for found in results), f"\n\n{versions}")


if __name__ == "__main__":
    main()
