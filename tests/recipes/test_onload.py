"""A model of which one block is held at a time becomes what it becomes in memory."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxweights.calibrate import calibrate, pipeline
from jaxweights.calibrate._blocks import BlockPrograms
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.core import apply, chain, flatten, identity, partition
from jaxweights.lift import infer_layout
from jaxweights.models import (
    checkpoint_from_params,
    config_to_dict,
    export_checkpoint,
    load_pretrained,
)
from jaxweights.quantize import awq, gptq, llama_folds, round_to_nearest, smooth
from jaxweights.recipes import transform_in_blocks
from jaxweights.recipes._perplexity import perplexity
from jaxweights.recipes.onload._block_files import BlockFiles
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._measure import BlockMeasure
from jaxweights.sparsify import wanda
from tests._tiny_models import LLAMA, write_tiny
from tests.recipes._onload import FAMILIES, GPTQ, tensors_of, tokens


def stages_of(name, config):
    folds = llama_folds(config)
    return {
        "gptq": [gptq(**GPTQ)],
        "awq": [awq(bits=4, group_size=32, folds=folds)],
        "smooth, gptq": [smooth(folds=folds, unfolded="leave"), gptq(**GPTQ)],
        "smooth, gptq with errors": [
            smooth(folds=folds, unfolded="leave"),
            gptq(**GPTQ, error_propagation=0.5),
        ],
    }[name]


def forward(loaded):
    return lambda params, x: loaded.model.apply({"params": params}, x)


def as_in_memory(model, stages, batches, again, out, form):
    """What the whole model becomes, written in the same format."""
    loaded = load_pretrained(model)
    fn, params = forward(loaded), loaded.params
    if again == "never":
        tx = chain(*stages)
        stats = calibrate(fn, params, batches, needs=tx.needs(params))
        params = apply(tx, params, stats=stats)
    else:
        params = pipeline(fn, params, batches, stages, block_by_block=again == "each_block")
    export_checkpoint(out, params, loaded.config, form=form)
    return tensors_of(out)


@pytest.mark.parametrize(
    "family, method, again, form",
    [
        ("llama", "gptq", "each_block", "compressed-tensors"),
        ("llama", "gptq", "never", "gptq"),
        ("qwen2", "awq", "each_block", "awq"),
        ("llama", "smooth, gptq with errors", "each_block", "compressed-tensors"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("mistral", "gptq", "each_block", "compressed-tensors"),
                ("qwen2", "smooth, gptq", "each_block", "gptq"),
                ("llama", "smooth, gptq", "each_step", "gguf"),
                ("qwen3", "smooth, gptq", "each_block", "compressed-tensors"),
                ("olmo2", "gptq", "each_block", "compressed-tensors"),
            )
        ),
    ],
)
def test_every_byte_is_that_of_the_run_in_memory(folder, tmp_path, family, method, again, form):
    stages, batches = stages_of(method, FAMILIES[family]), tokens()
    out = transform_in_blocks(
        folder / family, tmp_path / "out", stages, batches, form=form, again=again
    )
    whole = as_in_memory(folder / family, stages, batches, again, tmp_path / "whole", form)
    got = tensors_of(out)
    assert got.keys() == whole.keys()
    assert [name for name in got if got[name] != whole[name]] == []


def test_blocks_read_what_the_quantized_blocks_before_them_give(folder, tmp_path):
    rough = gptq(bits=2, group_size=32)
    for again in ("never", "each_block"):
        transform_in_blocks(
            folder / "llama", tmp_path / again, rough, tokens(), form="safetensors", again=again
        )
    one, two = (open_checkpoint(tmp_path / again) for again in ("never", "each_block"))
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(one.read(name.format(0)), two.read(name.format(0)))
    assert np.abs(one.read(name.format(2)) - two.read(name.format(2))).max() > 0.01
    for outside in ("model.embed_tokens.weight", "model.norm.weight"):
        source = open_checkpoint(folder / "llama")
        np.testing.assert_array_equal(two.read(outside), source.read(outside))


def test_errors_are_propagated_block_by_block_only(folder, tmp_path):
    tx = gptq(**GPTQ, error_propagation=0.5)
    words = r"again='each_step': .*error_propagation.*compares every block.*Choose 'each_block'"
    with pytest.raises(ValueError, match=words):
        transform_in_blocks(folder / "llama", tmp_path / "out", tx, tokens(), again="each_step")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_behind_the_layers_makes_the_logits_of_what_they_gave(folder, family):
    loaded = load_pretrained(folder / family)
    flat, _ = flatten(loaded.params)
    [batch, *_] = tokens(1)
    programs = BlockPrograms(forward(loaded), loaded.params, (batch,))
    model = programs.model
    carried = programs.enter(flat, (batch,))
    one = programs.read(flat, (batch,), carried)
    for layer in range(model.length):
        block = {path: flat[path][layer] for path in model.inside}
        one = one._replace(carried=programs.advance(block, one, layer))
    assert model.exit is not None
    leaves = {path: flat[path] for path in model.exit.reads}
    assert not any(path.startswith("layers/") for path in leaves)
    [logits] = model.exit.run(leaves, [batch], one.carried)
    expected = forward(loaded)(loaded.params, batch)
    assert float(np.std(expected)) > 0.01
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_windows_that_do_not_fill_a_batch_are_measured_alike(folder, tmp_path):
    rows = np.concatenate(tokens(2))[:5]
    layers = Layers("test", folder / "llama")
    loaded = load_pretrained(folder / "llama")
    [fewer, *_] = tokens(1)
    programs = BlockPrograms(forward(layers.pretrained), layers.pretrained.params, (fewer,))
    measure = BlockMeasure("test", layers, programs, rows, batch=2)
    (tmp_path / "files").mkdir()
    files = BlockFiles(tmp_path / "files")
    for layer in range(layers.count):
        up = layers.read("layers/mlp/up/kernel", layer)
        files.write(layer, {"layers/mlp/up/kernel": up * (2.0 + layer)}, {})

    def kill(_, done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.run(tmp_path / "states", files, kill)
    assert list((tmp_path / "states").iterdir())  # what a killed run leaves does no harm
    scores = measure.run(tmp_path / "states", files, lambda *_: None)
    scale = np.arange(2.0, 2.0 + layers.count, dtype=np.float32)[:, None, None]
    kernel = loaded.params["layers"]["mlp"]["up"]["kernel"]
    changed = dict(loaded.params)
    changed["layers"] = jax.tree.map(lambda x: x, loaded.params["layers"])
    changed["layers"]["mlp"]["up"]["kernel"] = kernel * scale
    for when, params in (("before", loaded.params), ("after", changed)):
        whole = perplexity(forward(loaded), params, rows, batch=5)
        np.testing.assert_allclose(scores[when].windows, whole.windows, rtol=1e-5)
        assert scores[when].tokens == whole.tokens == 5 * 23
    assert scores["before"].nll != pytest.approx(scores["after"].nll, rel=1e-3)
    assert not list((tmp_path / "states").iterdir())


def test_methods_without_data_need_no_batches(folder, tmp_path):
    tx = round_to_nearest(bits=4, group_size=32)
    out = transform_in_blocks(folder / "qwen2", tmp_path / "out", tx, form="compressed-tensors")
    loaded = load_pretrained(folder / "qwen2")
    rule = partition(("layers/.*/kernel", tx), (..., identity()))
    layout = infer_layout(forward(loaded), loaded.params, tokens()[0])
    whole = apply(rule, loaded.params, layout=layout)
    export_checkpoint(tmp_path / "whole", whole, loaded.config, form="compressed-tensors")
    assert tensors_of(out) == tensors_of(tmp_path / "whole")


def test_pruned_and_then_quantized_weights_are_written_dense(folder, tmp_path):
    stages = [wanda(keep=2, of=4), gptq(**GPTQ)]
    out = transform_in_blocks(
        folder / "llama", tmp_path / "out", stages, tokens(), form="safetensors", again="each_step"
    )
    weight = open_checkpoint(out).read("model.layers.1.self_attn.q_proj.weight")
    kept = (weight.reshape(-1, 4) != 0).sum(axis=1)
    assert kept.max() == 2 and kept.mean() > 1.5


def test_a_gguf_model_is_read_block_by_block(folder, tmp_path):
    tx = round_to_nearest(bits=8, group_size=32, grid="half")
    small = transform_in_blocks(folder / "llama", tmp_path / "q8", tx, form="gguf")
    out = transform_in_blocks(small, tmp_path / "out", gptq(**GPTQ), tokens(), form="gptq")
    params = load_pretrained(out).params
    assert params["layers"]["attn"]["k"]["kernel"].bits == 4
    whole = load_pretrained(small)
    done = pipeline(forward(whole), whole.params, tokens(), [gptq(**GPTQ)], block_by_block=True)
    np.testing.assert_array_equal(
        params["layers"]["attn"]["k"]["kernel"].codes_matrix(),
        done["layers"]["attn"]["k"]["kernel"].codes_matrix(),
    )


def test_nothing_is_compiled_for_later_blocks(folder, tmp_path):
    compiled = []
    listener = lambda event, seconds, **more: compiled.append(event)  # noqa: E731
    at = {}

    def progress(task, done, total):
        at[task, done] = sum("backend_compile" in event for event in compiled)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        transform_in_blocks(
            folder / "llama", tmp_path / "out", awq(bits=4, group_size=32), tokens(),
            form="safetensors", progress=progress,
        )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert at["Blocks", 1] > at["Blocks", 0]
    assert at["Blocks", 3] == at["Blocks", 1]


MEMORY = """\
    import json, sys
    from pathlib import Path
    import numpy as np
    from jaxweights.quantize import gptq
    from jaxweights.recipes import transform_in_blocks
    from jaxweights.recipes.onload._run import BlockRun
    from tests.recipes._onload import GPTQ
    folder = Path(sys.argv[1])
    told = []
    plan = BlockRun.__init__
    def planned(self, *given, **options):
        plan(self, *given, **options)
        told.append(self.needed.total)
    BlockRun.__init__ = planned
    peak = lambda: max(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    batches = [np.full((4, 64), i, np.int32) + np.arange(64, dtype=np.int32) for i in range(4)]
    peaks = {}
    def progress(task, done, total):
        peaks[f"{task} {done}"] = peak()
    transform_in_blocks(
        folder / "model", folder / "out", gptq(**GPTQ), batches, progress=progress
    )
    print(json.dumps({"told": told[0], "settled": peaks["Blocks 8"], "peak": peak()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_memory_stays_below_what_was_told_however_many_layers_there_are(tmp_path):
    wide = dataclasses.replace(
        LLAMA, hidden_size=256, num_kv_heads=4, head_dim=64, intermediate_size=1024, num_layers=24
    )
    write_tiny(tmp_path / "model", wide)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)],
        capture_output=True, check=True, text=True, cwd=Path(__file__).resolve().parents[2],
        # Without arenas for each thread, in which more or less stays as they take turns.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["peak"] <= said["told"]
    # What is compiled stays. Then 16 more blocks of weights and Gram matrices pass through.
    weights = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    grams = 24 * 4 * (3 * 256**2 + 1024**2)
    assert (weights + grams) * 16 / 24 > 1.3e8
    assert said["peak"] - said["settled"] < 3e7


SMOLLM = sorted(Path(os.environ.get("JAXWEIGHTS_MODELS", ".")).rglob("SmolLM2*.gguf"))


def first_layers(model, folder, count):
    """The first layers of a model with its embedding and norm, as a checkpoint of its own."""
    loaded = load_pretrained(model, dtype=np.float32)
    config = dataclasses.replace(loaded.config, num_layers=count)
    params = {**loaded.params, "layers": jax.tree.map(lambda x: x[:count], loaded.params["layers"])}
    tensors = checkpoint_from_params(jax.tree.map(np.asarray, params), config)
    files = {"config.json": json.dumps(config_to_dict(config))}
    write_safetensors(folder, tensors, files=files)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM, reason="needs SmolLM2 in JAXWEIGHTS_MODELS")
def test_layers_of_a_real_model_become_what_they_become_in_memory(tmp_path):
    model = first_layers(SMOLLM[-1], tmp_path / "model", 3)
    tx = gptq(bits=4, group_size=64, grid="half")
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 49_000, (8, 128)).astype(np.int32) for _ in range(2)]
    out = transform_in_blocks(model, tmp_path / "out", tx, batches)
    loaded, got = load_pretrained(model), load_pretrained(out).params["layers"]
    done = pipeline(forward(loaded), loaded.params, batches, [tx], block_by_block=True)
    for part, name in (("attn", "o"), ("mlp", "up"), ("mlp", "down")):
        ours, theirs = got[part][name]["kernel"], done["layers"][part][name]["kernel"]
        np.testing.assert_array_equal(ours.codes_matrix(), theirs.codes_matrix())
