"""The decoder against transformers, against itself, and under bfloat16 and padding."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.models import Llama, LlamaConfig, build, config_from_dict, params_from_checkpoint
from jaxweights.models._convert import name_map
from tests.models._cases import CASES, DECODERS, TIME, VOCAB, draw_tensors, inputs
from tests.models.make_logits import reference_outputs

STORED = Path(__file__).with_name("logits.npz")
# Float32 with sums of up to 40 terms and logits of order 10: 1e-4 is about ten roundings, and a
# wrong rotation, norm or window moves logits by 0.1 and more.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@functools.cache
def case(name):
    config = config_from_dict(CASES[name])
    names = name_map(config, "huggingface")
    shapes = {
        names.written_name(canonical): rule.checkpoint_shape
        for canonical, (rule, _) in names.expected().items()
    }
    params = params_from_checkpoint(draw_tensors(shapes), config)
    return build(config), jax.tree.map(jnp.asarray, params)


@functools.cache
def jitted(model):
    return jax.jit(lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs))


@functools.cache
def our_outputs(name):
    model, params = case(name)
    given = inputs()
    extra = {"token_types": given["token_types"]} if name == "bert" else {}
    mask = given["attention_mask"]
    return jitted(model)(params, given["tokens"], attention_mask=mask, **extra)


def cast(params, dtype):
    """With NumPy, which compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def real(outputs):
    return np.asarray(outputs)[inputs()["attention_mask"] == 1]


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_those_that_transformers_gave(name):
    with np.load(STORED) as stored:
        np.testing.assert_allclose(real(our_outputs(name)), real(stored[name]), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_the_transformers_that_is_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = reference_outputs(CASES[name])
    np.testing.assert_allclose(real(our_outputs(name)), real(theirs), **TOLERANCE)


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama3", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama2", {"rope_theta": 9000.0}),
        ("llama2", {"norm_eps": 1e-2}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": None}),
        ("qwen2_sliding", {"sliding_layers": None}),
        ("qwen3", {"norm_eps": 1.0}),
    ],
)
def test_the_comparison_would_notice_a_wrong_setting(name, change):
    model, params = case(name)
    wrong = Llama(dataclasses.replace(model.config, **change))
    given = inputs()
    outputs = jitted(wrong)(params, given["tokens"], attention_mask=given["attention_mask"])
    assert np.abs(real(outputs) - real(our_outputs(name))).max() > 1e-2


@pytest.mark.parametrize("name", ["llama3", "mistral", "olmo2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(name, side):
    model, params = case(name)
    tokens, pad = inputs()["tokens"], np.full((2, 5), 7, np.int32)
    ones, zeros = np.ones_like(tokens), np.zeros_like(pad)
    parts = [(pad, zeros), (tokens, ones)] if side == "left" else [(tokens, ones), (pad, zeros)]
    padded, mask = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    outputs = jitted(model)(params, padded, attention_mask=mask)
    outputs = outputs[:, 5:] if side == "left" else outputs[:, :-5]
    # Sums run over more slots, so in another order: a few roundings of logits of order 10.
    np.testing.assert_allclose(outputs, jitted(model)(params, tokens), rtol=1e-4, atol=1e-4)
    assert np.isfinite(jitted(model)(params, padded, attention_mask=mask)).all()


@pytest.mark.parametrize("name", DECODERS)
def test_no_token_is_influenced_by_a_later_one(name):
    model, params = case(name)
    tokens = inputs()["tokens"]
    changed = np.concatenate([tokens[:, :-1], (tokens[:, -1:] + 1) % VOCAB], axis=1)
    before, after = jitted(model)(params, tokens), jitted(model)(params, changed)
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before[:, -1] - after[:, -1]).max() > 0.1


def test_a_window_reaches_back_its_length_for_each_layer_and_no_further():
    model, params = case("mistral")
    config = model.config
    reach = config.num_layers * (config.sliding_window - 1)
    tokens = np.arange(TIME, dtype=np.int32)[None]

    def last(embedding):
        tree = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": tree}, tokens)[0, -1].sum()

    felt = np.abs(jax.jit(jax.grad(last))(params["embed"]["embedding"])[:TIME]).sum(axis=1)
    assert (felt[TIME - 1 - reach :] > 0).all()
    assert (felt[: TIME - 1 - reach] == 0).all() and reach < TIME - 1


def test_positions_may_be_stated_and_only_their_differences_matter():
    model, params = case("llama3")
    tokens = inputs()["tokens"]
    counted = np.broadcast_to(np.arange(TIME, dtype=np.int32), tokens.shape)
    plain = jitted(model)(params, tokens)
    np.testing.assert_array_equal(jitted(model)(params, tokens, positions=counted), plain)
    # Rotary angles of order 30 carry a relative error of 1e-7, so 1e-5 in a score.
    shifted = jitted(model)(params, tokens, positions=counted + 20)
    np.testing.assert_allclose(shifted, plain, rtol=1e-3, atol=1e-3)
    stretched = jitted(model)(params, tokens, positions=counted * 3)
    assert np.abs(stretched - plain).max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "olmo2"])
