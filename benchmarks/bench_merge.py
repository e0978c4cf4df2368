"""Merges of whole checkpoints from disk to disk, beside mergekit and a plain copy.

Makes a base and three fine-tunes of 0.5 B parameters in bfloat16 (random weights in the shapes of
Qwen2.5-0.5B), and merges them with every program, each run in a process of its own that starts from
nothing. `--memory` runs one merge with that budget besides. Wall time is what a user waits for; on
a machine that others use, too, compare processor seconds (user and system, of all threads).

Run: python benchmarks/bench_merge.py [--mergekit PYTHON] [--repeats 3] [--layers 24]
PYTHON is an interpreter with mergekit installed; without it the columns of the peer stay empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxweights.checkpoint import write_safetensors

WIDTH, HIDDEN, HEADS, VOCABULARY = 896, 4864, 128, 151936
MODELS = ("base", "ft1", "ft2", "ft3")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as the model's checkpoints have them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, out in (("q", WIDTH), ("k", HEADS), ("v", HEADS)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (out, WIDTH)
            found[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        found[f"{layer}self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        found[f"{layer}mlp.gate_proj.weight"] = (HIDDEN, WIDTH)
        found[f"{layer}mlp.up_proj.weight"] = (HIDDEN, WIDTH)
        found[f"{layer}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        found[f"{layer}input_layernorm.weight"] = (WIDTH,)
        found[f"{layer}post_attention_layernorm.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,)}


def make_models(folder: Path, layers: int) -> int:
    """Writes the checkpoints; returns the bytes of one."""
    base: dict[str, np.ndarray] = {}
    for i, model in enumerate(MODELS):
        draw = np.random.default_rng(i)
        tensors = {}
        for name, shape in shapes(layers).items():
            noise = draw.standard_normal(shape, np.float32)
            start = base[name].astype(np.float32) if i else np.float32("norm" in name)
            tensors[name] = (start + noise * (0.002 if i else 0.02)).astype(ml_dtypes.bfloat16)
        base = base or tensors
        files = {"config.json": json.dumps(CONFIG | {"num_hidden_layers": layers})}
        write_safetensors(folder / model, tensors, files=files)
    return sum(x.nbytes for x in base.values())


def configurations(folder: Path) -> dict[str, str]:
    """Configurations by method, as mergekit reads them."""
    weights = {"ft1": 0.5, "ft2": 0.3, "ft3": 0.2}

    def models(names: tuple[str, ...], more: str = "") -> str:
        return "".join(
            f"  - model: {folder / name}\n"
            f"    parameters: {{weight: {weights.get(name, 1.0)}{more}}}\n"
            for name in names
        )

    base, end = f"base_model: {folder / 'base'}\n", "dtype: bfloat16\n"
    tuned = MODELS[1:]
    thin = models(tuned, ", density: 0.5")
    return {
        "linear": f"merge_method: linear\nmodels:\n{models(MODELS)}{end}",
        "task_arithmetic": f"merge_method: task_arithmetic\n{base}models:\n{models(tuned)}{end}",
        "ties": f"merge_method: ties\n{base}models:\n{thin}{end}",
        "dare_ties": f"merge_method: dare_ties\n{base}models:\n{thin}{end}",
        "slerp": f"merge_method: slerp\n{base}models:\n  - model: {folder / 'base'}\n"
        f"  - model: {folder / 'ft1'}\nparameters: {{t: 0.4}}\n{end}",
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """Seconds, processor seconds, peak memory in MB and standard output of a process."""

    seconds: float
    cpu: float
    peak: float
    text: str


def run(command: list[str]) -> Run:
    """Runs a command to its end."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE)
        error = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{error.decode()[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def copied(source: Path, target: Path) -> Run:
    """What `cp` takes for the bytes that a merge writes."""
    copy = run(["cp", str(source / "model.safetensors"), str(target)])
    target.unlink()
    return copy


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter with mergekit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory", metavar="BYTES", help="also merge within it, such as 1GB")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are kept and found")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--make", action="store_true", help="only make the checkpoints")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-merge-"))
    if options.make:
        make_models(folder, options.layers)
        return
    try:
        if not (folder / "ft3").exists():
            # In a process of its own: a child's peak memory counts that of its parent.
            make = ["--make", "--folder", str(folder), "--layers", str(options.layers)]
            subprocess.run([sys.executable, __file__, *make], check=True)
        nbytes = (folder / "base" / "model.safetensors").stat().st_size
        print(f"{nbytes / 2e9:.2f} B parameters, bfloat16, {os.cpu_count()} cores; medians of "
              f"{options.repeats}")  # fmt: skip
        print(f"{'':18}{'s':>7}{'cpu s':>7}{'MB':>7}{'stream s':>10}{'cp s':>7}{'x cp':>6}"
              f"{'mergekit s':>12}{'cpu s':>7}{'MB':>7}{'faster':>8}{'cpu':>6}")  # fmt: skip
        for method, text in configurations(folder).items():
            if options.methods and method not in options.methods:
                continue
            (folder / f"{method}.yml").write_text(text)
            show(folder, method, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def show(folder: Path, method: str, options: argparse.Namespace) -> None:
    """Prints one method's row, and one with bounded memory."""
    config, out = str(folder / f"{method}.yml"), folder / "out"
    ours = [sys.executable, "-m", "jaxweights.cli", "merge", config, str(out), "--quiet", "--json"]
    rows, copies, peers = [], [], []
    for _ in range(options.repeats):
        os.sync()  # what an earlier run wrote is on the disk, and does not slow this one
        rows.append(run(ours))
        shutil.rmtree(out)
        os.sync()
        copies.append(copied(folder / "base", folder / "copy"))
        if options.mergekit:
            os.sync()
            peers.append(
                run([options.mergekit, "-m", "mergekit.scripts.run_yaml", config, str(out)])
            )
            shutil.rmtree(out)
    one, copy = median(rows), median(copies).seconds
    stream = statistics.median(json.loads(row.text)["seconds"] for row in rows)
    line = f"{method:18}{one.seconds:7.2f}{one.cpu:7.2f}{one.peak:7.0f}"
    line += f"{stream:10.2f}{copy:7.2f}{stream / copy:6.1f}"
    if peers:
        peer = median(peers)
        line += f"{peer.seconds:12.2f}{peer.cpu:7.2f}{peer.peak:7.0f}"
        line += f"{peer.seconds / one.seconds:7.1f}x{peer.cpu / one.cpu:5.1f}x"
    print(line, flush=True)
    if options.memory:
        one = run([*ours, "--memory", options.memory])
        shutil.rmtree(out)
        label = f"  in {options.memory}"
        print(f"{label:18}{one.seconds:7.2f}{one.cpu:7.2f}{one.peak:7.0f}", flush=True)


def median(runs: list[Run]) -> Run:
    """The median of each number."""
    middle = [
        statistics.median([getattr(r, name) for r in runs]) for name in ("seconds", "cpu", "peak")
    ]
    return Run(*middle, text="")


if __name__ == "__main__":
    main()
