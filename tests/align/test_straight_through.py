"""straight_through_matching keeps the permutation whose midpoint is best."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxweights import align
from tests.align._models import mlp, mlp_params, random_permutations

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(3), (64, 6))


def loss_against(teacher):
    target = mlp(teacher, X)
    return lambda params, x: jnp.mean((mlp(params, x) - target) ** 2)


def halfway(a, b):
    return jax.tree.map(lambda x, y: (x + y) / 2, a, b)


def test_it_starts_where_weight_matching_ends_and_keeps_the_best():
    a, b = mlp_params(6, 10, 8, 3, seed=1), mlp_params(6, 10, 8, 3, seed=2)
    spec, loss_fn = align.mlp_permutations(a), loss_against(a)
    found = align.straight_through_matching(
        spec, loss_fn, a, b, [X] * 25, key=KEY, optimizer=optax.sgd(0.3)
    )
    assert len(found.losses) == 25 and found.loss == found.losses.min()
    assert found.step == found.losses.argmin()
    moved = align.apply_permutation(spec, b, found.permutations)
    np.testing.assert_allclose(found.loss, loss_fn(halfway(a, moved), X), rtol=1e-5)
    # It improves on its first step, which is weight matching from the same start.
    assert found.loss < 0.95 * found.losses[0]


def test_the_proxy_moves_by_half_the_gradient_at_the_midpoint():
    """With a rate of 0 nothing moves; with one, the second match is to a - rate * grad / 2."""
    a, b = mlp_params(6, 10, 3, seed=1), mlp_params(6, 10, 3, seed=2)
    spec, loss_fn = align.mlp_permutations(a), loss_against(a)
    first = align.weight_matching(spec, a, b, key=KEY)
    middle = halfway(a, align.apply_permutation(spec, b, first.permutations))
    rate = 20.0
    grads = jax.grad(loss_fn)(middle, X)
    proxy = jax.tree.map(lambda x, g: x - rate * g / 2, a, grads)
    second = align.weight_matching(spec, proxy, b, key=KEY)
    assert not np.array_equal(first.permutations["Dense_0"], second.permutations["Dense_0"])
    run = lambda rate: align.straight_through_matching(  # noqa: E731
        spec, loss_fn, a, b, [X] * 2, key=KEY, optimizer=optax.sgd(rate)
    )
    expected = [
        loss_fn(halfway(a, align.apply_permutation(spec, b, x.permutations)), X)
        for x in (first, second)
    ]
    np.testing.assert_allclose(run(rate).losses, expected, rtol=1e-5)
    np.testing.assert_allclose(run(0.0).losses, [expected[0]] * 2, rtol=1e-5)


def test_a_score_decides_where_batches_are_noisy():
    a, b = mlp_params(6, 10, 3, seed=1), mlp_params(6, 10, 3, seed=2)
    spec, loss_fn = align.mlp_permutations(a), loss_against(a)
    noisy = lambda params, batch: loss_fn(params, X) + batch  # noqa: E731
    calls = []

    def score(params):
        calls.append(float(loss_fn(params, X)))
        return calls[-1]

    found = align.straight_through_matching(
        spec,
        noisy,
        a,
        b,
        [5.0, 0.0, 7.0, -3.0] * 3,
        key=KEY,
        score_fn=score,
        optimizer=optax.sgd(20.0),
    )
    assert found.loss == min(calls) and len(calls) == len(set(calls)) > 1


def test_bfloat16_models_and_other_leaves_are_taken():
    a = mlp_params(6, 10, 3)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a) | {"step": jnp.int32(1)}
    spec = align.mlp_permutations(a)
    planted = random_permutations(spec)
    b = align.apply_permutation(spec, narrow, planted)

    def loss_fn(params, x):
        assert params["step"].dtype == jnp.int32
        layers = {k: v for k, v in params.items() if k != "step"}
        return jnp.mean(mlp(layers, x).astype(jnp.float32) ** 2)

    data = [X.astype(jnp.bfloat16)] * 2
    found = align.straight_through_matching(spec, loss_fn, narrow, b, data, key=KEY)
    for name, expected in align.invert(spec, planted).items():
        np.testing.assert_array_equal(found.permutations[name], expected)


def test_wrong_data_is_refused():
    a = mlp_params(6, 5, 3)
    spec = align.mlp_permutations(a)
    with pytest.raises(ValueError, match="batches is empty"):
        align.straight_through_matching(spec, loss_against(a), a, a, [], key=KEY)
    with pytest.raises(ValueError, match="no loss was finite"):
        align.straight_through_matching(
            spec, lambda p, x: jnp.sum(p["Dense_0"]["bias"]) * jnp.nan, a, a, [X], key=KEY
        )
    with pytest.raises(ValueError, match="max_sweeps=0"):
        align.straight_through_matching(spec, loss_against(a), a, a, [X], key=KEY, max_sweeps=0)