def test_bfloat16_parameters_give_float32_logits_within_their_precision(name):
    model, params = case(name)
    narrow = cast(params, jnp.bfloat16)
    tokens = inputs()["tokens"]
    logits = jitted(model)(narrow, tokens)
    # The same rounded weights computed in float32: what is left is the activations' rounding.
    wide = jitted(model)(cast(narrow, jnp.float32), tokens)
    assert logits.dtype == jnp.float32
    # 2^-8 a rounding, some 20 roundings one after another through 3 layers.
    assert 0 < np.abs(logits - wide).max() < 0.08 * np.abs(wide).max()


def test_dtype_chooses_the_activations_whatever_the_parameters_are():
    model, params = case("llama3")
    tokens = inputs()["tokens"]
    narrow = cast(params, jnp.bfloat16)
    upcast = Llama(model.config, dtype=jnp.float32)
    wide = jitted(model)(cast(narrow, jnp.float32), tokens)
    np.testing.assert_allclose(jitted(upcast)(narrow, tokens), wide, rtol=1e-5, atol=1e-5)


def test_remat_changes_neither_values_nor_gradients():
    model, params = case("olmo2")
    tokens = inputs()["tokens"]

    def loss(params, model):
        return jnp.square(model.apply({"params": params}, tokens)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = value_and_grad(params, model)
    again, regrads = value_and_grad(params, Llama(model.config, remat=True))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, regrads
    )


def test_sixty_four_layers_compile_to_the_program_of_two():
    def program(num_layers):
        config = LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=num_layers, num_heads=2
        )
        model, tokens = Llama(config), jnp.zeros((1, 4), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        assert params["layers"]["mlp"]["up"]["kernel"].shape == (num_layers, 8, 16)
        return jitted(model).lower(params, tokens).as_text()

    two, many = program(2).splitlines(), program(64).splitlines()
    assert len(two) == len(many)
    assert sum("dot_general" in line for line in many) == 10  # 7 kernels, 2 of attention, head


def test_the_tied_head_contracts_the_embedding_as_it_is_stored():
    model, params = case("smollm2")
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, inputs()["tokens"]))(params).jaxpr
    table = next(v for v in jaxpr.invars if v.aval.shape == (VOCAB, model.config.hidden_size))
    users = [eqn for eqn in jaxpr.eqns if table in eqn.invars]
    (product,) = (eqn for eqn in users if eqn.primitive.name == "dot_general")
    assert len(users) == 2  # the lookup and the head
    (_, contracted), _ = _contraction(product, table)
    assert contracted == (1,)


