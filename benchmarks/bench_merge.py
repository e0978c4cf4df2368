"""Merges of whole checkpoints from disk to disk, beside mergekit and what moves the same bytes.

Makes a base and three fine-tunes of 0.5 B parameters in bfloat16 (random weights in the shapes of
Qwen2.5-0.5B, the same in every layer), and merges them with every program, each run in a process of
its own that starts from nothing. Wall time is what a user waits for; on a machine that others use,
too, compare processor seconds (user and system, of all threads).

Two floors stand beside the merge's own time ("stream s", without start-up): "cp s", in which `cp`
copies as many bytes as the merge writes, and "move s", in which a program does all but arithmetic:
with as many threads as cores it reads every operand, takes its checksum, and writes as many bytes
as the result has; both are without the start of the program.

`--floor` adds a table of what no merge of these models avoids: reading and checksums, writing, and
the arithmetic over arrays in cache, in processor seconds and as the floor, their sum divided by the
cores. `merge_floor.py` says what each part does and what is left out. Beside it stand `cp` of the
result and of all bytes that the merge moves, the operands and the result, and how far the merge is
from the floor: "stream s", and "cpu s", from which that of `--explain` is taken off, start-up and
planning. In this table seconds are the least of the runs.

Each program's modules are compiled to bytecode before it is measured, as installing a package does.

`--memory` merges with that budget besides, and prints the peak of the process's resident memory.
That counts pages of the operands' files as long as they are mapped, so it is no less than what the
merge holds. `--repeats 0` runs nothing else. A model six times as large is merged within 1 GB by

    python benchmarks/bench_merge.py --layers 36 --width 2048 --links --memory 1GB --repeats 0

where `--links` makes the second and third fine-tune links to the first, to spare the disk.

Run: python benchmarks/bench_merge.py [--mergekit PYTHON] [--repeats 3] [--layers 24] [--width 896]
PYTHON is an interpreter with mergekit installed; without it the columns of the peer stay empty.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
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

WIDTH, HEADS, VOCABULARY = 896, 128, 151936
MODELS = ("base", "ft1", "ft2", "ft3")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


LAYER = "model.layers.{}."


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as the model's checkpoints have them; one name stands for all layers."""
    hidden = width * 38 // 7
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for name, out in (("q", width), ("k", HEADS), ("v", HEADS)):
        found[f"{LAYER}self_attn.{name}_proj.weight"] = (out, width)
        found[f"{LAYER}self_attn.{name}_proj.bias"] = (out,)
    found[f"{LAYER}self_attn.o_proj.weight"] = (width, width)
    found[f"{LAYER}mlp.gate_proj.weight"] = (hidden, width)
    found[f"{LAYER}mlp.up_proj.weight"] = (hidden, width)
    found[f"{LAYER}mlp.down_proj.weight"] = (width, hidden)
    found[f"{LAYER}input_layernorm.weight"] = (width,)
    found[f"{LAYER}post_attention_layernorm.weight"] = (width,)
    return found | {"model.norm.weight": (width,)}


def make_models(folder: Path, layers: int, width: int, *, links: bool) -> None:
    """Writes the checkpoints."""
    sizes = {"hidden_size": width, "intermediate_size": width * 38 // 7}
    heads = {"num_attention_heads": width // 64, "num_hidden_layers": layers}
    files = {"config.json": json.dumps(CONFIG | sizes | heads)}
    base: dict[str, np.ndarray] = {}
    for i, model in enumerate(MODELS):
        if links and i > 1:
            shutil.copytree(folder / "ft1", folder / model, copy_function=os.link)
            continue
        draw = np.random.default_rng(i)
        drawn = {}
        for name, shape in shapes(width).items():
            noise = draw.standard_normal(shape, np.float32)
            noise *= 0.002 if i else 0.02
            noise += base[name].astype(np.float32) if i else np.float32("norm" in name)
            drawn[name] = noise.astype(ml_dtypes.bfloat16)
        base = base or drawn
        # No merge looks from one tensor to another, so layers may be alike.
        tensors = {
            name.format(i): array
            for name, array in drawn.items()
            for i in range(layers if LAYER in name else 1)
        }
        write_safetensors(folder / model, tensors, files=files)


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


def environment() -> dict[str, str]:
    """This process's environment, in which Python keeps the bytecode that it compiles."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run(command: list[str]) -> Run:
    """Runs a command to its end."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.PIPE, env=environment()
        )
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
    copy = run(["cp", "-r", str(source), str(target)])
    shutil.rmtree(target)
    return copy


CHUNK = 8 << 20


def move(operands: list[Path], target: Path) -> None:
    """Reads models that are alike, takes their checksums, and writes as many bytes as one has."""
    start, before = time.perf_counter(), time.process_time()
    for file in (operands[0]).glob("*.safetensors"):
        move_file([path / file.name for path in operands], target)
    cpu = time.process_time() - before
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu}))


