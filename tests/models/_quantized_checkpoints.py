"""Released checkpoints with quantized weights, made by hand, and what is asked of them."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw
from jaxweights.checkpoint import open_safetensors
from jaxweights.models import load_pretrained
from tests.checkpoint.exchange._oracles import awq_words, stream_along, stream_down

HIDDEN, INNER, VOCAB, GROUP, LAYERS = 128, 256, 96, 128, 2


LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "transformers_version": "4.41.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


# As in the released Qwen2.5-0.5B-Instruct-GPTQ-Int4.
GPTQ = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "damp_percent": 0.01,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": GROUP,
    "max_input_length": None,
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
    "pad_token_id": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}


def linear(rng, in_dim, out_dim, *, symmetric):
    codes = rng.integers(0, 16, (in_dim, out_dim))
    scales = (rng.uniform(0.5, 1.5, (in_dim // GROUP, out_dim)) / 50).astype(np.float16)
    zero = np.full(scales.shape, 8) if symmetric else rng.integers(1, 16, scales.shape)
    return codes, scales, zero


def common(rng):
    half = lambda *shape: (rng.normal(size=shape) * 0.1).astype(np.float16)  # noqa: E731
    tensors = {"model.embed_tokens.weight": half(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + half(HIDDEN)
    return tensors | {"model.norm.weight": 1 + half(HIDDEN)}


def released(method, *, symmetric=True):
    """Tensors of a released folder, and the dense matrices `(in, out)` that they stand for."""
    rng = np.random.default_rng(0)
    tensors, dense = common(rng), {}
    for layer in range(LAYERS):
        for name, (in_dim, out_dim) in LINEARS.items():
            stem = f"model.layers.{layer}.{name}"
            codes, scales, zero = linear(rng, in_dim, out_dim, symmetric=symmetric)
            rows = np.arange(in_dim) // GROUP
            dense[stem] = (codes - zero[rows]).astype(np.float32) * scales[rows].astype(np.float32)
            if method == "gptq":
                tensors[f"{stem}.qweight"] = stream_down(codes, 4)
                tensors[f"{stem}.qzeros"] = stream_along(zero - 1, 4)
                tensors[f"{stem}.g_idx"] = rows.astype(np.int32)
            else:
                tensors[f"{stem}.qweight"] = awq_words(codes)
                tensors[f"{stem}.qzeros"] = awq_words(zero)
            tensors[f"{stem}.scales"] = scales
            # Only q, k and v have biases; AutoGPTQ writes zeros for the others.
            real = name[-6:] in ("q_proj", "k_proj", "v_proj")
            if real or method == "gptq":
                bias = rng.normal(size=out_dim) * 0.1 if real else np.zeros(out_dim)
                tensors[f"{stem}.bias"] = bias.astype(np.float16)
    return tensors, dense


def same_tensors(folder, tensors):
    reader = open_safetensors(folder)
    assert set(reader) == set(tensors)
    for name, array in tensors.items():
        got = reader.read(name)
        assert got.dtype == array.dtype and got.shape == array.shape, name
        assert got.tobytes() == array.tobytes(), name


def kernels(params):
    return {p: x for p, x in jw.core.flatten(params)[0].items() if p.endswith("kernel")}


def logits(pretrained, params):
    tokens = jnp.arange(10).reshape(2, 5)
    run = jw.lift(lambda params: pretrained.model.apply({"params": params}, tokens))
    return jax.jit(run)(params)


def again(folder, pretrained, params, **settings):
    from jaxweights.recipes._write import write_checkpoint

    write_checkpoint(folder, settings.pop("form"), pretrained, params, **settings)
    return load_pretrained(folder)


def rounded(pretrained, **settings):
    tokens = jnp.zeros((1, 4), jnp.int32)
    run = lambda p, t: pretrained.model.apply({"params": p}, t)  # noqa: E731
    layout = jw.infer_layout(run, pretrained.params, tokens)
    rules = settings.pop("rules", None) or [
        ("layers/.*/kernel", jw.quantize.round_to_nearest(**settings))
    ]
    return jw.apply(jw.partition(*rules, (".*", jw.identity())), pretrained.params, layout=layout)
