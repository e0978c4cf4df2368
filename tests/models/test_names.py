"""Both ways between checkpoints and trees, and what is said of checkpoints that do not fit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxweights.models import (
    LlamaConfig,
    checkpoint_from_params,
    config_from_dict,
    param_shapes,
    params_from_checkpoint,
)
from jaxweights.models._convert import name_map
from tests.models._cases import CASES, draw_tensors

CONVENTIONS = ("huggingface", "gguf")


def checkpoint(name, convention="huggingface", dtype=np.float32):
    names = name_map(config_from_dict(CASES[name]), convention)
    shapes = {
        names.written_name(canonical): rule.checkpoint_shape
        for canonical, (rule, _) in names.expected().items()
    }
    return {key: value.astype(dtype) for key, value in draw_tensors(shapes).items()}


def flat(tree, path=()):
    if isinstance(tree, dict):
        return {k: v for key, node in tree.items() for k, v in flat(node, (*path, key)).items()}
    return {"/".join(path): tree}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == np.ascontiguousarray(b[key]).tobytes(), key


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(name, convention, dtype):
    config = config_from_dict(CASES[name])
    tensors = checkpoint(name, convention, dtype)
    params = params_from_checkpoint(tensors, config)
    same_bits(checkpoint_from_params(params, config, convention=convention), tensors)
    assert {k: v.shape for k, v in flat(params).items()} == param_shapes(config)


@pytest.mark.parametrize("name", CASES)
def test_parameters_come_back_bit_for_bit_through_either_convention(name):
    config = config_from_dict(CASES[name])
    params = flat(params_from_checkpoint(checkpoint(name), config))
    for convention in CONVENTIONS:
        written = checkpoint_from_params(
            params_from_checkpoint(checkpoint(name), config), config, convention=convention
        )
        same_bits(flat(params_from_checkpoint(written, config)), params)


def test_kernels_are_transposed_and_stacked_by_layer():
    config = config_from_dict(CASES["llama3"])
    tensors = checkpoint("llama3")
    params = params_from_checkpoint(tensors, config)
    for layer in range(3):
        np.testing.assert_array_equal(
            params["layers"]["attn"]["k"]["kernel"][layer],
            tensors[f"model.layers.{layer}.self_attn.k_proj.weight"].T,
        )
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].T)


@pytest.mark.parametrize("name", ["llama3", "llama_biases", "mistral"])
def test_gguf_stores_rotary_pairs_side_by_side(name):
    config = config_from_dict(CASES[name])
    params = params_from_checkpoint(checkpoint(name), config)
    gguf = checkpoint_from_params(params, config, convention="gguf")
    half = config.head_dim // 2
    for short, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        kernel = params["layers"]["attn"][short]["kernel"][1]
        for head in range(heads):
            for pair in range(half):
                start = head * config.head_dim
                rows = gguf[f"blk.1.attn_{short}.weight"]
                np.testing.assert_array_equal(rows[start + 2 * pair], kernel[:, start + pair])
                np.testing.assert_array_equal(
                    rows[start + 2 * pair + 1], kernel[:, start + pair + half]
                )
    np.testing.assert_array_equal(
        gguf["blk.1.attn_v.weight"], params["layers"]["attn"]["v"]["kernel"][1].T
    )


def test_gguf_keeps_the_order_of_families_that_rotate_halves():
    config = config_from_dict(CASES["qwen2"])
    params = params_from_checkpoint(checkpoint("qwen2"), config)
    gguf = checkpoint_from_params(params, config, convention="gguf")
    np.testing.assert_array_equal(
        gguf["blk.0.attn_q.weight"], params["layers"]["attn"]["q"]["kernel"][0].T
    )
    np.testing.assert_array_equal(
        gguf["blk.0.attn_q.bias"], params["layers"]["attn"]["q"]["bias"][0]
    )


@pytest.mark.parametrize("name", CASES)
def test_gguf_names_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    config = config_from_dict(CASES[name])
    family = getattr(config, "family", "bert")
    arch = getattr(gguf.MODEL_ARCH, "LLAMA" if family == "mistral" else family.upper())
    theirs = gguf.get_tensor_name_map(arch, config.num_layers)
    ours = name_map(config, "gguf")
    for rule, hf in zip(ours.rules, name_map(config, "huggingface").rules, strict=True):
        assert rule.path == hf.path
        hf_name = name_map(config, "huggingface").written_name(hf.name.format(layer=1))
        stem, suffix = hf_name.rsplit(".", 1)
        assert f"{theirs.get_name(stem)}.{suffix}" == rule.name.format(layer=1)


@pytest.mark.parametrize("name, prefix", [("llama2", "model."), ("bert", "bert.")])
def test_a_prefix_that_some_checkpoints_write_does_not_matter(name, prefix):
    config = config_from_dict(CASES[name])
    tensors = checkpoint(name)
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    full = {key if key == "lm_head.weight" else prefix + key: value for key, value in bare.items()}
    wanted = flat(params_from_checkpoint(tensors, config))
    same_bits(flat(params_from_checkpoint(bare, config)), wanted)
    same_bits(flat(params_from_checkpoint(full, config)), wanted)


def test_a_tensor_that_is_there_with_and_without_the_prefix_is_refused():
    tensors = checkpoint("bert")
    tensors["bert.embeddings.LayerNorm.bias"] = tensors["embeddings.LayerNorm.bias"]
    with pytest.raises(
        ValueError, match=r"are the same tensor with and without the prefix 'bert.'"
    ):
        params_from_checkpoint(tensors, config_from_dict(CASES["bert"]))


def test_buffers_and_the_pooler_are_let_through():
    tensors = checkpoint("bert")
    tensors["embeddings.position_ids"] = np.arange(64)[None]
    tensors["pooler.dense.weight"] = np.ones((24, 24), np.float32)
    params_from_checkpoint(tensors, config_from_dict(CASES["bert"]))
    tensors = checkpoint("llama2")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    params_from_checkpoint(tensors, config_from_dict(CASES["llama2"]))


def test_a_tied_head_may_be_repeated_but_not_differ():
    config = config_from_dict(CASES["smollm2"])
    tensors = checkpoint("smollm2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    params = params_from_checkpoint(tensors, config)
    assert "head" not in params
    assert "lm_head.weight" not in checkpoint_from_params(params, config)
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from the embedding"):
        params_from_checkpoint(tensors, config)


def test_every_way_in_which_a_checkpoint_does_not_fit_is_in_one_message():
    tensors = checkpoint("llama3")
    tensors["model.layers.1.self_attn.qproj.weight"] = tensors.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )
    tensors["model.norm.weight"] = np.ones(23, np.float32)
    for key in [key for key in tensors if key.startswith("model.layers.2.")]:
        tensors[key.replace("layers.2.", "layers.7.")] = tensors.pop(key)
    with pytest.raises(ValueError) as error:
        params_from_checkpoint(tensors, config_from_dict(CASES["llama3"]))
    lines = str(error.value).splitlines()
    asker = "models.params_from_checkpoint: "
    assert lines == [
        asker + "layer 2 is missing: none of its 9 tensors is there.",
        asker + "'model.layers.1.self_attn.q_proj.weight' is missing, shape (64, 24). "
        "Nearest names: 'model.layers.1.self_attn.qproj.weight'.",
        asker + "layer 7 is unexpected (9 tensors): the config has 3 layers.",
        asker + "'model.layers.1.self_attn.qproj.weight' is unexpected. "
        "Nearest names: 'model.layers.1.self_attn.q_proj.weight'.",
        asker + "'model.norm.weight' has shape (23,), expected (24,).",
    ]


def test_layers_of_several_dtypes_are_held_by_one_that_loses_nothing():
    config = config_from_dict(CASES["llama2"])
    tensors = checkpoint("llama2", dtype=ml_dtypes.bfloat16)
    name = "model.layers.{}.mlp.up_proj.weight"
    tensors[name.format(1)] = tensors[name.format(1)].astype(np.float16)
    params = params_from_checkpoint(tensors, config)
    stacked = params["layers"]["mlp"]["up"]["kernel"]
    assert stacked.dtype == np.float32
    for layer in range(3):
        np.testing.assert_array_equal(
            stacked[layer], tensors[name.format(layer)].T.astype(np.float32)
        )


def test_lazy_tensors_are_read_once_and_refused_unread_when_misshapen():
    class Lazy:
        def __init__(self, array, shape=None):
            self.array, self.reads = array, 0
            self.shape = array.shape if shape is None else shape

        def read(self):
            self.reads += 1
            return self.array

    config = config_from_dict(CASES["bert"])
    tensors = {key: Lazy(value) for key, value in checkpoint("bert").items()}
    params_from_checkpoint(tensors, config)
    assert {tensor.reads for tensor in tensors.values()} == {1}
    bad = {key: Lazy(value, shape=(1,)) for key, value in checkpoint("bert").items()}
    with pytest.raises(ValueError, match=r"has shape \(1,\), expected"):
        params_from_checkpoint(bad, config)
    assert {tensor.reads for tensor in bad.values()} == {0}


def test_a_tree_that_does_not_fit_is_refused_with_all_its_leaves():
    config = config_from_dict(CASES["llama2"])
    params = params_from_checkpoint(checkpoint("llama2"), config)
    del params["final_norm"]
    params["layers"]["mlp"]["upp"] = params["layers"]["mlp"].pop("up")
    params["embed"]["embedding"] = params["embed"]["embedding"][:, :-1]
    with pytest.raises(ValueError) as error:
        checkpoint_from_params(params, config)
    message = str(error.value)
    assert "'final_norm/scale' is missing, shape (24,)." in message
    assert "'layers/mlp/up/kernel' is missing, shape (3, 24, 40). Nearest names: " in message
    assert "'layers/mlp/upp/kernel' is unexpected. Nearest names: " in message
    assert "'embed/embedding' has shape (61, 23), expected (61, 24)." in message


def test_a_represented_weight_is_not_written_as_if_it_were_dense():
    import jax.numpy as jnp

    from jaxweights.weights import LowRank

    config = config_from_dict(CASES["llama2"])
    params = params_from_checkpoint(checkpoint("llama2"), config)
    kernel = jnp.asarray(params["head"]["kernel"])
    params["head"]["kernel"] = LowRank.over(kernel, jnp.ones((24, 1)), jnp.ones((1, 61)))
    with pytest.raises(TypeError, match=r"'head/kernel' is a LowRank, not an array.*materialize"):
        checkpoint_from_params(params, config)


def test_an_unknown_convention_is_refused():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1
    )
    with pytest.raises(ValueError, match="convention='torch' must be 'huggingface' or 'gguf'"):
        params_from_checkpoint({}, config, convention="torch")  # type: ignore[arg-type]
