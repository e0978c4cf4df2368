import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import flatten
from jaxweights.quantize import distill, packed_bytes, round_to_nearest
from jaxweights.weights import Quantized


def model(params, x):
    hidden = jax.nn.gelu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"][None]


def dense_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {
            "kernel": (jax.random.normal(keys[0], (64, 48)) / 8).astype(dtype),
            "bias": jnp.zeros(48, dtype),
        },
        "b": {
            "kernel": (jax.random.normal(keys[1], (48, 16)) / 7).astype(dtype),
            "bias": jnp.ones(16, dtype),
        },
    }


def inputs(seed, count, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (count, 64)).astype(dtype)


def batches_of(count=8, size=64, dtype=jnp.float32):
    return [inputs(1 + i, size, dtype) for i in range(count)]


def rounded(dense, **settings):
    settings = {"bits": 3, "group_size": 16, "grid": "affine", "scale_dtype": "float16"} | settings
    return jw.apply(round_to_nearest(**settings), dense)


def lost(params, dense):
    x = inputs(99, 512)  # not trained on
    wide = model(dense, x)
    return float(jnp.mean((jw.lift(model)(params, x) - wide) ** 2) / jnp.mean(wide**2))


@pytest.mark.parametrize("grid", ["affine", "full"])
def test_unseen_inputs_lose_less_with_scales_and_still_less_with_codes(grid):
    dense = dense_params()
    start = rounded(dense, grid=grid)
    settings = {"batches": batches_of(), "steps": 200, "loss": lambda a, b: jnp.mean((a - b) ** 2)}
    scales = distill(model, dense, start, code_rate=0, **settings).params
    both = distill(model, dense, start, **settings).params
    losses = [lost(params, dense) for params in (start, scales, both)]
    assert losses[1] < 0.85 * losses[0]
    assert losses[2] < 0.99 * losses[1]
    for before, fixed, after in zip(*map(jax.tree.leaves, (start, scales, both)), strict=True):
        assert before.shape == fixed.shape == after.shape
        assert before.dtype == fixed.dtype == after.dtype
    for path, leaf in flatten(start)[0].items():
        assert packed_bytes(leaf) == packed_bytes(flatten(both)[0][path])
        if isinstance(leaf, Quantized):
            kept, moved = flatten(scales)[0][path], flatten(both)[0][path]
            assert np.array_equal(leaf.codes, kept.codes)
            assert 0 < np.mean(leaf.codes_matrix() != moved.codes_matrix()) < 0.3
            assert np.array_equal(leaf.zero_point, moved.zero_point)


def test_no_rate_changes_nothing_and_each_rate_only_its_own():
    dense = dense_params()
    start = rounded(dense)
    none = {"code_rate": 0, "scale_rate": 0, "float_rate": 0}
    for name, field in (("code_rate", "codes"), ("scale_rate", "scale"), ("float_rate", None)):
        rates = none | {name: 0.02}
        new = distill(model, dense, start, batches_of(2), steps=20, **rates).params
        for layer in "ab":
            old_kernel, kernel = start[layer]["kernel"], new[layer]["kernel"]
            for each in ("codes", "scale", "zero_point"):
                same = np.array_equal(getattr(old_kernel, each), getattr(kernel, each))
                assert same == (each != field)
            same = np.array_equal(start[layer]["bias"], new[layer]["bias"])
            assert same == (field is not None)
    still = distill(model, dense, start, batches_of(1), steps=2, **none)
    assert all(map(np.array_equal, jax.tree.leaves(start), jax.tree.leaves(still.params)))
    assert float(still.losses[0]) == float(still.losses[1])


def test_the_first_loss_is_that_of_the_start_though_codes_lean():
    dense = dense_params()
    start, (x,) = rounded(dense), batches_of(1)
    wide = model(dense, x)
    expected = jnp.mean((jw.lift(model)(start, x) - wide) ** 2) / jnp.mean(wide**2)
    found = distill(model, dense, start, [x], steps=1)
    np.testing.assert_allclose(found.losses, [expected], rtol=1e-5)


