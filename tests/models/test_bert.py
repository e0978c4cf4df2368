"""The encoder and its sentence embeddings; `test_llama.py` compares it with transformers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.models import Bert, BertConfig, sentence_embedding
from tests.models._cases import TIME, VOCAB, inputs
from tests.models.test_llama import case, cast, jitted


def test_padding_changes_no_real_token_and_no_embedding():
    model, params = case("bert")
    tokens = inputs()["tokens"]
    padded = np.concatenate([tokens, np.full((2, 5), 3, np.int32)], axis=1)
    mask = np.concatenate([np.ones((2, TIME), np.int32), np.zeros((2, 5), np.int32)], axis=1)
    hidden = jitted(model)(params, tokens)
    with_padding = jitted(model)(params, padded, attention_mask=mask)
    # Values of order 1 after a norm; sums in another order.
    np.testing.assert_allclose(with_padding[:, :TIME], hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        sentence_embedding(with_padding, mask), sentence_embedding(hidden), atol=1e-5
    )
    assert np.abs(sentence_embedding(with_padding) - sentence_embedding(hidden)).max() > 1e-2


def test_later_tokens_positions_and_types_all_count():
    model, params = case("bert")
    tokens = inputs()["tokens"]
    hidden = jitted(model)(params, tokens)
    changed = np.concatenate([tokens[:, :-1], (tokens[:, -1:] + 1) % VOCAB], axis=1)
    shifted = np.broadcast_to(np.arange(1, TIME + 1, dtype=np.int32), tokens.shape)
    for other in (
        jitted(model)(params, changed),
        jitted(model)(params, tokens, positions=shifted),
        jitted(model)(params, tokens, token_types=np.ones_like(tokens)),
    ):
        assert np.abs(other[:, 0] - hidden[:, 0]).max() > 1e-2


def test_a_sentence_embedding_is_the_normalised_mean_of_its_tokens():
    hidden = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    got = sentence_embedding(jnp.asarray(hidden), mask)
    for row in range(2):
        mean = hidden[row][mask[row] == 1].mean(axis=0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[2], np.zeros(5))
    grads = jax.grad(lambda h: sentence_embedding(h, mask).sum())(jnp.asarray(hidden))
    assert np.isfinite(grads).all()


def test_what_padding_holds_never_reaches_an_embedding_not_even_nan():
    hidden = jnp.ones((1, 3, 2)).at[0, 2].set(jnp.nan)
    assert np.isfinite(sentence_embedding(hidden, np.array([[1, 1, 0]]))).all()


def test_bfloat16_parameters_give_bfloat16_encodings_within_their_precision():
    model, params = case("bert")
    narrow = cast(params, jnp.bfloat16)
    tokens = inputs()["tokens"]
    hidden = jitted(model)(narrow, tokens)
    wide = jitted(model)(cast(narrow, jnp.float32), tokens)
    assert hidden.dtype == jnp.bfloat16
    difference = np.abs(hidden.astype(jnp.float32) - wide)
    # 2^-8 a rounding, some 20 roundings one after another through 3 layers.
    assert 0 < difference.max() < 0.08 * np.abs(wide).max()


def test_sixty_four_layers_compile_to_the_program_of_two():
    def program(num_layers):
        config = BertConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=num_layers, num_heads=2
        )
        model, tokens = Bert(config), jnp.zeros((1, 4), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        return jitted(model).lower(params, tokens).as_text()

    assert len(program(2).splitlines()) == len(program(64).splitlines())


def test_a_text_longer_than_the_position_table_is_refused():
    model, params = case("bert")
    with pytest.raises(ValueError, match="65 tokens in a row exceed max_positions=64"):
        model.apply({"params": params}, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match=r"models.Bert: tokens have shape \(3,\)"):
        model.apply({"params": params}, jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_heads": 5}, "hidden_size=24 is not a multiple of num_heads=5"),
        ({"type_vocab_size": 0}, "type_vocab_size=0 must be at least 1"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be at least 0.0"),
    ],
)
def test_an_impossible_config_is_refused_by_field(change, words):
    config = case("bert")[0].config
    with pytest.raises(ValueError, match=f"models.BertConfig: {words}"):
        dataclasses.replace(config, **change)
