"""Dense models become the experts of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.merge import router_from_stats, upcycle
from jaxweights.models import build, mixtral_checkpoint
from tests._tiny_models import LLAMA

DRAW = np.random.default_rng(0).normal


def _model(seed):
    draw = np.random.default_rng(seed).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)  # noqa: E731
    mlp = {
        "up": {"kernel": array(3, 6, 8), "bias": array(3, 8)},
        "down": {"kernel": array(3, 8, 6)},
    }
    return {"embed": array(5, 6), "layers": {"norm": array(3, 6), "mlp": mlp}}


def _mlp(x, mlp):
    return np.maximum(x @ mlp["up"]["kernel"] + mlp["up"]["bias"], 0) @ mlp["down"]["kernel"]


def _mixture(x, mlp, layer, chosen):
    """One layer's mixture, token by token."""
    experts = jax.tree.map(lambda leaf: np.asarray(leaf[layer]), mlp["experts"])
    scores = x @ np.asarray(mlp["router"]["kernel"][layer])
    result = np.zeros((len(x), 6))
    for t, row in enumerate(scores):
        top = np.argsort(-row)[:chosen]
        shares = np.exp(row[top]) / np.exp(row[top]).sum()
        for share, i in zip(shares, top, strict=True):
            result[t] += share * _mlp(x[t], jax.tree.map(lambda leaf, i=i: leaf[i], experts))
    return result


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_copies_of_one_model_compute_what_it_computed(chosen):
    model, x = _model(0), DRAW(size=(7, 6))
    mixed = upcycle(model, [model] * 4, mlps="layers/mlp", routers=DRAW(size=(3, 6, 4)))
    for layer in range(3):
        dense = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), model["layers"])
        want = _mlp(x, dense["mlp"])
        np.testing.assert_allclose(_mixture(x, mixed["layers"]["mlp"], layer, chosen), want, 1e-5)


def test_an_expert_is_its_models_mlp_and_the_rest_is_the_bases():
    base, *models = (_model(i) for i in range(3))
    mixed = upcycle(base, models, mlps="layers/mlp", routers=jnp.ones((3, 6, 2)))
    assert jax.tree.all(jax.tree.map(np.array_equal, mixed["embed"], base["embed"]))
    np.testing.assert_array_equal(mixed["layers"]["norm"], base["layers"]["norm"])
    for i, model in enumerate(models):
        own = jax.tree.map(lambda leaf, i=i: leaf[:, i], mixed["layers"]["mlp"]["experts"])
        assert jax.tree.all(jax.tree.map(np.array_equal, own, model["layers"]["mlp"]))


def test_layers_by_name_have_a_router_each():
    kernel = lambda seed: jnp.full((4, 4), float(seed), jnp.bfloat16)  # noqa: E731
    make = lambda s: {f"layer_{i}": {"mlp": {"up": kernel(s + i)}, "norm": kernel(9)}  # noqa: E731
                      for i in range(2)}  # fmt: skip
    paths = ["layer_0/mlp", "layer_1/mlp"]
    routers = {path: jnp.full((4, 2), i) for i, path in enumerate(paths)}
    mixed = upcycle(
        make(0), [make(1), make(2)], mlps=r"layer_\d+/mlp", routers=routers, stacked=False
    )
    assert mixed["layer_1"]["mlp"]["experts"]["up"][:, 0, 0].tolist() == [2, 3]
    assert mixed["layer_1"]["mlp"]["experts"]["up"].dtype == jnp.bfloat16
    assert float(mixed["layer_1"]["mlp"]["router"]["kernel"][0, 0]) == 1
    assert set(mixed["layer_0"]) == {"mlp", "norm"}


