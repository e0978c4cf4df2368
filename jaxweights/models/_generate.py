"""Text generation with cached keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.lift import lift
from jaxweights.models._cache import init_cache
from jaxweights.models._llama import Llama
from jaxweights.models._llama_config import LlamaConfig


def generate(
    model: Llama,
    params: Any,
    prompt_tokens: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos: int | tuple[int, ...] | None = None,
    attention_mask: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts, one token after another.

    Prompt and every further token are read once; the loop runs on the device and ends early when
    every row has ended. Compiles once for each shape of the prompts and `max_new_tokens`.

    Args:
      model: The decoder.
      params: Its parameters, dense or represented.
      prompt_tokens: `(batch, time)`, integers; rows of unequal length are padded on either side.
      max_new_tokens: Tokens to append, at least 1.
      temperature: 0 takes the likeliest token; above it, samples from `logits / temperature`.
      key: Random key; required where `temperature` is above 0.
      eos: Token or tokens that end a row; the rest of the row repeats the one that ended it.
      attention_mask: True for tokens, False for padding, `(batch, time)`; None means no padding.

    Returns:
      The new tokens alone, `(batch, max_new_tokens)`, int32.

    Raises:
      ValueError: If a setting is out of range, or prompt and new tokens exceed the context.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> model, prompt = Llama(config), jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), prompt)["params"]
      >>> generate(model, params, prompt, max_new_tokens=4).shape
      (1, 4)
    """
    prompt_tokens = jnp.asarray(prompt_tokens)
    _check(model.config, prompt_tokens, max_new_tokens, temperature, key)
    if attention_mask is None:
        attention_mask = jnp.ones(prompt_tokens.shape, bool)
    return _generate(
        model,
        params,
        prompt_tokens,
        jnp.asarray(attention_mask).astype(bool),
        None if temperature == 0 else (key, jnp.float32(temperature)),
        max_new_tokens=max_new_tokens,
        eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def _check(config: LlamaConfig, prompt, max_new_tokens, temperature, key) -> None:
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(
            f"models.generate: prompt_tokens has shape {prompt.shape}. It must be (batch, time) "
            "with at least one token; add a batch axis with tokens[None]."
        )
    if max_new_tokens < 1:
        raise ValueError(f"models.generate: max_new_tokens={max_new_tokens} must be at least 1.")
    if temperature < 0:
        raise ValueError(f"models.generate: temperature={temperature} must not be negative.")
    if temperature > 0 and key is None:
        raise ValueError(
            f"models.generate: temperature={temperature} samples, which needs a random key. "
            "Pass key=jax.random.key(...), or temperature=0."
        )
    total = prompt.shape[1] + max_new_tokens
    if total > config.max_positions:
        raise ValueError(
            f"models.generate: {prompt.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} "
            f"make {total}, more than the context of max_positions={config.max_positions}. "
            "Shorten one of them."
        )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "eos"))
def _generate(model, params, prompt, valid, sampling, *, max_new_tokens, eos):
    batch, time = prompt.shape
    dtype = model.dtype or params["embed"]["embedding"].dtype
    apply = lift(model.apply)
    cache = init_cache(model.config, batch, time + max_new_tokens, dtype=dtype)

    def read(tokens, valid, last, cache):
        """Logits behind the last token of each row, `(batch, vocab)`."""
        logits, cache = apply(
            {"params": params}, tokens, attention_mask=valid, cache=cache, logits_at=last[:, None]
        )
        return logits[:, 0], cache

    def write(step, logits, state):
        """Chooses the token of this step and notes which rows it ends."""
        out, token, done = state
        chosen = _choose(logits, sampling, step)
        token = jnp.where(done, token, chosen)
        done = done | functools.reduce(jnp.logical_or, [token == e for e in eos], done)
        return jax.lax.dynamic_update_slice(out, token[:, None], (0, step)), token, done

    def unfinished(carry):
        step, (_, _, done), _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance_one(carry):
        step, state, cache = carry
        token = state[1]
        ones = jnp.ones((batch, 1), bool)
        logits, cache = read(token[:, None], ones, jnp.zeros((batch,), jnp.int32), cache)
        return step + 1, write(step, logits, state), cache

    steps = jnp.arange(time, dtype=jnp.int32)
    last = jnp.max(jnp.where(valid, steps[None, :], 0), axis=1)
    logits, cache = read(prompt, valid, last, cache)
    blank = jnp.zeros((batch, max_new_tokens), jnp.int32)
    nothing = (blank, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool))
    state = write(jnp.int32(0), logits, nothing)
    _, (out, token, done), _ = jax.lax.while_loop(
        unfinished, advance_one, (jnp.int32(1), state, cache)
    )
    return _repeat_end(out, token, done, eos)


def _choose(logits, sampling, step):
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key, temperature = sampling
    key = jax.random.fold_in(key, step)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


def _repeat_end(out, token, done, eos):
    """Fills what an early end of the loop left blank with the token that ended the row."""
    if not eos:
        return out
    ends = functools.reduce(jnp.logical_or, [out == e for e in eos])
    ended_before = jnp.cumsum(ends.astype(jnp.int32), axis=1) > 0
    return jnp.where(ended_before & done[:, None], jnp.where(ends, out, token[:, None]), out)