def _contraction(eqn, weight):
    contract, batch = eqn.params["dimension_numbers"]
    left_is_weight = eqn.invars[0] is weight
    order = (1, 0) if left_is_weight else (0, 1)
    return tuple(tuple(contract[i]) for i in order), batch


def test_logits_can_be_asked_for_at_chosen_steps_only():
    model, params = case("llama2")
    tokens = inputs()["tokens"]
    at = np.array([[3, 0], [11, 5]], np.int32)
    chosen = jitted(model)(params, tokens, logits_at=at)
    everything = jitted(model)(params, tokens)
    np.testing.assert_allclose(
        chosen, np.take_along_axis(np.asarray(everything), at[:, :, None], 1), rtol=1e-5, atol=1e-5
    )


def test_a_token_outside_the_vocabulary_gives_nan_from_there_on_in_its_row():
    model, params = case("llama2")
    tokens = inputs()["tokens"].copy()
    tokens[0, 4] = VOCAB
    logits = np.asarray(jitted(model)(params, tokens))
    assert np.isnan(logits[0, 4:]).all() and np.isfinite(logits[1]).all()


def test_tokens_without_a_batch_axis_are_refused():
    model, params = case("llama2")
    with pytest.raises(ValueError, match=r"models.Llama: tokens have shape \(3,\).*tokens\[None\]"):
        model.apply({"params": params}, jnp.zeros(3, jnp.int32))


def test_represented_weights_give_what_their_dense_values_give():
    from jaxweights.lift import lift
    from jaxweights.weights import LowRank, materialize

    model, params = case("smollm2")
    tokens = inputs()["tokens"]

    rng = np.random.default_rng(0)

    def represent(leaf):
        if leaf.ndim < 2:
            return leaf
        *stack, fan_in, fan_out = leaf.shape
        down = rng.normal(0, 0.1, (*stack, fan_in, 2)).astype(np.float32)
        return LowRank.over(leaf, down, rng.normal(0, 0.1, (*stack, 2, fan_out)).astype(np.float32))

    kernels = {"layers": {k: v for k, v in params["layers"].items() if "norm" not in k}}
    represented = params | {"layers": params["layers"] | jax.tree.map(represent, kernels["layers"])}
    lifted = jax.jit(lambda p: lift(model.apply)({"params": p}, tokens))
    dense = jitted(model)(materialize(represented), tokens)
    np.testing.assert_allclose(lifted(represented), dense, rtol=1e-3, atol=1e-3)
    assert np.abs(dense - jitted(model)(params, tokens)).max() > 0.1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_heads": 5}, "hidden_size=24 is not a multiple of num_heads=5"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be above 0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be finite"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"sliding_layers": (True,) * 3}, "sliding_layers is set but sliding_window is None"),
        (
            {"sliding_layers": (True,), "sliding_window": 3},
            "sliding_layers has 1 entries for 3 layers",
        ),
        ({"family": "lama"}, "family='lama' must be one of .* Did you mean 'llama'"),
        ({"norm_position": "middle"}, "norm_position='middle' must be one of"),
    ],
)
def test_an_impossible_config_is_refused_by_field(change, words):
    sizes = dict(vocab_size=16, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4)
    with pytest.raises(ValueError, match=f"models.LlamaConfig: {words}"):
        LlamaConfig(**(sizes | change))


def test_every_bad_field_of_a_config_is_in_one_message():
    with pytest.raises(TypeError) as error:
        LlamaConfig(
            vocab_size="16",  # type: ignore[arg-type]
            hidden_size=-1,
            intermediate_size=40,
            num_layers=True,
            num_heads=4,
            tie_embeddings=1,  # type: ignore[arg-type]
        )
    message = str(error.value)
    assert "vocab_size='16' is a str. It must be an int." in message
    assert "hidden_size=-1 must be at least 1." in message
    assert "num_layers=True is a bool. It must be an int." in message
    assert "tie_embeddings=1 is a int. It must be True or False." in message
