"""A pipeline gives every stage the statistics of the model that reaches it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.calibrate import pipeline
from jaxweights.core import chain, identity, leafwise, partition
from jaxweights.quantize import Fold, awq
from jaxweights.weights import Quantized

KEY = jax.random.key(0)


def scale_by_input_rms():
    """A transform whose result depends visibly on its statistics."""

    def fn(weight, second_moment, count):
        return weight * (1 + jnp.tanh(second_moment / count.astype(jnp.float32)))[:, None]

    return leafwise(fn, name="scale", needs=("second_moment", "count"))


def scaled(weight, batches):
    """The same in NumPy, float64."""
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in batches])
    return np.asarray(weight, np.float64) * (1 + np.tanh((rows**2).mean(0)))[:, None]


@pytest.fixture
def params():
    keys = jax.random.split(KEY, 4)
    return {
        "first": 0.3 * jax.random.normal(keys[0], (8, 8)),
        "layers": {
            "up": 0.3 * jax.random.normal(keys[1], (3, 8, 12)),
            "down": 0.3 * jax.random.normal(keys[2], (3, 12, 8)),
            "norm": jnp.full((3, 8), 1.5),
        },
        "last": 0.3 * jax.random.normal(keys[3], (8, 4)),
    }


@pytest.fixture
def batches():
    return [jax.random.normal(jax.random.fold_in(KEY, i), (2, 5, 8)) for i in range(2)]


def model(params, x):
    @jax.jit
    def embed(x):
        return x @ params["first"]

    @jax.checkpoint
    def layer(h, w):
        return h + jnp.tanh(h * jnp.broadcast_to(w["norm"], h.shape) @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(layer, embed(x), params["layers"])
    return h @ params["last"]


def test_block_by_block_calibrates_each_layer_on_the_layers_already_transformed(params, batches):
    new = pipeline(model, params, batches, [scale_by_input_rms()], block_by_block=True)
    old = jax.tree.map(np.asarray, params)
    states = [np.asarray(x) @ old["first"] for x in batches]
    for i in range(3):
        up, down, norm = (old["layers"][name][i] for name in ("up", "down", "norm"))
        up = scaled(up, [h * norm for h in states])
        down = scaled(down, [np.tanh(h * norm @ up) for h in states])
        # The published order: a layer's own weights all see the dense layer's activations.
        dense_mid = [np.tanh(h * norm @ old["layers"]["up"][i]) for h in states]
        down = scaled(old["layers"]["down"][i], dense_mid)
        np.testing.assert_allclose(new["layers"]["up"][i], up, rtol=1e-5)
        np.testing.assert_allclose(new["layers"]["down"][i], down, rtol=1e-5)
        states = [h + np.tanh(h * norm @ up) @ down for h in states]
    np.testing.assert_array_equal(new["layers"]["norm"], params["layers"]["norm"])
    np.testing.assert_allclose(new["first"], scaled(old["first"], batches), rtol=1e-5)
    np.testing.assert_allclose(new["last"], scaled(old["last"], states), rtol=1e-5)


def test_block_by_block_differs_from_one_pass_where_layers_feed_layers(params, batches):
    one_pass = pipeline(model, params, batches, [scale_by_input_rms()])
    in_sequence = pipeline(model, params, batches, [scale_by_input_rms()], block_by_block=True)
    first, later = (one_pass["layers"]["up"][i] - in_sequence["layers"]["up"][i] for i in (0, 2))
    # The first layer's input is the same in both; only later layers can differ.
    assert float(jnp.abs(first).max()) < 1e-6
    assert float(jnp.abs(later).max()) > 1e-4


def test_stages_are_calibrated_on_what_the_stage_before_left(batches):
    params = {"a": jnp.eye(8), "b": jnp.eye(8)}

    def two(params, x):
        return x @ params["a"] @ params["b"]

    new = pipeline(two, params, batches, [scale_by_input_rms()] * 2)
    a1 = scaled(np.eye(8), batches)
    b1 = scaled(np.eye(8), batches)
    a2 = scaled(a1, batches)
    b2 = scaled(b1, [np.asarray(x) @ a1 for x in batches])
    np.testing.assert_allclose(new["a"], a2, rtol=1e-5)
    np.testing.assert_allclose(new["b"], b2, rtol=1e-5)
    chained_statistics = scaled(b1, batches)
    assert np.abs(b2 - chained_statistics).max() > 1e-3


def test_rules_see_all_names_while_blocks_are_transformed(params, batches):
    tx = partition((".*/up", scale_by_input_rms()), ("last", scale_by_input_rms()))
    new = pipeline(model, params, batches, [tx], block_by_block=True)
    assert float(jnp.abs(new["layers"]["up"] - params["layers"]["up"]).max()) > 1e-3
    assert float(jnp.abs(new["last"] - params["last"]).max()) > 1e-3
    np.testing.assert_array_equal(new["layers"]["down"], params["layers"]["down"])
    np.testing.assert_array_equal(new["first"], params["first"])


def test_one_layer_of_statistics_is_alive_at_a_time(params, batches, monkeypatch):
    from jaxweights.calibrate import _blocks as blocks

    shapes = []
    original = blocks.apply_inside

    def spy(tx, flat, inside, stats, *rest):
        shapes.append({p: r["second_moment"].shape for p, r in stats.values.items()})
        return original(tx, flat, inside, stats, *rest)

    monkeypatch.setattr(blocks, "apply_inside", spy)
    pipeline(model, params, batches, [chain(scale_by_input_rms())], block_by_block=True)
    assert shapes[:3] == [{"layers/up": (8,), "layers/down": (12,)}] * 3


def test_a_mask_leaves_padding_out_block_by_block(params, batches):
    padded = [jnp.concatenate([x, 100 * jnp.ones_like(x)], axis=1) for x in batches]

    def mask(batch):
        return jnp.broadcast_to(jnp.arange(10) < 5, (2, 10))

    stage = [scale_by_input_rms()]
    with_padding = pipeline(model, params, padded, stage, block_by_block=True, mask=mask)
    without = pipeline(model, params, batches, stage, block_by_block=True)
    for a, b in zip(jax.tree.leaves(with_padding), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_an_iterator_that_can_be_read_once_is_refused(params, batches):
    with pytest.raises(ValueError, match="iterator, which every stage after the first would find"):
        pipeline(model, params, iter(batches), [scale_by_input_rms()])


def test_a_model_without_a_scan_over_layers_is_refused(batches):
    with pytest.raises(ValueError, match="block_by_block needs a model that scans"):
        pipeline(
            lambda p, x: x @ p["a"],
            {"a": jnp.eye(8)},
            batches,
            [scale_by_input_rms()],
            block_by_block=True,
        )


def test_a_smaller_last_batch_is_calibrated_on_block_by_block(params, batches):
    cut = [batches[0], batches[1][:1]]
    rows = [batches[0][:1], batches[0][1:], batches[1][:1]]
    new = pipeline(model, params, cut, [scale_by_input_rms()], block_by_block=True)
    same = pipeline(model, params, rows, [scale_by_input_rms()], block_by_block=True)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_scales_are_folded_block_by_block(params, batches):
    folds = Fold("layers/up", "layers/norm")
    tx = awq(bits=4, group_size=4, folds=folds)
    tx = partition(("layers/(?:up|norm)", tx), (..., identity()))
    new = pipeline(model, params, batches, [tx], block_by_block=True)
    assert isinstance(new["layers"]["up"], Quantized)
    norm = new["layers"]["norm"]
    assert norm.shape == (3, 8) and float(jnp.abs(norm - params["layers"]["norm"]).max()) > 0.01
    np.testing.assert_array_equal(new["last"], params["last"])
