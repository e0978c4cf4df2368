"""Tests of task vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import add_task_vector, mean, task_arithmetic, task_vector
from tests.merge._trees import assert_close, finetuned, tree

BASE = tree(0)
MODELS = [finetuned(BASE, seed) for seed in (1, 2)]


def test_base_plus_task_vector_is_the_model():
    assert_close(add_task_vector(BASE, task_vector(MODELS[0], BASE)), MODELS[0])


def test_adding_and_taking_away_gives_the_base_back():
    vector = task_vector(MODELS[0], BASE)
    there = add_task_vector(BASE, vector)
    assert_close(add_task_vector(there, vector, scale=-1), BASE)


def test_task_vectors_are_trees_to_calculate_with():
    first, second = (task_vector(model, BASE) for model in MODELS)
    total = jax.tree.map(lambda a, b: a + 2 * b, first, second)
    want = apply(task_arithmetic(weights=[1, 2]), BASE, models=MODELS)
    assert_close(add_task_vector(BASE, total), want)


def test_a_negative_weight_takes_a_skill_away_and_weights_complete_an_analogy():
    a, b, c = ({"w": jnp.full(2, x)} for x in (1.0, 3.0, 10.0))
    zero = {"w": jnp.zeros(2)}
    negated = apply(task_arithmetic(weights=[-1], scale=0.5), zero, models=[b])
    np.testing.assert_array_equal(negated["w"], -1.5)
    analogy = apply(task_arithmetic(weights=[1, 1, -1]), zero, models=[c, b, a])
    np.testing.assert_array_equal(analogy["w"], 12.0)


def test_normalising_keeps_the_sign_of_a_negative_weight():
    # Divided by the weight itself, -1 would cancel.
    got = apply(
        task_arithmetic(weights=[-1], normalize=True),
        {"w": jnp.zeros(1)},
        models=[{"w": jnp.array([0.3])}],
    )
    np.testing.assert_allclose(got["w"], [-0.3], rtol=1e-6)


def test_it_is_linear_in_the_scale():
    merged = [
        task_vector(apply(task_arithmetic(scale=s), BASE, models=MODELS), BASE) for s in (1.0, 3.0)
    ]
    assert_close(jax.tree.map(lambda x: 3 * x, merged[0]), merged[1], ulps=8)


def test_it_equals_the_mean_where_the_weights_are_one_over_n():
    got = apply(task_arithmetic(scale=0.5), BASE, models=MODELS)
    assert_close(got, apply(mean(), BASE, models=MODELS))


def test_scale_and_weights_are_differentiable_as_the_gradient_says():
    # dL/d(scale) is the dot product of dL/d(merged) with the summed task vector.
    target = tree(5)

    def loss(params):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(_floats, (params, target))))

    def merged(scale, weights):
        return apply(task_arithmetic(scale=scale, weights=weights), BASE, models=MODELS)

    weights = jnp.array([0.5, 2.0])
    slopes = jax.grad(lambda s, w: loss(merged(s, w)), argnums=(0, 1))(0.7, weights)
    vectors = [_floats(task_vector(model, BASE)) for model in MODELS]
    gradient = _floats(jax.grad(loss, allow_int=True)(merged(0.7, weights)))
    dots = [sum(float(jnp.vdot(g, t)) for g, t in zip(gradient, v)) for v in vectors]
    np.testing.assert_allclose(slopes[1], [0.7 * dot for dot in dots], rtol=1e-4)
    np.testing.assert_allclose(slopes[0], 0.5 * dots[0] + 2.0 * dots[1], rtol=1e-4)


def _floats(params):
    return [params["dense"]["bias"], params["dense"]["kernel"]]


def test_small_deltas_of_bfloat16_models_are_exact():
    base = {"w": jnp.array([1.0, -2.0], jnp.bfloat16)}
    model = {"w": jnp.array([1.0078125, -2.015625], jnp.bfloat16)}
    vector = task_vector(model, base)
    assert vector["w"].dtype == jnp.float32
    np.testing.assert_array_equal(vector["w"], [0.0078125, -0.015625])


def test_trees_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"merge.task_vector: models\[0\] lacks \['step'\]"):
        task_vector({"dense": BASE["dense"]}, BASE)
    with pytest.raises(ValueError, match=r"merge.add_task_vector"):
        add_task_vector(BASE, {"dense": {"bias": BASE["dense"]["bias"]}})
