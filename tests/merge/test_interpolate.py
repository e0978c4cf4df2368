"""The line between two models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, partition
from jaxweights.merge import interpolate, interpolate_path, iterate_path
from tests.merge._trees import assert_close, assert_same_bits, finetuned, floats, tree

BASE, MODEL = tree(0), finetuned(tree(0), 1, 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ends_are_the_models_bit_for_bit(dtype):
    narrow = lambda t: jax.tree.map(lambda x: x.astype(dtype), t["dense"])  # noqa: E731
    base, model = narrow(BASE), narrow(MODEL)
    base["bias"] = base["bias"].at[0].set(-0.0)
    for alpha, want in ((0.0, base), (1.0, model)):
        got = apply(interpolate(alpha=alpha), base, models=[model])
        assert_same_bits(got, want)
        np.testing.assert_array_equal(np.signbit(got["bias"]), np.signbit(want["bias"]))


def test_it_is_the_straight_line_in_either_direction():
    got = apply(interpolate(alpha=0.3), BASE, models=[MODEL])
    for ours, first, second in zip(*map(floats, (got, BASE, MODEL)), strict=True):
        np.testing.assert_allclose(ours, 0.7 * first + 0.3 * second, rtol=0, atol=1e-6)
    assert_close(apply(interpolate(alpha=0.7), MODEL, models=[BASE]), got)


def test_the_path_stacks_what_single_points_give():
    alphas = [0.0, 0.25, 1.0]
    path = interpolate_path(BASE, MODEL, alphas)
    points = list(iterate_path(BASE, MODEL, alphas))
    assert [alpha for alpha, _ in points] == alphas
    for i, (_, point) in enumerate(points):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], path), point)
    losses = jax.vmap(lambda params: jnp.square(params["dense"]["kernel"]).sum())(path)
    assert losses.shape == (3,)


def test_the_path_runs_under_jit_and_has_a_derivative():
    path = jax.jit(interpolate_path)(BASE, MODEL, jnp.asarray([0.0, 0.5]))
    assert path["dense"]["kernel"].shape == (2, 7, 5)
    value = lambda a: apply(interpolate(alpha=a), BASE["dense"], models=[MODEL["dense"]])  # noqa: E731
    slope = jax.jacobian(value)(jnp.asarray(0.4))
    want = MODEL["dense"]["kernel"] - BASE["dense"]["kernel"]
    np.testing.assert_allclose(slope["kernel"], want, rtol=0, atol=1e-6)


def test_layers_have_alphas_of_their_own():
    tx = partition((".*/bias", interpolate(alpha=1.0)), (..., interpolate(alpha=0.0)))
    got = apply(tx, BASE, models=[MODEL])["dense"]
    np.testing.assert_array_equal(got["bias"], MODEL["dense"]["bias"])
    np.testing.assert_array_equal(got["kernel"], BASE["dense"]["kernel"])


def test_going_beyond_the_models_must_be_asked_for():
    with pytest.raises(ValueError, match=r"alpha=1.5 lies outside of \[0, 1\].*extrapolate=True"):
        interpolate(alpha=1.5)
    with pytest.raises(ValueError, match=r"merge.interpolate_path: .* outside"):
        interpolate_path(BASE, MODEL, [0.0, -0.5])
    got = apply(interpolate(alpha=2.0, extrapolate=True), BASE, models=[MODEL])
    kernel = 2 * MODEL["dense"]["kernel"] - BASE["dense"]["kernel"]
    np.testing.assert_allclose(got["dense"]["kernel"], kernel, rtol=0, atol=1e-6)


def test_other_numbers_of_models_are_refused():
    with pytest.raises(ValueError, match=r"2 models were given. Pass exactly one"):
        apply(interpolate(), BASE, models=[MODEL, MODEL])
    with pytest.raises(ValueError, match="alphas has shape"):
        interpolate_path(BASE, MODEL, 0.5)
    with pytest.raises(ValueError, match="alpha=nan must be finite"):
        interpolate(alpha=float("nan"))
