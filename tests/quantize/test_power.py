import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import Grid, decode, power, power_errors, power_matrix, quantize_matrix
from jaxweights.quantize._power import EXPONENTS
from jaxweights.weights import Axes, Masked, Rescaled
from tests.quantize._normal import error_on_normal_weights, normal_weight

WEIGHT = jax.random.normal(jax.random.key(0), (64, 24))


def power_by_loops(weight, bits, exponent, group):
    """Codes and values from the equations, in float64."""
    top = 2 ** (bits - 1) - 1
    codes, dense = np.zeros(weight.shape), np.zeros(weight.shape)
    for r in range(0, len(weight), group):
        block = weight[r : r + group].astype(np.float64)
        amax = np.abs(block).max(0)
        amax[amax == 0] = 1
        q = np.round(top * np.sign(block) * (np.abs(block) / amax) ** exponent)
        codes[r : r + group] = q
        dense[r : r + group] = np.sign(q) * amax * (np.abs(q) / top) ** (1 / exponent)
    return codes, dense


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.0])
def test_codes_and_values_are_those_of_the_equations(bits, exponent):
    weight = np.array(WEIGHT)
    weight[:16, 3] = 0
    run = jax.jit(lambda w: power_matrix(w, bits=bits, group_size=16, exponents=[exponent]))
    ours = run(jnp.asarray(weight))
    codes, dense = power_by_loops(weight, bits, exponent, 16)
    # A power in float32 moves what lies on a tie.
    same = np.asarray(ours.codes_matrix()) - (2.0 ** (bits - 1) - 1) == codes
    assert same.mean() > 0.999
    np.testing.assert_allclose(np.where(same, ours.materialize(), dense), dense, rtol=2e-5)


@pytest.mark.parametrize("bits, group", [(3, 16), (4, None), (8, None)])
def test_without_a_power_it_is_the_narrow_grid_bit_for_bit(bits, group):
    ours = power_matrix(WEIGHT, bits=bits, group_size=group, exponents=[1.0])
    narrow = quantize_matrix(WEIGHT, Grid("narrow", bits, group))
    top = 2 ** (bits - 1) - 1
    assert np.array_equal(np.asarray(ours.codes_matrix()).astype(int) - top, narrow.codes)
    spread = jnp.repeat(narrow.scale, 64 // narrow.scale.shape[0], 0)
    assert np.array_equal(ours.materialize(), decode(narrow.codes, spread, None))


def test_it_is_odd_keeps_zero_and_the_extremes_and_ignores_scale():
    run = lambda w: power_matrix(w, bits=4, exponents=[0.6])  # noqa: E731
    ours, mirrored, scaled = run(WEIGHT), run(-WEIGHT), run(8 * WEIGHT)
    assert np.array_equal(ours.materialize(), -mirrored.materialize())
    assert np.array_equal(ours.codes, scaled.codes)
    extreme = np.abs(np.asarray(WEIGHT)).argmax(0)
    at = lambda x: np.asarray(x)[extreme, np.arange(24)]  # noqa: E731
    np.testing.assert_allclose(at(ours.materialize()), at(WEIGHT), rtol=1e-6)
    assert not np.any(run(WEIGHT.at[5].set(0)).materialize()[5])
    assert not np.any(run(jnp.zeros((8, 2))).materialize())


@pytest.mark.parametrize(
    "bits, group, exponent, gain", [(4, None, 0.7, 0.74), (4, 128, 0.8, 0.85), (8, None, 0.7, 0.74)]
)
def test_on_normal_weights_exponent_and_gain_are_the_known_ones(bits, group, exponent, gain):
    errors = power_errors(normal_weight()[:, :64], bits=bits, group_size=group)
    assert EXPONENTS[int(jnp.argmin(errors))] == pytest.approx(exponent, abs=0.05)
    assert float(errors.min() / errors[-1]) == pytest.approx(gain, rel=0.03)  # the last is 1
    # Convex about the minimum: so a list replaces a search.
    assert np.all(np.diff(np.sign(np.diff(errors))) >= 0)


def test_the_error_on_normal_weights_is_the_known_one():
    error = error_on_normal_weights(
        lambda w: power_matrix(w, bits=4, group_size=128, exponents=[0.76])
    )
    assert error == pytest.approx(1.17e-2, rel=0.03)


def test_errors_are_those_of_the_matrices():
    exponents = [0.4, 0.7, 1.0]
    errors = power_errors(WEIGHT, bits=3, group_size=16, exponents=exponents)
    for exponent, error in zip(exponents, errors, strict=True):
        dense = power_matrix(WEIGHT, bits=3, group_size=16, exponents=[exponent]).materialize()
        np.testing.assert_allclose(error, jnp.sum((dense - WEIGHT) ** 2), rtol=1e-5)


def test_one_exponent_serves_the_tree_and_is_the_one_of_the_least_sum_of_norms():
    params = {
        "flat": jnp.sign(WEIGHT) * jnp.abs(WEIGHT) ** 0.1,  # for which 1 is best
        "stack": jax.random.t(jax.random.key(1), 3.0, (3, 64, 24)),
        "bias": jnp.ones(8),
    }
    layout = {"stack": Axes()}
    matrices = [params["flat"], *params["stack"]]
    errors = jnp.stack([power_errors(w, bits=4) for w in matrices])
    best = EXPONENTS[int(jnp.argmin(jnp.sqrt(errors).sum(0)))]
    alone = [EXPONENTS[int(jnp.argmin(e))] for e in errors]
    assert len({best, *alone}) > 2  # that leaves differ
    whole = jw.apply(power(bits=4), params, layout=layout)
    for i, leaf in enumerate([whole["flat"], *(whole["stack"].matrix()[i] for i in range(3))]):
        dense = leaf.materialize() if i == 0 else leaf
        expected = power_matrix(matrices[i], bits=4, exponents=[best]).materialize()
        np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-6)
    single = jw.apply(power(bits=4, scope="leaf"), params, layout=layout)
    assert np.array_equal(single["flat"].table, power_matrix(matrices[0], bits=4).table)
    for i in range(3):
        expected = power_matrix(matrices[i + 1], bits=4, exponents=[alone[i + 1]])
        np.testing.assert_allclose(single["stack"].table[i], expected.table, rtol=1e-6)
    assert whole["bias"] is params["bias"]