def test_the_divergence_is_that_of_the_softmax():
    dense = dense_params()
    start, (x,) = rounded(dense), batches_of(1)
    p, q = (
        np.asarray(jax.nn.softmax(jw.lift(model)(params, x)), np.float64)
        for params in (dense, start)
    )
    expected = np.mean(np.sum(p * np.log(p / q), axis=-1))
    found = distill(model, dense, start, [x], steps=1, loss="divergence")
    np.testing.assert_allclose(found.losses, [expected], rtol=1e-4)


def test_stacks_kernels_of_heads_offsets_and_other_weights_are_trained_or_left():
    key = jax.random.key(5)
    dense = {
        "layers": {"kernel": jax.random.normal(key, (2, 16, 16)) / 4, "scale": jnp.ones((2, 16))},
        "q": {"kernel": jax.random.normal(jax.random.key(6), (16, 2, 4)) / 4},
        "out": {"kernel": jax.random.normal(jax.random.key(7), (8, 8)) / 3},
    }

    def deep(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w["kernel"]) * w["scale"][None], None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        heads = jnp.einsum("bi,ihd->bhd", x, params["q"]["kernel"]).reshape(len(x), -1)
        return heads @ params["out"]["kernel"]

    q = jw.quantize
    tx = jw.partition(
        ("layers/kernel", q.hqq(bits=3, group_size=8)),
        ("q/.*", q.round_to_nearest(bits=3, group_size=8)),
        ("out/.*", q.nf4(group_size=8)),
    )
    x = jax.random.normal(jax.random.key(8), (4, 32, 16))
    layout = jw.infer_layout(deep, dense, x[0])
    start = jw.apply(tx, dense, layout=layout)
    assert start["layers"]["kernel"].offset is not None
    found = distill(deep, dense, start, list(x), steps=60, code_rate=0, scale_rate=3e-3)
    assert float(found.losses[-4:].mean()) < 0.9 * float(found.losses[:4].mean())
    assert np.array_equal(start["out"]["kernel"].codes, found.params["out"]["kernel"].codes)
    assert not np.array_equal(start["q"]["kernel"].scale, found.params["q"]["kernel"].scale)
    moved = distill(deep, dense, start, list(x), steps=60, code_rate=0.02).params
    assert not np.array_equal(start["q"]["kernel"].codes, moved["q"]["kernel"].codes)
    assert moved["q"]["kernel"].shape == (16, 2, 4)
    assert moved["layers"]["kernel"].codes_matrix().max() <= 7


def test_bfloat16_models_keep_their_dtype_and_dead_inputs_their_codes():
    dense = dense_params(jnp.bfloat16)
    dense["a"]["kernel"] = dense["a"]["kernel"].at[:16].set(0)  # a whole group
    start = rounded(dense)
    x = [batch.at[:, 16:20].set(0) for batch in batches_of(2, dtype=jnp.bfloat16)]
    new = distill(model, dense, start, x, steps=10, code_rate=0.05).params
    assert new["a"]["kernel"].dtype == new["a"]["bias"].dtype == jnp.bfloat16
    before, after = (p["a"]["kernel"].codes_matrix() for p in (start, new))
    assert np.array_equal(before[:20], after[:20])
    assert not np.array_equal(before, after)
    assert np.all(np.asarray(new["a"]["kernel"].materialize(), np.float32)[:16] == 0)


