"""Barriers of losses whose curves are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from tests.align._models import mlp, mlp_params, random_permutations

X = jax.random.normal(jax.random.key(3), (32, 6))


def double_well(params):
    return (params["x"] ** 2 - 1) ** 2


def test_the_barrier_between_two_wells_is_the_hill_between_them():
    found = align.loss_barrier(double_well, {"x": jnp.float32(-1)}, {"x": jnp.float32(1)})
    assert (found.barrier, found.at, found.midpoint) == (1.0, 0.5, 1.0)
    x = 2 * found.alphas - 1
    np.testing.assert_allclose(found.losses, (x**2 - 1) ** 2, atol=1e-6)
    np.testing.assert_allclose(found.heights, found.losses, atol=1e-6)
    assert len(found.alphas) == 25 and (found.alphas[0], found.alphas[-1]) == (0, 1)


def test_heights_are_above_the_line_between_the_ends():
    """On a line of slope 2 with a bump of height 1 at a quarter, only the bump counts."""

    def loss(params):
        x = params["x"]
        return 2 * x + jnp.maximum(0, 1 - 4 * jnp.abs(x - 0.25))

    found = align.loss_barrier(loss, {"x": jnp.float32(0)}, {"x": jnp.float32(1)})
    np.testing.assert_allclose((found.barrier, found.at), (1.0, 0.25), atol=1e-6)
    np.testing.assert_allclose(found.midpoint, 0.0, atol=1e-6)


def test_a_convex_loss_and_a_single_model_have_no_barrier():
    a, b = mlp_params(6, 5, 3, seed=1), mlp_params(6, 5, 3, seed=2)
    convex = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))  # noqa: E731
    assert align.loss_barrier(convex, a, b).barrier == 0.0
    same = align.loss_barrier(lambda p: jnp.sum(mlp(p, X) ** 2), a, a)
    assert same.barrier == 0.0 and len(set(same.losses)) == 1


def test_the_barrier_is_the_same_from_either_side():
    a, b = mlp_params(6, 8, 3, seed=1), mlp_params(6, 8, 3, seed=2)
    loss = lambda p: -jnp.mean(mlp(p, X) ** 2)  # noqa: E731
    there, back = align.loss_barrier(loss, a, b), align.loss_barrier(loss, b, a)
    assert there.barrier > 0.01
    np.testing.assert_allclose(back.losses[::-1], there.losses, rtol=1e-6)
    np.testing.assert_allclose(back.barrier, there.barrier, rtol=1e-4)
    np.testing.assert_allclose(back.at, 1 - there.at, atol=1e-9)


def test_matching_takes_the_barrier_of_a_renumbered_model_away():
    a = mlp_params(6, 16, 12, 3)
    spec = align.mlp_permutations(a)
    b = align.apply_permutation(spec, a, random_permutations(spec))
    loss = lambda p: jnp.mean((mlp(p, X) - mlp(a, X)) ** 2)  # noqa: E731
    before = align.loss_barrier(loss, a, b)
    found = align.weight_matching(spec, a, b, key=jax.random.key(0))
    after = align.loss_barrier(loss, a, align.apply_permutation(spec, b, found.permutations))
    # The two ends are one model; its loss is the rounding of one program against another.
    assert before.barrier > 0.1 and after.barrier < 1e-12


@pytest.mark.parametrize("options", [{"at_once": 4}, {"traced": False}])
def test_points_together_or_on_the_host_give_the_same_curve(options):
    a, b = mlp_params(6, 8, 3, seed=1), mlp_params(6, 8, 3, seed=2)
    loss = lambda p: jnp.mean(mlp(p, X) ** 2)  # noqa: E731
    plain = align.loss_barrier(loss, a, b, points=7)
    other = align.loss_barrier(loss, a, b, points=7, **options)
    np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5)


def test_ends_are_the_models_bit_for_bit_also_when_narrow():
    a = {"x": jnp.asarray([1.0, 3.0], jnp.bfloat16), "step": jnp.int32(3)}
    b = {"x": jnp.asarray([2.0, 3.0], jnp.bfloat16), "step": jnp.int32(5)}
    seen = []

    def loss(params):
        assert params["x"].dtype == jnp.bfloat16 and int(params["step"]) == 3
        seen.append(np.asarray(params["x"], np.float32))
        return 0.0

    align.loss_barrier(loss, a, b, points=3, traced=False)
    np.testing.assert_array_equal(np.stack(seen), [[1, 3], [1.5, 3], [2, 3]])


def test_wrong_settings_and_models_are_refused():
    a = {"x": jnp.ones(2)}
    for points in (1, 24):
        with pytest.raises(ValueError, match=f"points={points} must be odd and at least 3"):
            align.loss_barrier(double_well, a, a, points=points)
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        align.loss_barrier(double_well, a, a, at_once=0)
    with pytest.raises(ValueError, match=r"loss_fn returned an array of shape \(2,\)"):
        align.loss_barrier(double_well, a, a)
    with pytest.raises(ValueError, match=r"the loss is not finite at \[0.0"):
        align.loss_barrier(lambda p: jnp.log(-jnp.sum(p["x"])), a, a)
    with pytest.raises(ValueError, match=r"'x': is \(3,\) in params_b but \(2,\) in params_a"):
        align.loss_barrier(double_well, a, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="'y': is in only one of the models"):
        align.loss_barrier(double_well, a, a | {"y": jnp.ones(3)})
