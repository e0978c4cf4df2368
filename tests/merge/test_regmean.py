"""RegMean fits outputs on every model's own inputs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.calibrate import calibrate
from jaxweights.core import Layout, Stats, apply
from jaxweights.merge import mean, regmean, regmean_needs
from jaxweights.weights import Axes
from tests._fixtures import fixture
from tests.merge._public import NAMES, whole_checkpoint

TORCH = Axes(inputs=(-1,), outputs=(-2,))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram(x):
    """Statistics of inputs `(tokens, in)`."""
    return {"gram": jnp.asarray(x.T @ x), "count": jnp.asarray(len(x), jnp.int32)}


def problem(tokens=(40, 60, 50), in_dim=6, out_dim=4):
    """Models, their inputs and their statistics."""
    scales = [np.exp(draw(7 + i, in_dim)) for i in range(len(tokens))]
    inputs = [draw(20 + i, n, in_dim) * scales[i] for i, n in enumerate(tokens)]
    models = [{"up": {"kernel": draw(i, in_dim, out_dim)}} for i in range(len(tokens))]
    return models, inputs, [Stats({"up/kernel": gram(x)}) for x in inputs]


def residual(kernel, models, inputs):
    parts = [
        np.square(x @ (np.asarray(kernel) - m["up"]["kernel"])).sum() / len(x)
        for x, m in zip(inputs, models, strict=True)
    ]
    return sum(parts)


def test_it_is_the_least_squares_solution_over_all_inputs():
    models, inputs, stats = problem()
    got = apply(regmean(stats=stats, alpha=1.0), models[0], models=models)["up"]["kernel"]
    rows = np.concatenate([x / np.sqrt(len(x)) for x in inputs]).astype(np.float64)
    targets = np.concatenate(
        [x @ m["up"]["kernel"] / np.sqrt(len(x)) for x, m in zip(inputs, models, strict=True)]
    ).astype(np.float64)
    want = np.linalg.lstsq(rows, targets)[0]
    # The ridge of 1e-6 of the mean diagonal moves it in the sixth digit.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    averaged = apply(mean(), models[0], models=models)["up"]["kernel"]
    assert residual(got, models, inputs) < 0.9 * residual(averaged, models, inputs)


@pytest.mark.parametrize("case", ["regmean", "regmean_scaled", "regmean_diag", "regmean_coeffs"])
def test_it_agrees_with_its_authors(case):
    arrays = fixture("merge/regmean_fisher.npz")
    settings = json.loads(str(arrays["meta"]))["cases"][case]
    want = {k.removeprefix(f"{case}/"): v for k, v in arrays.items() if k.startswith(f"{case}/")}
    models = [{path: whole_checkpoint(name)[path] for path in want} for name in NAMES]
    one = jnp.asarray(1, jnp.int32)
    matrices = [path for path in want if path != "model.norm.weight"]
    stats = [
        Stats({p: {"gram": jnp.asarray(arrays[f"gram/{i}/{p}"]), "count": one} for p in matrices})
        for i in range(3)
    ]
    off = settings["regmean_reduce_nondiag"]
    tx = regmean(
        stats=stats,
        weights=settings["model_coeffs"],
        alpha=0.0 if settings["regmean_diag"] else (1.0 if off < 0 else off),
        # The fixture's inverse has no ridge; its diagonal variant can do without here too.
        damping=0.0 if settings["regmean_diag"] else 1e-6,
    )
    got = apply(tx, models[0], models=models, layout=dict.fromkeys(matrices, TORCH))
    tolerance = 1e-6 if settings["regmean_diag"] else 1e-4
    for path, expected in want.items():
        np.testing.assert_allclose(
            got[path], expected, rtol=0, atol=tolerance * abs(expected).max()
        )


def test_models_that_agree_keep_their_bits_even_where_nothing_was_seen():
    models, _, stats = problem()
    same = [jax.tree.map(jnp.array, models[0]) for _ in models]
    got = apply(regmean(stats=stats), models[1], models=same)
    np.testing.assert_array_equal(got["up"]["kernel"], models[0]["up"]["kernel"])
    blind = [Stats({"up/kernel": gram(np.zeros((0, 6), np.float32))}) for _ in models]
    got = apply(regmean(stats=blind), models[1], models=models)
    want = apply(mean(), models[1], models=models)
    np.testing.assert_array_equal(got["up"]["kernel"], want["up"]["kernel"])


def test_inputs_that_nobody_uses_take_the_mean():
    models, inputs, _ = problem()
    for x in inputs:
        x[:, 2] = 0
    stats = [Stats({"up/kernel": gram(x)}) for x in inputs]
    got = apply(regmean(stats=stats, alpha=1.0), models[0], models=models)["up"]["kernel"]
    want = np.mean([m["up"]["kernel"] for m in models], axis=0)
    np.testing.assert_allclose(got[2], want[2], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(got)[:2] - want[:2]).max() > 0.1


def test_equal_isotropic_inputs_give_the_mean():
    models, _, _ = problem()
    stats = [Stats({"up/kernel": {"gram": 3 * jnp.eye(6), "count": jnp.asarray(5, jnp.int32)}})] * 3
    got = apply(regmean(stats=stats, weights=[1, 2, 1]), models[0], models=models)
    want = apply(mean(weights=[1, 2, 1]), models[0], models=models)
    np.testing.assert_allclose(got["up"]["kernel"], want["up"]["kernel"], rtol=0, atol=1e-6)


def test_the_unit_of_the_inputs_and_the_order_of_the_models_do_not_matter():
    models, inputs, stats = problem()
    tx = regmean(stats=stats, weights=[1, 2, 3])
    got = apply(tx, models[0], models=models)["up"]["kernel"]
    loud = [Stats({"up/kernel": gram(1e3 * x)}) for x in inputs]
    again = apply(regmean(stats=loud, weights=[2, 4, 6]), models[0], models=models)
    np.testing.assert_allclose(again["up"]["kernel"], got, rtol=0, atol=1e-5)
    turned = regmean(stats=stats[::-1], weights=[3, 2, 1])
    back = apply(turned, models[0], models=models[::-1])["up"]["kernel"]
    np.testing.assert_allclose(back, got, rtol=0, atol=1e-5)


def test_stacked_layers_heads_and_convolutions_are_merged_as_their_matrices():
    models, _, stats = problem()
    plain = apply(regmean(stats=stats), models[0], models=models)["up"]["kernel"]
    shapes = {
        "heads/kernel": ((6, 2, 2), Axes(inputs=(-3,), outputs=(-2, -1))),
        "out/kernel": ((2, 3, 4), Axes(inputs=(-3, -2), outputs=(-1,))),
        "conv/kernel": ((3, 1, 2, 4), Axes(inputs=(-4, -3, -2), outputs=(-1,), kind="conv")),
    }
    trees = [{p: m["up"]["kernel"].reshape(s) for p, (s, _) in shapes.items()} for m in models]
    for i, tree in enumerate(trees):
        other = draw(50 + i, 6, 4)
        tree["layers/kernel"] = np.stack([models[i]["up"]["kernel"], other])
    axes = {p: a for p, (_, a) in shapes.items()} | {"layers/kernel": Axes()}
    all_stats = []
    for i, s in enumerate(stats):
        one = s.values["up/kernel"]
        two = gram(draw(60 + i, 30, 6))
        values = dict.fromkeys(shapes, one)
        values["layers/kernel"] = {k: jnp.stack([one[k], two[k]]) for k in one}
        all_stats.append(Stats(values, layout=Layout.of(axes, traced=True)))
    got = apply(regmean(stats=all_stats), trees[0], models=trees)
    for path in shapes:
        ours = np.asarray(got[path]).reshape(6, 4)
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["layers/kernel"][0], plain, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(got["layers/kernel"][1]) - np.asarray(plain)).max() > 0.1


def test_calibrated_models_merge_to_outputs_nearer_to_their_own():
    def model(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]["kernel"]

    def tree(seed):
        return {
            "up": {"kernel": jnp.asarray(draw(seed, 8, 5)), "bias": jnp.asarray(draw(seed + 1, 5))},
            "down": {"kernel": jnp.asarray(draw(seed + 2, 5, 3))},
        }

    models, mixers = [tree(0), tree(10)], [draw(3, 2, 8), draw(4, 2, 8)]
    data = [jnp.asarray(draw(5 + i, 50, 2) @ mixer) for i, mixer in enumerate(mixers)]
    stats = [
        calibrate(model, m, [x], needs=regmean_needs(m)) for m, x in zip(models, data, strict=True)
    ]
    merged = apply(regmean(stats=stats), models[0], models=models)
    plain = apply(mean(), models[0], models=models)
    np.testing.assert_array_equal(merged["up"]["bias"], plain["up"]["bias"])
    error = lambda p: sum(  # noqa: E731
        float(jnp.square(x @ (p["up"]["kernel"] - m["up"]["kernel"])).mean())
        for m, x in zip(models, data, strict=True)
    )
    assert error(merged) < 0.5 * error(plain)


def test_bfloat16_models_are_fitted_in_float32():
    models, _, stats = problem()
    narrow = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), m) for m in models]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), m) for m in narrow]
    got = apply(regmean(stats=stats), narrow[0], models=narrow)["up"]["kernel"]
    want = apply(regmean(stats=stats), wide[0], models=wide)["up"]["kernel"]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want.astype(jnp.bfloat16)))


def test_a_matrix_without_statistics_is_refused_but_a_head_is_averaged():
    models, _, stats = problem()
    two = [m | {"down": {"kernel": draw(9, 4, 2)}} for m in models]
    message = r"'down/kernel': the statistic 'gram' is missing.*regmean_needs.*models\[0\]"
    with pytest.raises(ValueError, match=message):
        apply(regmean(stats=stats), two[0], models=two)
    heads = [m | {"lm_head": {"kernel": draw(i, 4, 2)}} for i, m in enumerate(models)]
    got = apply(regmean(stats=stats), heads[0], models=heads)["lm_head"]["kernel"]
    want = np.mean([m["lm_head"]["kernel"] for m in heads], axis=0)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_errors_name_the_leaf_and_the_remedy():
    models, _, stats = problem()
    with pytest.raises(ValueError, match="stats has 2 entries, but 3 models were given"):
        apply(regmean(stats=stats[:2]), models[0], models=models)
    other = Stats({"up/kernel": gram(draw(0, 9, 7))})
    with pytest.raises(ValueError, match=r"'up/kernel'.*\(7, 7\).*needs \(6, 6\).*models\[2\]"):
        apply(regmean(stats=[*stats[:2], other]), models[0], models=models)
    thin = [Stats({"up/kernel": gram(draw(i, 1, 6))}) for i in range(3)]
    with pytest.raises(ValueError, match=r"'up/kernel': .* not positive definite .*smaller alpha"):
        apply(regmean(stats=thin, alpha=1.0, damping=0.0), models[0], models=models)
    apply(regmean(stats=thin, alpha=0.9, damping=0.0), models[0], models=models)


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"stats": []}, ValueError, "stats is empty"),
        ({"stats": [{}]}, TypeError, r"stats\[0\] is a dict"),
        ({"alpha": 1.5}, ValueError, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"damping": -1}, ValueError, "damping=-1 must not be negative"),
        ({"weights": [1, -1, 1]}, ValueError, "must not be negative"),
    ],
)
def test_bad_settings_are_refused_when_built(settings, error, words):
    with pytest.raises(error, match=words):
        regmean(**({"stats": problem()[2]} | settings))


def test_a_model_with_nan_is_named():
    models, _, stats = problem()
    bad = [jax.tree.map(np.array, m) for m in models]
    bad[1]["up"]["kernel"][2, 3] = np.nan
    with pytest.raises(ValueError, match=r"'up/kernel': 1 of 24 values of models\[1\]"):
        apply(regmean(stats=stats), models[0], models=bad)


def test_gram_matrices_with_nan_are_an_error_of_their_own():
    models, _, stats = problem()
    entry = stats[0].values["up/kernel"]
    broken = Stats({"up/kernel": entry | {"gram": entry["gram"].at[0, 0].set(jnp.nan)}})
    with pytest.raises(ValueError, match=r"'up/kernel': .* not positive definite .* or not finite"):
        apply(regmean(stats=[broken, *stats[1:]]), models[0], models=models)