def test_a_weight_behind_a_change_of_its_inputs_counts_as_its_base():
    base = {"a": WEIGHT, "b": jnp.sign(WEIGHT) * jnp.abs(WEIGHT) ** 0.1}
    scale = jnp.linspace(0.5, 2, WEIGHT.shape[0])
    kept = {name: Rescaled.of(leaf, scale) for name, leaf in base.items()}
    expected, new = (jw.apply(power(bits=4), tree) for tree in (base, kept))
    for name in "ab":
        assert np.array_equal(new[name].base.materialize(), expected[name].materialize())


def test_a_masked_leaf_counts_as_what_is_left_of_it():
    mask = jnp.arange(64)[:, None] % 2 == 0
    leaf = Masked(WEIGHT, jnp.broadcast_to(mask, WEIGHT.shape))
    new = jw.apply(power(bits=4), {"kernel": leaf})["kernel"]
    assert isinstance(new, Masked)
    expected = jw.apply(power(bits=4), {"kernel": leaf.materialize()})["kernel"]
    assert np.array_equal(new.materialize(), expected.materialize())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bits": 1}, "quantize.power: bits=1 must lie between 2 and 8"),
        ({"bits": 4, "exponents": [0.5, 1.3]}, "quantize.power: exponent 1.3 must lie in (0, 1]."),
        ({"bits": 4, "exponents": [0]}, "quantize.power: exponent 0 must lie in (0, 1]."),
        ({"bits": 4, "exponents": []}, "exponents is empty. Give at least one, such as [0.7]."),
        ({"bits": 4, "scope": "net"}, "scope='net' is unknown. Choose 'tree' or 'leaf'."),
    ],
)
def test_settings_are_checked_when_built(settings, words):
    with pytest.raises(ValueError) as raised:
        power(**settings)
    assert words in str(raised.value)


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_bad_leaves_are_refused_by_name(scope):
    params = {"a": jnp.ones((100, 8)), "b": WEIGHT}
    with pytest.raises(ValueError, match=r"quantize\.power: 'a': group_size=64 does not divide"):
        jw.apply(power(bits=4, group_size=64, scope=scope), params)
    with pytest.raises(ValueError, match="'b': 1 of 24 blocks hold values that are not finite"):
        jw.apply(power(bits=4, scope=scope), {"a": WEIGHT, "b": WEIGHT.at[3, 4].set(jnp.inf)})
