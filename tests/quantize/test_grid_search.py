"""Where the range of a grid ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import Grid, quantize_matrix
from tests.quantize._grid import dequantized


@pytest.mark.parametrize("search", ["mse", 99.0])
def test_the_searches_also_show_values_that_are_not_finite(search):
    weight = jax.random.normal(jax.random.key(0), (64, 3)).at[5, 1].set(jnp.nan)
    scale = quantize_matrix(weight, Grid("affine", 4, 32, search=search)).scale
    assert np.argwhere(~np.isfinite(np.asarray(scale))).tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", ["signed_max", "affine"])
def test_the_mse_search_lowers_the_error_it_minimises(kind):
    weight = jax.random.normal(jax.random.key(0), (256, 16))
    error = {
        search: np.sum(
            np.abs(
                dequantized(quantize_matrix(weight, Grid(kind, 3, 128, search=search)), (256, 16))
                - weight
            )
            ** 2.4
        )
        for search in ("absmax", "mse")
    }
    assert error["mse"] < 0.95 * error["absmax"]


@pytest.mark.parametrize("kind", ["narrow", "full", "half", "signed_max", "gptq_sym"])
@pytest.mark.parametrize("group", [None, 8, "tensor"])
def test_a_range_of_so_many_root_mean_squares(kind, group):
    weight = np.random.default_rng(1).normal(size=(32, 5)).astype(np.float32)
    weight[3, 2] = 50.0
    groups = {None: weight[None], 8: weight.reshape(4, 8, 5), "tensor": weight.reshape(1, -1, 1)}
    g = groups[group]
    end = 2.5 * np.sqrt(np.mean(g.astype(np.float64) ** 2, axis=1))
    largest = np.take_along_axis(g, np.abs(g).argmax(1)[:, None], 1)[:, 0]
    steps = {"narrow": 7, "full": 7, "half": 7.5, "signed_max": -8 * np.sign(largest)}
    codes = quantize_matrix(weight, Grid(kind, 4, group, search=("rms", 2.5)))
    np.testing.assert_allclose(codes.scale, end / steps.get(kind, 7.5), rtol=1e-6)
    zero = 0 if codes.zero_point is None else 8
    low, high = Grid(kind, 4).code_range
    units = g / (end / steps.get(kind, 7.5))[:, None]
    expected = np.clip(np.round(units) + zero, low, high).reshape(32, 5)
    np.testing.assert_array_equal(codes.codes, expected)
    assert codes.codes[3, 2] in (low, high)  # the outlier is clipped


def test_root_mean_squares_give_qwix_its_codes():
    # Of qwix 0.1.8's `quantize`, channelwise_axes=(1,), tiled_axes={0: 8}, "rms,2.0", int4.
    theirs = """-3 -5 -1 2 5 1 -2 -3 4 6 1 -6 -4 7 1 -6 0 -6 -2 -2 -4 2 0 -3
                1 4 -6 -1 -4 -1 -5 0 0 -1 -5 -1 -4 -6 1 -4 5 3 -7 1 -4 0 0 -7"""
    weight = np.random.default_rng(5).normal(size=(16, 3)).astype(np.float32)
    ours = quantize_matrix(weight, Grid("half", 4, 8, search=("rms", 2.0)))
    np.testing.assert_array_equal(ours.codes.reshape(-1), [int(x) for x in theirs.split()])
    scales = [[0.27355433, 0.24118242, 0.19789875], [0.27330011, 0.23154065, 0.2768003]]
    np.testing.assert_allclose(ours.scale, scales, rtol=1e-6)


def test_root_mean_squares_of_zeros_of_tiny_and_of_huge_weights():
    grid = Grid("narrow", 4, 8, search=("rms", 2.0))
    weight = jax.random.normal(jax.random.key(0), (16, 3)).at[8:, 1].set(0.0)
    plain = quantize_matrix(weight, grid)
    assert float(plain.scale[1, 1]) == 1 and not np.any(plain.codes[8:, 1])
    for power in (-100, 100):  # whose squares float32 does not hold
        scaled = quantize_matrix(weight * 2.0**power, grid)
        np.testing.assert_array_equal(scaled.codes, plain.codes)
        expected = np.where(plain.scale == 1, 1, plain.scale * 2.0**power)
        np.testing.assert_array_equal(scaled.scale, expected)
    for bad in (np.nan, np.inf):
        scale = quantize_matrix(weight.at[5, 0].set(bad), grid).scale
        assert np.argwhere(~np.isfinite(np.asarray(scale))).tolist() == [[0, 0]]


def test_an_outlier_moves_a_root_mean_square_less_than_a_largest_magnitude():
    weight = jax.random.normal(jax.random.key(0), (256, 4)).at[7].set(40.0)
    others = np.arange(256) != 7

    def error(search):
        codes = quantize_matrix(weight, Grid("narrow", 4, search=search))
        return np.mean((np.asarray(dequantized(codes, weight.shape)) - weight)[others] ** 2)

    assert error(("rms", 1.0)) < 0.1 * error("absmax")


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100])
def test_a_percentile_is_an_entry_with_so_many_at_or_below_it(percentile):
    weight = jax.random.normal(jax.random.key(0), (200, 4))
    codes = quantize_matrix(weight, Grid("affine", 8, search=percentile))
    kept = round(2 * percentile)
    ordered = np.sort(np.asarray(weight), axis=0)
    high, low = ordered[kept - 1], ordered[200 - kept]
    np.testing.assert_allclose(codes.scale[0], (high - low) / 255, rtol=1e-6)
