import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.align import PermutationSpec, llama_permutations
from jaxweights.quantize import (
    check_same_function,
    fuse_norms,
    learn_rotations,
    random_rotation,
    rotate,
)
from jaxweights.quantize._learn_rotations import cayley_step
from tests.quantize._fold_models import LLAMAS, TOKENS, model

KEY = jax.random.key(0)


def round4(x, axis):
    """Four bits, straight-through."""
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 7
    return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)


def test_steps_stay_orthogonal_and_go_down_the_gradient():
    q = random_rotation(KEY, 16, "orthogonal").dense()
    gradient = jax.random.normal(jax.random.key(1), (16, 16))
    for rate in (1e-3, 1.5, 1e6):
        new = cayley_step(q, gradient, jnp.float32(rate))
        assert np.abs(new @ new.T - np.eye(16)).max() < 2e-6
        assert float(jnp.sum(gradient * (new - q))) < 0
    # The derivative in the step is minus the gradient's part along the orthogonal matrices.
    exact = -(gradient - q @ gradient.T @ q)
    moved = (cayley_step(q, gradient, jnp.float32(1e-3)) - q) / 1e-3
    np.testing.assert_allclose(moved, exact, atol=0.15)
    np.testing.assert_array_equal(
        np.round(cayley_step(q, jnp.zeros((16, 16)), jnp.float32(1.5)) - q, 6), 0
    )


def test_learned_rotations_quantize_better_than_the_drawn_ones_and_keep_the_function():
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    params = {"up": draw(1, 6, 16).at[:, 2].mul(20.0), "down": draw(2, 16, 4)}
    spec = PermutationSpec.of(params, {"up": (None, "hidden"), "down": ("hidden", None)})
    fn = lambda p, x: x @ p["up"] @ p["down"]  # noqa: E731
    x = draw(3, 64, 6)
    truth = fn(params, x)

    def loss(p, x):
        h = round4(x @ p["up"], 1)
        return jnp.mean(jnp.square(h @ round4(p["down"], 0) - truth)) / jnp.mean(truth**2)

    found = learn_rotations(loss, params, spec, [x], widths=["hidden"], steps=60, key=KEY)
    assert found.losses.shape == (61,)
    assert found.losses[-1] < 0.7 * found.losses[0]
    q = np.asarray(found.rotations["hidden"].dense(), np.float64)
    assert np.abs(q @ q.T - np.eye(16)).max() < 1e-5
    tx = rotate(spec, widths=["hidden"], rotations=found.rotations)
    turned = jw.apply(tx, params)
    assert check_same_function(fn, params, turned, [x]) < 1e-5
    np.testing.assert_allclose(loss(turned, x), found.losses[-1], rtol=0.05)


def test_a_llama_is_trained_through_its_turned_weights():
    fn, params, folds = model("gqa")
    layout = jw.infer_layout(fn, params, TOKENS)
    fused = jw.apply(fuse_norms(folds), params, layout=layout)
    truth = fn(fused, TOKENS)

    def loss(p, tokens):
        p = jax.tree_util.tree_map_with_path(
            lambda path, leaf: round4(leaf, -2) if path[-1].key == "kernel" else leaf, p
        )
        return jnp.mean(jnp.square(fn(p, tokens) - truth)) / jnp.mean(truth**2)

    spec = llama_permutations(LLAMAS["gqa"])
    tokens = jnp.asarray(TOKENS, jnp.int32)
    found = learn_rotations(loss, fused, spec, [tokens], steps=8, learning_rate=0.5, key=KEY)
    assert set(found.rotations) == {"residual", "values"}
    assert bool(jnp.isfinite(found.losses).all()) and found.losses.min() < found.losses[0]
    tx = rotate(spec, folds=folds, rotations=found.rotations)
    assert check_same_function(fn, params, jw.apply(tx, params, layout=layout), [TOKENS]) < 2e-5


def test_what_cannot_be_learned_is_refused():
    params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    spec = PermutationSpec.of(params, {"up": (None, "hidden"), "down": ("hidden", None)})
    loss = lambda p, x: jnp.sum(p["up"])  # noqa: E731
    for settings, message in (
        ({"widths": ["mlp"], "key": KEY}, r"'mlp' is no width of the spec. Its widths are \['hid"),
        ({"widths": ["hidden"]}, "'key' is missing: pass key="),
        (
            {"widths": [], "start": {"hidden": random_rotation(KEY, 4)}},
            r"'hidden' is not among widths=\[\]. Add it",
        ),
        ({"widths": ["hidden"], "key": KEY, "steps": 0}, "steps=0 must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_rotations(loss, params, spec, [1], **settings)
    with pytest.raises(ValueError, match="there is no batch"):
        learn_rotations(loss, params, spec, [], widths=["hidden"], key=KEY)
