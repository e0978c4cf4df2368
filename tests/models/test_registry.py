"""Configs of checkpoints: every entry is used, harmless, or refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxweights.models import (
    Bert,
    BertConfig,
    Llama,
    LlamaConfig,
    RopeScaling,
    build,
    config_from_dict,
    config_from_gguf,
    config_to_dict,
)
from jaxweights.models._rope import rope_frequencies
from tests.models._cases import CASES

SMALL = dict(vocab_size=16, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4)
GGUF = {
    "general.architecture": "llama",
    "general.name": "anything",
    "tokenizer.ggml.model": "gpt2",
    "llama.vocab_size": 16,
    "llama.block_count": 3,
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 40,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 6,
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_survives_its_json(name):
    config = config_from_dict(CASES[name])
    assert config_from_dict(config_to_dict(config)) == config
    assert isinstance(build(config), Bert if name == "bert" else Llama)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_our_json_as_it_reads_its_own(name):
    transformers = pytest.importorskip("transformers")

    def read(values):
        values = dict(values)
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        return config_from_dict(config.to_dict())

    config = config_from_dict(CASES[name])
    assert read(config_to_dict(config)) == config


def test_each_family_has_its_own_features():
    read = {name: config_from_dict(CASES[name]) for name in CASES}
    assert read["qwen2"].qkv_bias and not read["qwen2"].out_bias
    assert read["llama_biases"].qkv_bias and read["llama_biases"].out_bias
    assert read["llama_biases"].mlp_bias and not read["llama2"].mlp_bias
    assert read["olmo2"].qk_norm == "whole" and read["olmo2"].norm_position == "post"
    assert read["qwen3"].qk_norm == "head" and not read["qwen3"].qkv_bias
    assert read["qwen3_biases"].out_bias and read["qwen3_biases"].sliding_layers
    assert read["olmo2"].norm_eps == 1e-5 and read["qwen2"].norm_eps == 1e-6
    assert read["mistral"].sliding_window == 4 and read["mistral"].sliding_layers is None
    assert read["qwen2"].sliding_window is None
    assert read["qwen2_sliding"].sliding_layers == (False, False, True)
    assert read["llama3"].head_dim == 16 and read["llama2"].head_dim == 6


def test_a_null_window_of_mistral_is_none_and_an_absent_one_is_its_default():
    values = dict(CASES["mistral"])
    assert config_from_dict(values | {"sliding_window": None}).sliding_window is None
    del values["sliding_window"]
    assert config_from_dict(values).sliding_window == 4096


def test_null_key_heads_are_as_many_as_query_heads_and_absent_ones_the_familys_default():
    values = CASES["mistral"] | {"num_attention_heads": 16, "head_dim": 8}
    assert config_from_dict(values | {"num_key_value_heads": None}).num_kv_heads == 16
    del values["num_key_value_heads"]
    assert config_from_dict(values).num_kv_heads == 8


def test_the_architecture_can_be_read_off_the_class_name():
    values = {k: v for k, v in CASES["qwen2"].items() if k != "model_type"}
    config = config_from_dict(values | {"architectures": ["Qwen2ForCausalLM"]})
    assert config.family == "qwen2"


def test_rope_is_read_in_its_old_and_its_new_place():
    old = CASES["llama3"]
    rope = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    new = {k: v for k, v in old.items() if not k.startswith("rope")} | {"rope_parameters": rope}
    assert config_from_dict(new) == config_from_dict(old)
    plain = {k: v for k, v in new.items() if k != "rope_parameters"}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    assert config_from_dict(plain).rope_scaling is None
    assert config_from_dict(plain).rope_theta == 7.0


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llama2", {"model_type": "gemma"}, "architecture 'gemma' is unknown. Known: bert, llama"),
        ("llama2", {"model_type": "qwen4"}, "architecture 'qwen4' is unknown.*Nearest: qwen"),
        ("llama2", {"model_type": None}, "names no architecture"),
        ("llama2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'.*Supported: 'silu', 'swish'"),
        ("bert", {"hidden_act": "gelu_new"}, "'hidden_act' is 'gelu_new'.*Supported: 'gelu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type' is"),
        ("bert", {"is_decoder": True}, "'is_decoder' is True, which is not supported"),
        ("llama2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_type' is 'yarn'"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "is 'dynamic'"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "rope: .*'factor' is missing"),
        (
            "llama2",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
            "rope: .*'mscale' is set to 1.0",
        ),
        ("llama2", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at"),
        ("llama2", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ("llama2", {"clip_qkv": 8.0}, "'clip_qkv' is set to 8.0, which is not supported"),
        ("llama2", {"sliding_window": 8}, "'sliding_window' is set to 8"),
        ("llama2", {"quantization_config": {"bits": 4}}, "'quantization_config' is set to"),
        ("llama2", {"vocab_size": None}, "'vocab_size' is missing"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' is"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "no 'sliding_window' in use"),
        ("llama2", {"hidden_size": 25}, "hidden_size=25 is not a multiple of num_heads=4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, change, words):
    with pytest.raises(ValueError, match=words):
        config_from_dict(CASES[name] | change)


def test_every_entry_that_is_not_supported_is_in_one_message():
    with pytest.raises(ValueError) as error:
        config_from_dict(CASES["llama2"] | {"clip_qkv": 8.0, "hidden_act": "relu", "foo": 1})
    assert len(str(error.value).splitlines()) == 3


def test_a_config_that_its_family_cannot_say_is_not_written():
    config = LlamaConfig(**SMALL, qk_norm="whole")
    with pytest.raises(
        ValueError, match=r"qk_norm='whole' cannot be said in the config.json of 'll"
    ):
        config_to_dict(config)


def test_gguf_metadata_give_the_config():
    assert config_from_gguf(GGUF) == LlamaConfig(
        **SMALL,
        num_kv_heads=2,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_positions=64,
        tie_embeddings=True,
    )


def test_gguf_says_by_its_tensors_what_its_metadata_leave_out():
    bias = np.zeros(24, np.float32)
    tensors = {
        "output.weight": np.zeros((16, 24)),
        "blk.0.attn_q.bias": bias,
        "rope_freqs.weight": np.array([1.0, 2.0, 4.0], np.float32),
    }
    config = config_from_gguf(GGUF, tensors)
    assert not config.tie_embeddings and config.qkv_bias and not config.out_bias
    assert config.rope_scaling == RopeScaling("factors", factors=(1.0, 2.0, 4.0))
    assert config_from_dict(config_to_dict(dataclasses.replace(config, qkv_bias=False))) == (
        dataclasses.replace(config, qkv_bias=False)
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_divisors_of_the_llama_releases_are_recognised(factor):
    published = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    plain, scaled = (rope_frequencies(128, 500000.0, s) for s in (None, published))
    metadata = GGUF | {
        "llama.embedding_length": 512,
        "llama.rope.dimension_count": 128,
        "llama.attention.key_length": 128,
    }
    assert config_from_gguf(metadata, {"rope_freqs.weight": plain / scaled}).rope_scaling == (
        published
    )


@pytest.mark.parametrize(
    "family, qk_norm", [("qwen2", None), ("qwen3", "head"), ("olmo2", "whole")]
)
def test_gguf_of_other_families_is_read_under_their_own_keys(family, qk_norm):
    metadata = {key.replace("llama.", f"{family}."): value for key, value in GGUF.items()}
    config = config_from_gguf(metadata | {"general.architecture": family})
    assert config.family == family
    assert config.qkv_bias == (family == "qwen2") and config.qk_norm == qk_norm


def test_gguf_of_bert_is_read():
    metadata = {
        "general.architecture": "bert",
        "bert.vocab_size": 16,
        "bert.block_count": 3,
        "bert.context_length": 64,
        "bert.embedding_length": 24,
        "bert.feed_forward_length": 40,
        "bert.attention.head_count": 4,
        "bert.attention.layer_norm_epsilon": float(np.float32(1e-12)),
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.token_type_count": 2,
    }
    assert config_from_gguf(metadata) == BertConfig(**SMALL, max_positions=64)
    with pytest.raises(ValueError, match=r"'bert.attention.causal' is True"):
        config_from_gguf(metadata | {"bert.attention.causal": True})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"general.architecture": "falcon"}, "architecture 'falcon' is unknown. Known: bert"),
        ({"llama.expert_count": 8}, "'llama.expert_count' is 8, which is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "'rope.scaling.type' is 'yarn'"),
        ({"llama.rope.dimension_count": 3}, "'llama.rope.dimension_count' is 3"),
        ({"llama.logit_scale": 2.0}, "'llama.logit_scale' is set to 2.0"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
    ],
)
def test_gguf_metadata_that_are_not_supported_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        config_from_gguf(GGUF | change)


def test_linear_scaling_is_read_from_gguf():
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert config_from_gguf(GGUF | linear).rope_scaling == RopeScaling("linear", factor=4.0)


def test_only_a_known_config_builds_a_model():
    with pytest.raises(TypeError, match=r"models.build: config is a dict"):
        build({})  # type: ignore[arg-type]
