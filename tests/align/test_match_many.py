"""match_many brings several models together, and stops where no single one can come closer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from jaxweights.core import flatten
from tests.align._models import mlp_params, random_permutations

KEY = jax.random.key(0)


def objective(a, b):
    a, b = flatten(a)[0], flatten(b)[0]
    return sum(float(np.vdot(np.float64(a[path]), np.float64(b[path]))) for path in a)


def agreement(models):
    return sum(objective(a, b) for i, a in enumerate(models) for b in models[i + 1 :])


def test_renumbered_copies_become_one_model():
    a = mlp_params(12, 24, 20, 8)
    spec = align.mlp_permutations(a)
    models = [align.apply_permutation(spec, a, random_permutations(spec, i)) for i in range(3)]
    found = align.match_many(spec, models, key=KEY)
    moved = [
        align.apply_permutation(spec, model, perms)
        for model, perms in zip(models, found.permutations, strict=True)
    ]
    assert found.converged
    for other in moved[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, moved[0])
    # Equal models keep their mean bit for bit.
    jax.tree.map(np.testing.assert_array_equal, found.average, moved[0])


def test_no_model_can_come_closer_to_the_mean_of_the_others():
    models = [mlp_params(6, 16, 12, 3, seed=i) for i in range(4)]
    spec = align.mlp_permutations(models[0])
    found = align.match_many(spec, models, key=KEY)
    assert found.converged and found.rounds > 1
    moved = [
        align.apply_permutation(spec, model, perms)
        for model, perms in zip(models, found.permutations, strict=True)
    ]
    assert (np.diff(found.objective) > 0).all()
    np.testing.assert_allclose(found.objective[0], agreement(models), atol=1e-3)
    np.testing.assert_allclose(found.objective[-1], agreement(moved), rtol=1e-4)
    for i in range(4):
        others = jax.tree.map(lambda *x: sum(x) / 3, *(m for j, m in enumerate(moved) if j != i))
        assert len(align.weight_matching(spec, others, moved[i], key=KEY).objective) == 1
    mean = jax.tree.map(lambda *x: sum(x) / 4, *moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.average, mean)


def test_two_models_come_as_close_as_by_weight_matching():
    a, b = mlp_params(6, 16, 3, seed=1), mlp_params(6, 16, 3, seed=2)
    spec = align.mlp_permutations(a)
    found = align.match_many(spec, [a, b], key=KEY)
    alone = align.weight_matching(spec, a, b, key=KEY)
    # One hidden layer is one assignment, whose value does not depend on who moves.
    np.testing.assert_allclose(found.objective[-1], alone.objective[-1], rtol=1e-5)


def test_narrow_models_are_averaged_in_float32_and_other_leaves_kept():
    spec = align.PermutationSpec({"x": ("p",)}, sizes={"p": 2})
    models = [
        {"x": jnp.asarray(x, jnp.bfloat16), "step": jnp.int32(i)}
        for i, x in enumerate(([1.0, 2.0], [4.0, 1.0], [2.0, 4.0]))
    ]
    found = align.match_many(spec, models, key=KEY)
    assert found.average["x"].dtype == jnp.bfloat16 and int(found.average["step"]) == 0
    np.testing.assert_allclose(np.sort(np.float32(found.average["x"])), [4 / 3, 10 / 3], rtol=4e-3)


def test_wrong_models_are_refused():
    a = mlp_params(6, 5, 3)
    spec = align.mlp_permutations(a)
    with pytest.raises(ValueError, match=r"1 models were given. Pass at least two"):
        align.match_many(spec, [a], key=KEY)
    with pytest.raises(ValueError, match="max_rounds=0 must be at least 1"):
        align.match_many(spec, [a, a], key=KEY, max_rounds=0)
    with pytest.raises(
        ValueError, match=r"'Dense_0/kernel': is \(7, 5\) in models\[2\] but \(6, 5\)"
    ):
        align.match_many(spec, [a, a, mlp_params(7, 5, 3)], key=KEY)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.inf), a)
    with pytest.raises(ValueError, match=r"models\[1\]: 'Dense_0/bias': 1 of 5 values"):
        align.match_many(spec, [a, bad], key=KEY)
