"""GGUF from parameters: the gguf package and this library read what was written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_gguf, write_gguf
from jaxweights.models import (
    LlamaConfig,
    RopeScaling,
    build,
    config_from_gguf,
    export_checkpoint,
    load_pretrained,
    load_tokenizer,
)
from jaxweights.weights import Quantized, materialize
from tests._tiny_models import BERT, byte_tokenizer

CONFIG = LlamaConfig(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
TOKENS = jnp.arange(10).reshape(2, 5)


def run(config):
    return lambda params, tokens: build(config).apply({"params": params}, tokens)


def model(config=CONFIG):
    return build(config).init(jax.random.key(0), TOKENS)["params"]


def rounded(*rules, config=CONFIG):
    params = model(config)
    layout = jw.infer_layout(run(config), params, TOKENS)
    return jw.apply(jw.partition(*rules, (".*", jw.identity())), params, layout=layout)


rtn = jw.quantize.round_to_nearest
MIXED = (
    ("layers/attn/[qk]/kernel", rtn(bits=4, group_size=32, scale_dtype=jnp.float16)),
    ("layers/attn/[vo]/kernel", rtn(bits=4, group_size=64, grid="affine", scale_dtype="float16")),
    ("layers/mlp/up/kernel", rtn(bits=3, scale_dtype=jnp.float16)),
    ("layers/mlp/.*/kernel", rtn(bits=8, group_size=32, scale_dtype=jnp.float16)),
    ("embed/embedding", rtn(bits=8, group_size=32, scale_dtype=jnp.float16)),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    params = rounded(*MIXED)
    export_checkpoint(file, params, CONFIG, form="gguf")
    return file, params


def test_each_leaf_gets_the_narrowest_block_type_that_holds_it(written):
    reader = open_gguf(written[0])
    kinds = {
        "blk.0.attn_q": "Q4_0",
        "blk.1.attn_output": "Q5_0",  # sixteen codes on both sides of a zero point
        "blk.0.ffn_up": "Q4_0",
        "blk.1.ffn_down": "Q8_0",
        "token_embd": "Q8_0",
        "blk.0.attn_norm": "F32",
    }
    assert {n: reader[f"{n}.weight"].block_type.name for n in kinds} == kinds
    assert reader.metadata["general.file_type"] == 7


def test_what_is_read_back_is_the_same_number_for_number(written):
    file, params = written
    for settings in ({}, {"dequantize": False}):
        got = load_pretrained(file, **settings)
        want = jw.core.flatten(materialize(params))[0]
        for path, leaf in jw.core.flatten(materialize(got.params))[0].items():
            np.testing.assert_array_equal(leaf, want[path], err_msg=path)
        assert got.config == CONFIG


def test_integers_stay_integers_where_that_is_asked_for(written):
    file, params = written
    got = load_pretrained(file, dequantize=False)
    leaves = jw.core.flatten(got.params)[0]
    assert isinstance(leaves["embed/embedding"], Quantized)
    assert isinstance(leaves["layers/attn/q/kernel"], Quantized)
    logits = jax.jit(jw.lift(run(CONFIG)))(got.params, TOKENS)
    want = run(CONFIG)(materialize(params), TOKENS)
    assert float(jnp.std(want)) > 0.1
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


def test_the_gguf_package_reads_the_same_numbers(written):
    gguf = pytest.importorskip("gguf")
    file, params = written
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    up = theirs["blk.1.ffn_up.weight"]
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    np.testing.assert_array_equal(
        values.T, params["layers"]["mlp"]["up"]["kernel"].materialize()[1]
    )
    table = theirs["token_embd.weight"]
    values = gguf.quants.dequantize(table.data, table.tensor_type)
    np.testing.assert_array_equal(values, params["embed"]["embedding"].materialize())
    assert tuple(table.shape) == (64, 264)


def test_a_file_that_is_read_as_integers_is_written_as_the_same_blocks(written, tmp_path):
    file, _ = written
    loaded = load_pretrained(file, dequantize=False)
    export_checkpoint(
        tmp_path / "again.gguf",
        loaded.params,
        loaded.config,
        form="gguf",
        metadata=loaded.source.metadata,
    )
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def affine_blocks(bits):
    """A weight with offsets, as Q4_1 and Q5_1 hold them."""
    rng = np.random.default_rng(bits)
    half = lambda: jnp.asarray(rng.normal(size=(2, 8)).astype(np.float16))  # noqa: E731
    return Quantized.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (64, 8))), half(), bits=bits, offset=half()
    )


@pytest.mark.parametrize("bits, kind", [(3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_offsets_are_kept(tmp_path, bits, kind):
    weight = affine_blocks(bits)
    write_gguf(tmp_path / "a.gguf", {"w": weight}, {})
    reader = open_gguf(tmp_path / "a.gguf")
    assert reader["w"].block_type.name == kind
    np.testing.assert_array_equal(reader.read("w").T, weight.materialize())


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    "factors": RopeScaling("factors", factors=tuple(float(x) for x in range(1, 9))),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "mistral"])
def test_every_family_comes_back(tmp_path, family):
    qwen, olmo = family == "qwen2", family == "olmo2"
    config = dataclasses.replace(
        CONFIG,
        family=family,
        tie_embeddings=not olmo,
        qkv_bias=qwen,
        qk_norm={"qwen3": "head", "olmo2": "whole"}.get(family),
        norm_position="post" if olmo else "pre",
        sliding_window=16 if family == "mistral" else None,
    )
    params = model(config)
    export_checkpoint(tmp_path / "out", params, config, form="gguf")
    got = load_pretrained(tmp_path / "out")
    assert dataclasses.replace(got.config, family=family) == config
    for path, leaf in jw.core.flatten(params)[0].items():
        np.testing.assert_array_equal(jw.core.flatten(got.params)[0][path], leaf, err_msg=path)


@pytest.mark.parametrize("case", SCALINGS)
def test_rescaled_frequencies_come_back(tmp_path, case):
    config = dataclasses.replace(CONFIG, rope_scaling=SCALINGS[case], num_layers=1)
    export_checkpoint(tmp_path / "m.gguf", model(config), config, form="gguf")
    reader = open_gguf(tmp_path / "m.gguf")
    got = config_from_gguf(reader.metadata, {name: reader.read(name) for name in reader})
    if case == "factors":
        np.testing.assert_allclose(got.rope_scaling.factors, config.rope_scaling.factors, rtol=1e-6)
    else:
        assert got == config


def test_a_tokenizer_becomes_metadata_and_cuts_text_as_before(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = byte_tokenizer(around=False)
    settings = json.dumps({"bos_token": "[CLS]", "add_bos_token": False})
    files = {"tokenizer.json": text, "tokenizer_config.json": settings}
    export_checkpoint(tmp_path / "m.gguf", model(), CONFIG, form="gguf", files=files)
    metadata = open_gguf(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.bos_token_id"]] == "[CLS]"
    want = tokenizers.Tokenizer.from_str(text)
    for sentence in ("hello world 123", "Grüße,\n\n  x"):
        got = load_tokenizer(tmp_path / "m.gguf").encode(sentence).ids
        assert got == want.encode(sentence).ids and len(got) > 3


def test_rows_of_the_embedding_without_a_token_get_unused_ones(tmp_path):
    pytest.importorskip("tokenizers")
    config = dataclasses.replace(CONFIG, vocab_size=320, num_layers=1)
    text = byte_tokenizer(around=False)
    known = len(json.loads(text)["model"]["vocab"])
    files = {"tokenizer.json": text}
    export_checkpoint(tmp_path / "m.gguf", model(config), config, form="gguf", files=files)
    reader = open_gguf(tmp_path / "m.gguf")
    tokens = reader.metadata["tokenizer.ggml.tokens"]
    assert known < len(tokens) == reader["token_embd.weight"].shape[0] == 320
    assert tokens[-1] == "[PAD319]" and reader.metadata["tokenizer.ggml.token_type"][-1] == 5
    assert load_tokenizer(tmp_path / "m.gguf").encode("hello").ids


UNFIT = {
    "group": (rtn(bits=4, group_size=16), "has groups of 16 inputs, but GGUF's blocks have 32"),
    "range": (
        rtn(bits=8, group_size=32, grid="affine"),
        "around its zero points, but Q8_0 holds -128 to 127",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_no_block_type_holds_is_listed_and_nothing_is_written(tmp_path, case):
    rule, words = UNFIT[case]
    params = rounded(("layers/mlp/.*/kernel", rule))
    if case == "range":  # all of one sign, so that zero points lie at an end
        params = jax.tree.map(lambda x: x, params)
        up = params["layers"]["mlp"]["up"]["kernel"]
        params["layers"]["mlp"]["up"]["kernel"] = dataclasses.replace(
            up, zero_point=jnp.zeros_like(up.zero_point), codes=jnp.full_like(up.codes, 255)
        )
    with pytest.raises(ValueError, match=words) as error:
        export_checkpoint(tmp_path / "out", params, CONFIG, form="gguf")
    assert "write_gguf: 'blk.0.ffn_up.weight' has" in str(error.value)
    assert "write_gguf: 'blk.1.ffn_up.weight' has" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bert_and_a_strange_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="written for the Llama family, and this is a BERT"):
        export_checkpoint(tmp_path / "m", {}, BERT, form="gguf")
    files = {"tokenizer.json": json.dumps({"model": {"type": "Unigram"}})}
    with pytest.raises(ValueError, match="the tokenizer is a 'Unigram' of a kind that GGUF"):
        export_checkpoint(tmp_path / "m", model(), CONFIG, form="gguf", files=files)


METADATA = {
    "nested": ([[1], [2]], "a list holds values of one kind"),
    "mixed": ([1, "a"], "a list holds values of one kind"),
    "none": (None, "GGUF has no NoneType"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_gguf_cannot_say_are_refused(tmp_path, case):
    value, words = METADATA[case]
    with pytest.raises(TypeError, match=rf"write_gguf: metadata 'k' is .*{words}"):
        write_gguf(tmp_path / "m.gguf", {}, {"k": value})
    assert not (tmp_path / "m.gguf").exists()


def test_metadata_come_back_with_their_values(tmp_path):
    values = {"a": True, "b": -3, "c": 2**40, "d": 0.5, "e": "ü", "f": ["x", ""], "g": [1, -2]}
    values |= {"h": [], "i": [True, False], "j": [0.25]}
    values |= {"k": -(2**40), "l": [1, 2**40], "m": [-1, 2**31], "n": [3, 2**32 - 1]}
    write_gguf(tmp_path / "m.gguf", {"t": np.arange(6, dtype=np.int32).reshape(2, 3)}, values)
    reader = open_gguf(tmp_path / "m.gguf")
    assert reader.metadata == values
    np.testing.assert_array_equal(reader.read("t"), [[0, 1, 2], [3, 4, 5]])


def test_scales_that_span_outputs_follow_reordered_heads(tmp_path):
    params = model()
    scale = jax.random.uniform(jax.random.key(1), (2, 2, 4), minval=0.1).astype(jnp.float16)
    codes = jax.random.randint(jax.random.key(2), (2, 64, 64), -128, 128)
    kernel = Quantized.from_codes(codes, scale, bits=8)
    params["layers"]["attn"]["q"]["kernel"] = kernel
    export_checkpoint(tmp_path / "m.gguf", params, CONFIG, form="gguf")
    got = load_pretrained(tmp_path / "m.gguf").params["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(got, kernel.materialize())