def test_batches_may_be_tuples_and_progress_counts_steps():
    dense, seen = dense_params(), []
    pair = lambda params, x, y: model(params, x) + y[None]  # noqa: E731
    batch = (inputs(1, 8), jnp.ones(16))
    found = distill(
        pair, dense, rounded(dense), [batch], steps=3, progress=lambda *a: seen.append(a)
    )
    assert found.losses.shape == (3,)
    assert seen == [("distill", i, 3) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"loss": "mse"}, ValueError, r"loss='mse' must be one of \['squared', 'divergence'\]"),
        ({"steps": 0}, ValueError, "steps=0 must be a positive integer"),
        ({"code_rate": 0.5}, ValueError, r"code_rate=0.5 must lie in \[0, 0.5\)"),
        ({"scale_rate": "fast"}, TypeError, "scale_rate='fast' must be a number"),
        ({"train": None}, TypeError, "train=None must be a pattern"),
        ({"progress": 1}, TypeError, "progress=1 cannot be called"),
        ({"batches": []}, ValueError, "there is no batch. Pass at least one"),
    ],
)
def test_settings_are_refused_by_name(settings, error, words):
    dense = dense_params()
    given = {"batches": batches_of(1)} | settings
    with pytest.raises(error, match=f"quantize.distill: {words}"):
        distill(model, dense, rounded(dense), **given)


def test_trees_that_do_not_belong_together_are_refused_with_every_leaf():
    dense = dense_params()
    other = {"a": {"kernel": jnp.ones((64, 47)), "bias": dense["a"]["bias"]}, "c": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'a/kernel' is \(64, 48\) in params but \(64, 47\)") as e:
        distill(model, other, rounded(dense), batches_of(1))
    assert "'b/bias' is in params alone" in str(e.value)
    assert "'c' is in dense alone" in str(e.value)
    with pytest.raises(ValueError, match=r"there is nothing to train: no leaf is Quantized, and"):
        distill(model, dense, dense, batches_of(1), train="none")


def test_a_loss_that_is_not_finite_is_refused_with_its_step():
    dense = dense_params()
    bad = inputs(1, 8).at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1\. Lower the rates"):
        distill(model, dense, rounded(dense), [inputs(2, 8), bad], steps=3)


def test_targets_of_zero_weigh_the_errors_as_they_are():
    dense = jax.tree.map(jnp.zeros_like, dense_params())
    wrong = rounded(dense_params(), bits=2, group_size=16)
    found = distill(model, dense, wrong, batches_of(1), steps=2, code_rate=0)
    errors = jnp.mean(jw.lift(model)(wrong, batches_of(1)[0]) ** 2)
    np.testing.assert_allclose(found.losses[0], errors, rtol=1e-5)


def test_a_leaf_at_two_paths_is_trained_as_one_and_stays_one():
    kernel, bias = jax.random.normal(jax.random.key(0), (32, 32)) / 6, jnp.ones(32)
    dense = {"a": {"kernel": kernel, "bias": bias}, "b": {"kernel": kernel, "bias": bias}}
    start = rounded(dense)
    assert start["a"]["kernel"] is start["b"]["kernel"]

    def twice(params, x):
        for layer in "ab":
            x = jax.nn.gelu(x @ params[layer]["kernel"] + params[layer]["bias"][None])
        return x

    x = jax.random.normal(jax.random.key(1), (64, 32))
    new = distill(twice, dense, start, [x], steps=8).params
    assert new["a"]["kernel"] is new["b"]["kernel"]
    assert new["a"]["bias"] is new["b"]["bias"]
    assert not np.array_equal(new["a"]["kernel"].scale, start["a"]["kernel"].scale)


def test_codes_that_share_no_byte_do_not_come_to_share_one():
    dense = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    codes = jw.apply(round_to_nearest(bits=4), dense)["kernel"]
    apart = dataclasses.replace(codes, codes=codes.codes_matrix(), codes_per_byte=1)
    x = jax.random.normal(jax.random.key(1), (32, 16))
    found = distill(lambda p, x: x @ p["kernel"], dense, {"kernel": apart}, [x], steps=1)
    assert jax.tree.structure(found.params["kernel"]) == jax.tree.structure(apart)
    assert found.params["kernel"].codes.shape == (16, 8)