def move_file(operands: list[Path], target: Path) -> None:
    """Reads files of one length, and writes one of that length."""
    import xxhash

    sources = [os.open(path, os.O_RDONLY) for path in operands]
    length = os.fstat(sources[0]).st_size
    target.touch()
    result = os.open(target, os.O_WRONLY)
    workers = os.cpu_count() or 1
    # Buffers that stay in a core's cache, as a merge's do.
    buffers = [[bytearray(CHUNK) for _ in sources] for _ in range(workers)]
    part = math.ceil(length / workers / CHUNK) * CHUNK

    def move_part(worker: int) -> None:
        digests = [xxhash.xxh3_128() for _ in sources]
        for start in range(worker * part, min((worker + 1) * part, length), CHUNK):
            count = min(CHUNK, length - start)
            for source, buffer, digest in zip(sources, buffers[worker], digests, strict=True):
                view = memoryview(buffer)[:count]
                assert os.preadv(source, [view], start) == count
                digest.update(view)
            assert os.pwrite(result, memoryview(buffers[worker][0])[:count], start) == count

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(move_part, range(workers)))
        os.fsync(result)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter with mergekit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory", metavar="BYTES", help="also merge within it, such as 1GB")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are kept and found")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the residual stream")
    parser.add_argument("--links", action="store_true", help="only one fine-tune is written")
    parser.add_argument("--floor", action="store_true", help="also what no merge can avoid")
    parser.add_argument("--make", action="store_true", help="only make the checkpoints")
    parser.add_argument("--move", metavar="MODEL", nargs="+", help="only move these models' bytes")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-merge-"))
    if options.make:
        make_models(folder, options.layers, options.width, links=options.links)
        return
    if options.move:
        move([folder / model for model in options.move], folder / "moved")
        return
    try:
        if not (folder / "ft3").exists():
            # In a process of its own: a child's peak memory counts that of its parent.
            make = ["--make", "--folder", str(folder), "--layers", str(options.layers)]
            make += ["--width", str(options.width), *(["--links"] if options.links else [])]
            subprocess.run([sys.executable, __file__, *make], check=True)
        nbytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        print(f"{nbytes / 2e9:.2f} B parameters, bfloat16, {os.cpu_count()} cores; medians, runs: "
              f"{options.repeats}")  # fmt: skip
        print(f"{'':18}{'s':>7}{'cpu s':>7}{'MB':>7}{'stream s':>10}{'cp s':>7}{'x cp':>6}"
              f"{'move s':>8}{'cpu s':>7}{'x move':>8}"
              f"{'mergekit s':>12}{'cpu s':>7}{'MB':>7}{'faster':>8}{'cpu':>6}")  # fmt: skip
        for method, text in configurations(folder).items():
            if options.methods and method not in options.methods:
                continue
            (folder / f"{method}.yml").write_text(text)
            compile_modules(folder, method, options)
            show(folder, method, options)
        if options.floor:
            show_floors(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def compile_modules(folder: Path, method: str, options: argparse.Namespace) -> None:
    """Imports what a merge imports, so that its bytecode is there when it is measured."""
    config = str(folder / f"{method}.yml")
    run([sys.executable, "-m", "jaxweights.cli", "merge", config, "--explain"])
    if options.mergekit:
        run([options.mergekit, "-c", "import mergekit.scripts.run_yaml"])


def show(folder: Path, method: str, options: argparse.Namespace) -> None:
    """Prints one method's row, and one with bounded memory."""
    config, out = str(folder / f"{method}.yml"), folder / "out"
    ours = [sys.executable, "-m", "jaxweights.cli", "merge", config, str(out), "--quiet", "--json"]
    if options.repeats:
        print(compared(folder, out, ours, method, options), flush=True)
    if options.memory:
        one = run([*ours, "--memory", options.memory])
        shutil.rmtree(out)
        stream = json.loads(one.text)["seconds"]
        label = f"{method} in {options.memory}"
        print(
            f"{label:18}{one.seconds:7.2f}{one.cpu:7.2f}{one.peak:7.0f}{stream:10.2f}", flush=True
        )


def compared(
    folder: Path, out: Path, ours: list[str], method: str, options: argparse.Namespace
) -> str:
    """One method's row: medians of runs of all programs by turns."""
    rows, copies, moves, peers = [], [], [], []
    operands = operands_of(method)
    mover = [sys.executable, __file__, "--folder", str(folder), "--move", *operands]
    for _ in range(options.repeats):
        os.sync()  # what an earlier run wrote is on the disk, and does not slow this one
        rows.append(run(ours))
        shutil.rmtree(out)
        os.sync()
        copies.append(copied(folder / "base", folder / "copy"))
        os.sync()
        moves.append(run(mover))
        (folder / "moved").unlink()
        if options.mergekit:
            os.sync()
            peers.append(
                run([options.mergekit, "-m", "mergekit.scripts.run_yaml", ours[4], str(out)])
            )
            shutil.rmtree(out)
    one, copy = median(rows), median(copies).seconds
    stream, moved = (
        statistics.median(json.loads(row.text)["seconds"] for row in found)
        for found in (rows, moves)
    )
    line = f"{method:18}{one.seconds:7.2f}{one.cpu:7.2f}{one.peak:7.0f}"
    line += f"{stream:10.2f}{copy:7.2f}{stream / copy:6.1f}"
    cpu = statistics.median(json.loads(row.text)["cpu"] for row in moves)
    line += f"{moved:8.2f}{cpu:7.2f}{stream / moved:8.1f}"
    if peers:
        peer = median(peers)
        line += f"{peer.seconds:12.2f}{peer.cpu:7.2f}{peer.peak:7.0f}"
        line += f"{peer.seconds / one.seconds:7.1f}x{peer.cpu / one.cpu:5.1f}x"
    return line


def operands_of(method: str) -> tuple[str, ...]:
    """The models that a method reads."""
    return MODELS[:2] if method == "slerp" else MODELS


def show_floors(folder: Path, options: argparse.Namespace) -> None:
    """Prints what no merge can avoid, and how far merges are from it."""
    print(f"\n{'':18}{'read':>7}{'write':>7}{'survey':>7}{'merge':>7}{'sync':>7}{'floor s':>9}"
          f"{'cp s':>7}{'x cp':>6}{'cp all s':>10}{'x cp':>6}"
          f"{'stream s':>10}{'x floor':>9}{'cpu s':>7}{'x floor':>9}")  # fmt: skip
    everything: dict[tuple[str, ...], float] = {}
    for method in options.methods or configurations(folder):
        operands = operands_of(method)
        if operands not in everything:
            everything[operands] = min(
                copied_all(folder, operands) for _ in range(max(options.repeats, 1))
            )
        print(floor_row(folder, method, everything[operands], options), flush=True)


def copied_all(folder: Path, operands: tuple[str, ...]) -> float:
    """Seconds in which `cp` copies what a merge reads and writes."""
    os.sync()
    (folder / "copies").mkdir()
    sources = [str(folder / name) for name in operands]
    try:
        copies = [["cp", "-r", *sources, str(folder / "copies")]]
        copies.append(["cp", "-r", sources[0], str(folder / "copies" / "result")])
        return sum(run(copy).seconds for copy in copies)
    finally:
        shutil.rmtree(folder / "copies")


def floor_row(folder: Path, method: str, everything: float, options: argparse.Namespace) -> str:
    """One method's row of the table of floors."""
    config, out = str(folder / f"{method}.yml"), folder / "out"
    merge = [sys.executable, "-m", "jaxweights.cli", "merge", config]
    program = [sys.executable, str(Path(__file__).with_name("merge_floor.py")), method]
    program += [str(folder / "written"), *(str(folder / name) for name in operands_of(method))]
    streams, starts, merges, copies, parts = [], [], [], [], []
    for _ in range(max(options.repeats, 1)):
        parts.append(json.loads(run(program).text))
        os.sync()
        copies.append(copied(folder / "base", folder / "copy").seconds)
        os.sync()
        merged = run([*merge, str(out), "--quiet", "--json"])
        shutil.rmtree(out)
        streams.append(json.loads(merged.text)["seconds"])
        merges.append(merged.cpu)
        starts.append(run([*merge, "--explain"]).cpu)
    least = {part: min(one[part] for one in parts) for part in parts[0]}
    cpu = sum(seconds for part, seconds in least.items() if part != "sync")
    floor, stream, copy = cpu / (os.cpu_count() or 1), min(streams), min(copies)
    own = min(merges) - min(starts)
    line = f"{method:18}"
    line += "".join(f"{least[p]:7.2f}" for p in ("read", "write", "survey", "merge", "sync"))
    line += f"{floor:9.2f}{copy:7.2f}{floor / copy:6.1f}{everything:10.2f}{floor / everything:6.1f}"
    return line + f"{stream:10.2f}{stream / floor:9.1f}{own:7.2f}{own / cpu:9.1f}"


def median(runs: list[Run]) -> Run:
    """The median of each number."""
    middle = [
        statistics.median([getattr(r, name) for r in runs]) for name in ("seconds", "cpu", "peak")
    ]
    return Run(*middle, text="")


if __name__ == "__main__":
    main()