def test_a_router_points_at_the_prompts_mean_less_the_negative_ones():
    params = {"up": jnp.ones((2, 3, 4))}
    model = lambda p, x: jax.lax.scan(lambda _, w: (0, x @ w), 0, p["up"])[1]  # noqa: E731
    seen = lambda *rows: jw.calibrate(  # noqa: E731
        model, params, [jnp.asarray(rows)], needs={"up": {"sum", "count"}}
    )
    yes = [seen([3.0, 0, 0], [1.0, 4, 0]), seen([0.0, 0, 5])]
    got = router_from_stats(yes, "up", negative=[seen([2.0, 1, 0]), None])
    assert got.shape == (2, 3, 2)
    np.testing.assert_allclose(got[0], [[0, 0], [1, 0], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(got[0], got[1])
    with pytest.raises(ValueError, match="the prompts of expert 1 leave nothing"):
        router_from_stats(yes, "up", negative=[None, yes[1]])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mlps": "layers/mpl"}, "mlps='layers/mpl' matches the beginning of no path.*layers/mlp"),
        (
            {"routers": jnp.ones((3, 6, 3))},
            r"router has shape \(3, 6, 3\). It must be \(3, in, 2\)",
        ),
        (
            {"routers": {"x": jnp.ones((3, 6, 2))}},
            r"given for \['x'\], but the MLPs are \['layers/mlp",
        ),
        ({"experts": []}, "experts is empty"),
        ({"experts": [_model(0), {"embed": jnp.ones(2)}]}, r"up/bias': experts\[1\] lacks it"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words):
    settings = {"mlps": "layers/mlp", "routers": jnp.ones((3, 6, 2)), "experts": [_model(1)] * 2}
    settings |= change
    with pytest.raises(ValueError, match=words):
        upcycle(_model(0), settings.pop("experts"), **settings)


CONFIG = dataclasses.replace(LLAMA, tie_embeddings=False)


@pytest.fixture(scope="module")
def llamas():
    tokens = jnp.zeros((1, 4), jnp.int32)
    make = jax.jit(build(CONFIG).init)
    return [make(jax.random.key(i), tokens)["params"] for i in range(2)]


def test_copies_run_in_transformers_as_the_dense_model_does(llamas):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    base, other = llamas
    x = np.arange(12)[None] * 7 % CONFIG.vocab_size
    routers = jnp.asarray(DRAW(size=(2, CONFIG.hidden_size, 3)), jnp.float32)
    mixed = upcycle(base, [base, base, other], mlps="layers/mlp", routers=routers)
    # The third expert is another one: nothing may be sent to it.
    mixed["layers"]["mlp"]["router"]["kernel"] = routers.at[:, :, 2].set(0)
    tensors, settings = mixtral_checkpoint(mixed, CONFIG, experts_per_token=1)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)).eval()
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items() if "norm" in n} == {
        n: t.shape for n, t in tensors.items() if "norm" in n
    }
    state = {name: torch.tensor(array) for name, array in tensors.items()}
    for layer in range(2):
        gate = state[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        # Large scores of opposite signs: one of the two copies wins every token.
        gate[0], gate[1] = 1e3 * gate[0], -1e3 * gate[0]
    got = _logits(theirs, state, x)
    want = build(CONFIG).apply({"params": base}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=2e-5)


def _logits(model, state, x):
    import tempfile

    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        jw.checkpoint.write_safetensors(
            f"{folder}/m",
            {name: tensor.numpy() for name, tensor in state.items()},
            files={"config.json": model.config.to_json_string()},
        )
        loaded = transformers.MixtralForCausalLM.from_pretrained(f"{folder}/m").eval()
    with torch.no_grad():
        return loaded(torch.tensor(x)).logits.numpy()


def test_a_model_that_mixtral_cannot_be_is_refused(llamas):
    routers = jnp.ones((2, CONFIG.hidden_size, 2))
    mixed = upcycle(llamas[0], llamas, mlps="layers/mlp", routers=routers)
    with pytest.raises(ValueError, match="has qkv_bias, which Mixtral has not"):
        mixtral_checkpoint(mixed, dataclasses.replace(CONFIG, qkv_bias=True))
    with pytest.raises(ValueError, match="experts_per_token=3 must lie in 1 to 2"):
        mixtral_checkpoint(mixed, CONFIG, experts_per_token=3)
    with pytest.raises(ValueError, match="not 'experts' and 'router'"):
        mixtral_checkpoint(llamas[0], CONFIG)
    with pytest.raises(ValueError, match="not 'experts' and 'router'"):
        mixtral_checkpoint({"embed": jnp.ones(2)}, CONFIG)


def test_represented_mlps_are_refused_once_each():
    dense = {"mlp": {"up": jnp.ones((32, 8))}}
    small = jw.apply(jw.quantize.round_to_nearest(bits=8), dense)
    settings = {"mlps": "mlp", "routers": jnp.zeros((32, 2)), "stacked": False}
    with pytest.raises(ValueError, match=r"'mlp/up': is represented. Pass") as error:
        upcycle(small, [dense, dense], **settings)
    assert str(error.value).count("represented") == 1
    with pytest.raises(ValueError, match=r"'mlp/up': is represented in experts\[1\]. Pass"):
        upcycle(dense, [dense, small], **settings)
