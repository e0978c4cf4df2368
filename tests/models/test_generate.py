"""Cached decoding against reading everything again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.models import generate, init_cache
from tests.models._cases import BATCH, DECODERS, TIME, inputs
from tests.models.test_llama import case, cast, jitted

NEW = 6


def uncached_greedy(model, params, tokens, steps):
    """Reads the whole text again for every token."""
    for _ in range(steps):
        padded = np.pad(tokens, ((0, 0), (0, TIME + NEW - tokens.shape[1])))
        logits = jitted(model)(params, padded)[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None].astype(np.int32)], 1)
    return tokens


@pytest.mark.parametrize("name", DECODERS)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_reading_at_once(name):
    model, params = case(name)
    given = inputs()
    tokens, mask = given["tokens"], given["attention_mask"]
    cache = init_cache(model.config, BATCH, TIME + 2)
    pieces = []
    for start in (0, 4, 8):
        piece = slice(start, start + 4)
        logits, cache = jitted(model)(
            params, tokens[:, piece], attention_mask=mask[:, piece], cache=cache
        )
        pieces.append(logits)
    whole = jitted(model)(params, tokens, attention_mask=mask)
    real = mask == 1
    # Other shapes, other order of summing: a few roundings of logits of order 10.
    np.testing.assert_allclose(
        np.concatenate(pieces, 1)[real], np.asarray(whole)[real], rtol=1e-4, atol=1e-4
    )
    assert int(cache.length) == TIME


@pytest.mark.parametrize("name", ["llama3", "mistral", "olmo2"])
def test_greedy_generation_equals_greedy_reading_of_everything_again(name):
    model, params = case(name)
    tokens = inputs()["tokens"]
    new = generate(model, params, tokens, max_new_tokens=NEW)
    np.testing.assert_array_equal(new, uncached_greedy(model, params, tokens, NEW)[:, TIME:])
    assert new.dtype == jnp.int32


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_continue_as_they_do_alone(side):
    model, params = case("mistral")
    tokens = inputs()["tokens"]
    short, pad = tokens[1, :7], np.zeros(TIME - 7, np.int32)
    order = [pad, short] if side == "left" else [short, pad]
    batch = np.stack([tokens[0], np.concatenate(order)])
    marks = [np.full(len(part), part is short) for part in order]
    mask = np.stack([np.ones(TIME, bool), np.concatenate(marks)])
    new = generate(model, params, batch, max_new_tokens=NEW, attention_mask=mask)
    alone = generate(model, params, short[None], max_new_tokens=NEW)
    np.testing.assert_array_equal(new[1], alone[0])
    np.testing.assert_array_equal(
        new[0], generate(model, params, tokens[:1], max_new_tokens=NEW)[0]
    )


def test_a_row_repeats_the_token_that_ended_it_and_others_go_on():
    model, params = case("llama3")
    tokens = inputs()["tokens"]
    free = np.asarray(generate(model, params, tokens, max_new_tokens=NEW))
    end = int(free[0, 2])
    assert end not in free[1] and end not in free[0, :2]
    ended = np.asarray(generate(model, params, tokens, max_new_tokens=NEW, eos=end))
    np.testing.assert_array_equal(ended[0], [*free[0, :3], end, end, end])
    np.testing.assert_array_equal(ended[1], free[1])
    # Both rows end early: the loop stops, and what it left is filled all the same.
    ends = (end, int(free[1, 1]))
    both = np.asarray(generate(model, params, tokens, max_new_tokens=NEW, eos=ends))
    np.testing.assert_array_equal(both[1], [free[1, 0], *[ends[1]] * (NEW - 1)])
    np.testing.assert_array_equal(both[0], ended[0])


def test_sampling_repeats_with_its_key_and_turns_greedy_as_it_cools():
    model, params = case("llama3")
    tokens = inputs()["tokens"]

    def sample(temperature, seed):
        return np.asarray(
            generate(
                model,
                params,
                tokens,
                max_new_tokens=NEW,
                temperature=temperature,
                key=jax.random.key(seed),
            )
        )

    np.testing.assert_array_equal(sample(1.0, 0), sample(1.0, 0))
    assert (sample(5.0, 0) != sample(5.0, 1)).any()
    greedy = generate(model, params, tokens, max_new_tokens=NEW)
    np.testing.assert_array_equal(sample(1e-4, 3), greedy)


def test_tokens_are_drawn_as_often_as_the_softmax_of_the_logits_says():
    model, params = case("llama2")
    prompt = np.broadcast_to(inputs()["tokens"][:1, :4], (4000, 4))
    drawn = generate(
        model, params, prompt, max_new_tokens=1, temperature=2.0, key=jax.random.key(1)
    )
    logits = jitted(model)(params, prompt[:1])[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 2.0))
    seen = np.bincount(np.asarray(drawn)[:, 0], minlength=len(expected)) / 4000
    # Four standard deviations of a share of 4000 draws.
    assert np.all(np.abs(seen - expected) < 4 * np.sqrt(expected / 4000) + 1e-3)
    assert expected.max() < 0.9


def test_represented_weights_generate_what_their_dense_values_generate():
    from jaxweights.weights import LowRank, materialize

    model, params = case("smollm2")
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    rng = np.random.default_rng(0)
    down = rng.standard_normal((*kernel.shape[:2], 2), np.float32)
    up = rng.standard_normal((kernel.shape[0], 2, kernel.shape[2]), np.float32)
    mlp = params["layers"]["mlp"] | {"up": {"kernel": LowRank.over(kernel, down, up)}}
    represented = params | {"layers": params["layers"] | {"mlp": mlp}}
    tokens = inputs()["tokens"]
    new = generate(model, represented, tokens, max_new_tokens=NEW)
    dense = generate(model, materialize(represented), tokens, max_new_tokens=NEW)
    np.testing.assert_array_equal(new, dense)


def test_bfloat16_parameters_are_cached_in_bfloat16():
    model, params = case("llama3")
    narrow = cast(params, jnp.bfloat16)
    tokens = inputs()["tokens"]
    cache = init_cache(model.config, BATCH, TIME, dtype=jnp.bfloat16)
    logits, cache = jitted(model)(narrow, tokens, cache=cache)
    assert cache.key.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert generate(model, narrow, tokens, max_new_tokens=2).shape == (BATCH, 2)


def test_reading_beyond_the_last_slot_gives_nan_and_not_something_plausible():
    model, params = case("llama2")
    tokens = inputs()["tokens"]
    cache = init_cache(model.config, BATCH, TIME)
    logits, cache = jitted(model)(params, tokens, cache=cache)
    assert np.isfinite(logits).all()
    logits, _ = jitted(model)(params, tokens[:, :1], cache=cache)
    assert np.isnan(logits).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 0.5}, "temperature=0.5 samples, which needs a random key"),
        ({"max_new_tokens": 60}, "make 72, more than the context of max_positions=64"),
    ],
)
def test_an_impossible_request_is_refused(change, words):
    model, params = case("llama2")
    with pytest.raises(ValueError, match=f"models.generate: .*{words}"):
        generate(model, params, inputs()["tokens"], **({"max_new_tokens": 2} | change))


def test_a_prompt_without_a_batch_axis_is_refused():
    model, params = case("llama2")
    with pytest.raises(ValueError, match=r"prompt_tokens has shape \(12,\)"):
        generate(model, params, inputs()["tokens"][0], max_new_tokens=1)
