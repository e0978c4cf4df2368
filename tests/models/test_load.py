"""Whole models from files of every format."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import save_tree, write_safetensors
from jaxweights.models import (
    Bert,
    config_from_dict,
    config_to_dict,
    load_pretrained,
    load_tokenizer,
)
from tests.models._cases import CASES, inputs
from tests.models.test_llama import case
from tests.models.test_names import checkpoint, flat, same_bits
from tests.models.test_tokenizer import metadata as tokenizer_metadata


def as_numpy(tree):
    return {path: np.asarray(leaf) for path, leaf in flat(tree).items()}


def test_a_folder_of_safetensors_gives_the_model_its_parameters_and_what_it_does_not_use(tmp_path):
    tensors = checkpoint("bert") | {"pooler.dense.bias": np.ones(24, np.float32)}
    files = {"config.json": json.dumps(CASES["bert"])}
    write_safetensors(tmp_path / "model", tensors, files=files)
    loaded = load_pretrained(tmp_path / "model")
    assert isinstance(loaded.model, Bert) and loaded.config == case("bert")[0].config
    same_bits(as_numpy(loaded.params), as_numpy(case("bert")[1]))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert list(loaded.carried) == ["pooler.dense.bias"]
    assert loaded.tokenizer_path is None and loaded.source.format == "safetensors"
    with pytest.raises(FileNotFoundError, match="came without a tokenizer"):
        load_tokenizer(loaded)


def test_parameters_are_cast_when_asked(tmp_path):
    files = {"config.json": json.dumps(CASES["llama3"])}
    write_safetensors(tmp_path / "model", checkpoint("llama3"), files=files)
    loaded = load_pretrained(tmp_path / "model", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}


def test_an_orbax_checkpoint_gives_back_represented_weights(tmp_path):
    from jaxweights.lift import lift
    from jaxweights.weights import LowRank

    model, params = case("llama2")
    head = LowRank.over(params["head"]["kernel"], jnp.ones((24, 2)), jnp.ones((2, 61)))
    params = params | {"head": {"kernel": head}}
    save_tree(tmp_path / "model", params, config=config_to_dict(model.config))
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert isinstance(loaded.params["head"]["kernel"], LowRank)
    tokens = inputs()["tokens"]
    apply = jax.jit(lambda p: lift(model.apply)({"params": p}, tokens))
    np.testing.assert_array_equal(apply(loaded.params), apply(params))


def test_an_orbax_checkpoint_that_a_stream_made_is_the_same_model(tmp_path):
    from jaxweights.merge import task_arithmetic
    from jaxweights.stream import transform_checkpoint

    tensors = checkpoint("bert") | {"pooler.dense.bias": np.ones(24, np.float32)}
    model = tmp_path / "model"
    write_safetensors(model, tensors, files={"config.json": json.dumps(CASES["bert"])})
    copy = task_arithmetic(weights=[0.0])
    transform_checkpoint(copy, model, tmp_path / "out", models=[model], format="orbax")
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.source.format == "orbax"
    same_bits(as_numpy(loaded.params), as_numpy(case("bert")[1]))
    assert list(loaded.carried) == ["pooler.dense.bias"]


def test_an_orbax_checkpoint_of_another_model_is_refused(tmp_path):
    _, params = case("llama2")
    config = config_from_dict(CASES["llama_biases"])
    save_tree(tmp_path / "model", params, config=config_to_dict(config))
    with pytest.raises(ValueError, match="'layers/attn/q/bias' is missing") as error:
        load_pretrained(tmp_path / "model")
    assert r"'layers/attn/k/kernel' has shape (3, 24, 24), expected (3, 24, 6)" in str(error.value)


def test_a_gguf_file_gives_the_model_that_was_written_into_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    config = case("smollm2")[0].config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in checkpoint("smollm2", "gguf").items():
        writer.add_tensor(name, tensor)
    for key, value in tokenizer_metadata().items():
        add = writer.add_array if isinstance(value, list) else writer.add_string
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    loaded = load_pretrained(path)
    assert loaded.config == config
    from jaxweights.models import params_from_checkpoint

    wanted = params_from_checkpoint(checkpoint("smollm2", "gguf"), config)
    same_bits(as_numpy(loaded.params), flat(wanted))
    assert loaded.tokenizer_path == path and not loaded.carried
    assert (
        load_tokenizer(loaded).decode(load_tokenizer(path).encode("a bad cab").ids) == "a bad cab"
    )


def test_weights_without_a_config_are_refused(tmp_path):
    write_safetensors(tmp_path / "model", checkpoint("bert"))
    with pytest.raises(ValueError, match=r"has no config.json. Put the model's beside the weights"):
        load_pretrained(tmp_path / "model")


def test_a_config_with_another_number_of_layers_is_refused(tmp_path):
    files = {"config.json": json.dumps(CASES["llama3"] | {"num_hidden_layers": 4})}
    write_safetensors(tmp_path / "model", checkpoint("llama3"), files=files)
    with pytest.raises(ValueError, match="layer 3 is missing: none of its 9 tensors is there"):
        load_pretrained(tmp_path / "model")
