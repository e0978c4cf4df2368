"""Conversion tensor by tensor gives the bytes of a conversion in memory."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.checkpoint._mapped import MappedTensor
from jaxweights.cli import main
from jaxweights.models import (
    LlamaConfig,
    build,
    checkpoint_from_params,
    config_to_dict,
    load_pretrained,
)
from jaxweights.recipes._convert import Rounding, convert_checkpoint
from jaxweights.recipes._write import write_checkpoint

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder of dense safetensors."""
    import json

    folder = tmp_path_factory.mktemp("models") / "dense"
    params = build(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    tensors = checkpoint_from_params(params, CONFIG)
    write_safetensors(folder, tensors, files={"config.json": json.dumps(config_to_dict(CONFIG))})
    return folder


@pytest.fixture(scope="module")
def rounded(dense):
    """The model and its parameters with int4 kernels, as a run in memory makes them."""
    pretrained = load_pretrained(dense)
    run = lambda p, t: pretrained.model.apply({"params": p}, t)  # noqa: E731
    layout = jw.infer_layout(run, pretrained.params, jnp.zeros((1, 4), jnp.int32))
    tx = jw.quantize.round_to_nearest(bits=4, group_size=32)
    return pretrained, jw.apply(tx, pretrained.params, layout=layout)


def same_files(one, other):
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq", "compressed-tensors", "gguf"])
def test_rounding_on_the_way_gives_the_bytes_of_a_run_in_memory(dense, rounded, tmp_path, form):
    write_checkpoint(tmp_path / "whole", form, *rounded)
    convert_checkpoint(open_checkpoint(dense), tmp_path / "lazy", form, rounding=Rounding(4, 32))
    same_files(tmp_path / "whole", tmp_path / "lazy")


@pytest.mark.parametrize("form", ["safetensors", "awq", "gguf"])
def test_quantized_sources_give_the_bytes_of_a_conversion_in_memory(rounded, tmp_path, form):
    write_checkpoint(tmp_path / "ct", "compressed-tensors", *rounded)
    source = load_pretrained(tmp_path / "ct")
    write_checkpoint(tmp_path / "whole", form, source, source.params)
    convert_checkpoint(open_checkpoint(tmp_path / "ct"), tmp_path / "lazy", form)
    same_files(tmp_path / "whole", tmp_path / "lazy")


def test_gguf_blocks_become_the_integers_of_another_format(rounded, tmp_path):
    write_checkpoint(tmp_path / "m.gguf", "gguf", *rounded)
    source = load_pretrained(tmp_path / "m.gguf", dequantize=False)
    write_checkpoint(tmp_path / "whole", "compressed-tensors", source, source.params)
    convert_checkpoint(
        open_checkpoint(tmp_path / "m.gguf"), tmp_path / "lazy", "compressed-tensors"
    )
    same_files(tmp_path / "whole", tmp_path / "lazy")


@pytest.mark.parametrize("bits, kind", [(4, "Q4_0"), (8, "Q8_0")])
def test_blocks_are_those_that_llama_cpp_rounds(dense, tmp_path, bits, kind):
    gguf = pytest.importorskip("gguf")
    convert_checkpoint(
        open_checkpoint(dense), tmp_path / "m.gguf", "gguf", rounding=Rounding(bits, None)
    )
    blocks = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    name = "blk.1.ffn_up.weight"
    assert blocks[name].tensor_type == gguf.GGMLQuantizationType[kind]
    weight = open_checkpoint(dense).read("model.layers.1.mlp.up_proj.weight")
    want = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(blocks[name].data.reshape(want.shape), want)


def test_tensors_are_looked_at_once_before_and_made_once_while_writing(dense, tmp_path):
    told = []
    convert_checkpoint(
        open_checkpoint(dense),
        tmp_path / "out",
        "compressed-tensors",
        rounding=Rounding(4, 32),
        progress=lambda task, done, total: told.append((task, done, total)),
    )
    count = len(open_checkpoint(dense).names)
    assert told == [("Converting", i + 1, 2 * count) for i in range(2 * count)]


def test_what_was_read_where_it_lies_mapped_leaves_the_process(dense, tmp_path, monkeypatch):
    left = []
    forget = MappedTensor.forget
    monkeypatch.setattr(
        MappedTensor, "forget", lambda self, *a: (left.append(self.start), forget(self, *a))
    )
    source = open_checkpoint(dense)
    convert_checkpoint(source, tmp_path / "m.gguf", "gguf")
    places = [source.mapped(name) for name in source.names]
    assert sorted(left) == sorted([place.start for place in places] * 2)


def test_a_run_that_ends_early_leaves_nothing(dense, tmp_path):
    def interrupt(task, done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            open_checkpoint(dense),
            tmp_path / "out",
            "compressed-tensors",
            rounding=Rounding(4, 32),
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_into_the_memory_is_said_before_anything_is_read(dense, tmp_path):
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight': takes about \d+ bytes"):
        convert_checkpoint(open_checkpoint(dense), tmp_path / "out", "gguf", memory=1 << 20)
    assert not (tmp_path / "out").exists()


def test_a_head_that_differs_from_the_embedding_is_refused(dense, tmp_path):
    source = open_checkpoint(dense)
    head = {"lm_head.weight": source.read("model.embed_tokens.weight") + 1}
    write_safetensors(tmp_path / "m", dict(source.items()) | head, files=dict(source.files))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from the embedding, but the"):
        convert_checkpoint(open_checkpoint(tmp_path / "m"), tmp_path / "out", "gguf")


def test_the_command_rounds_and_refuses_settings_that_it_could_not_use(dense, tmp_path, capsys):
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--to", "gptq", "--group-size", "32"]) == 1
    assert "--group-size belongs to --bits" in capsys.readouterr().err
    assert main([*arguments, "--to", "gptq", "--bits", "4", "--pad"]) == 1
    assert "--pad belongs to --group-size" in capsys.readouterr().err
    # Inputs that no whole number of groups makes.
    rounds = [*arguments, "--to", "gptq", "--bits", "4", "--group-size", "48"]
    assert main(rounds) == 1
    message = capsys.readouterr().err
    assert message.count("fill up the last group by pad='zero'") == 6  # all matrices but `down`
    assert (
        "(group_size is --group-size; pad='zero' is --pad; `jaxweights quantize --skip" in message
    )
    assert main([*rounds, "--pad"]) == 0
    written = open_checkpoint(tmp_path / "out")
    found = [written.represented(name) for name in written.names if "_proj" in name]
    assert all(weight.full_group == (48 if weight.in_dim % 48 else 0) for weight in found)
    assert 48 in {weight.full_group for weight in found}
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, "--to", "orbax", "--bits", "4"]) == 1
    assert (
        "--bits: only for checkpoints that are read and written tensor by"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--to", "safetensors", "--target", "vllm"]) == 1
    assert "--target vllm is about GPTQ, AWQ and" in capsys.readouterr().err
    assert main([*arguments, "--to", "safetensors", "--bits", "4"]) == 1
    assert "bits=4: safetensors holds dense matrices" in capsys.readouterr().err
    assert main([*arguments, "--to", "bitsandbytes", "--bits", "4"]) == 1
    assert "bits=4: bitsandbytes holds NF4 and FP4 tables" in capsys.readouterr().err
    assert main([*arguments, "--to", "gguf", "--bits", "3"]) == 1
    assert "bits=3: gguf has blocks of 4, 5, 8 bits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--to", "gptq", "--bits", "4", "--group-size", "0"]) == 1
    assert "group_size=0" in capsys.readouterr().err
    assert main([*arguments, "--to", "gptq", "--bits", "4", "--group-size", "32"]) == 0
    kernel = load_pretrained(tmp_path / "out").params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.bits == 4 and kernel.group_size == 32
    again = ["convert", str(tmp_path / "out"), str(tmp_path / "again"), "--quiet"]
    assert main([*again, "--to", "compressed-tensors", "--bits", "8"]) == 1
    error = capsys.readouterr().err
    assert "kernel': is already a Quantized, which bits=8 would round a second time" in error
    assert not (tmp_path / "again").exists()
