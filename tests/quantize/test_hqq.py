import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import Grid, Shrinkage, hqq, hqq_matrix, quantize_matrix
from jaxweights.weights import Axes, Quantized
from tests._fixtures import fixture
from tests.quantize._normal import error_on_normal_weights

WEIGHT = jax.random.normal(jax.random.key(0), (64, 24))


def hqq_by_loops(groups, bits, *, best, steps=20, norm=0.7, beta=10.0, growth=1.01):
    """`(group, n)` columns. With `best` False it stops, and forgets, as the authors do."""
    top = 2**bits - 1
    low, high = groups.min(0), groups.max(0)
    inverse = np.float32(top) / (high - low)
    zero = -low * inverse
    kept, least, mean_least = zero, np.full(zero.shape, np.inf), np.inf
    for step in range(steps + best):
        codes = np.clip(np.round(groups * inverse + zero), 0, top)
        missed = groups - (codes - zero) / inverse
        error = np.abs(missed).mean(0)
        kept = np.where(error < least, zero, kept)
        least = np.minimum(error, least)
        with np.errstate(divide="ignore"):
            size = np.abs(missed)
            outliers = np.sign(missed) * np.maximum(size - size ** (norm - 1) / beta, 0)
        zero = (codes - (groups - outliers) * inverse).mean(0, dtype=np.float32)
        beta *= growth
        if not best and size.mean() >= mean_least:
            break
        mean_least = size.mean()
        if best and step == steps:
            zero = kept
    codes = np.clip(np.round(groups * inverse + zero), 0, top)
    return codes, 1 / inverse, zero, (codes - zero) / inverse


CASES = [("b2_g16_axis1", 2, 16), ("b3_g32_axis1", 3, 32), ("b4_g64_axis1", 4, 64)]
CASES += [("b8_gNone_axis1", 8, 96)]


@pytest.mark.parametrize("case, bits, group", CASES)
def test_the_slow_definition_stopped_as_theirs_is_the_authors(case, bits, group):
    stored = fixture("quantize/hqq.npz")
    groups = stored["W"].reshape(-1, group).T
    codes, scale, zero, dense = hqq_by_loops(groups, bits, best=False)
    np.testing.assert_allclose(scale, stored[f"fixed/{case}/scale"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(zero, stored[f"fixed/{case}/zero"][:, 0], atol=1e-3)
    assert np.mean(codes.T == stored[f"fixed/{case}/Wq"]) > 0.99
    np.testing.assert_allclose(dense.T.ravel(), stored[f"fixed/{case}/dq"].ravel(), atol=1e-4)


@pytest.mark.parametrize("case, bits, group", CASES)
def test_no_group_errs_more_than_with_the_authors_offsets(case, bits, group):
    stored = fixture("quantize/hqq.npz")
    groups = stored["W"].reshape(-1, group).T
    ours = jax.jit(lambda w: hqq_matrix(w, bits=bits, group_size=None))(jnp.asarray(groups))
    error = np.abs(ours.materialize() - groups).mean(0)
    theirs = np.abs(stored[f"fixed/{case}/dq"].reshape(-1, group).T - groups).mean(0)
    assert np.all(error <= theirs * (1 + 1e-5))
    assert error.mean() < 0.9999 * theirs.mean()


@pytest.mark.parametrize("bits, group", [(2, 16), (4, 64)])
def test_it_is_the_slow_definition_that_keeps_the_best_offset(bits, group):
    ours = hqq_matrix(WEIGHT, bits=bits, group_size=group)
    groups = np.asarray(WEIGHT).reshape(-1, group, 24).transpose(1, 0, 2).reshape(group, -1)
    _, scale, _, dense = hqq_by_loops(groups, bits, best=True)
    np.testing.assert_allclose(ours.scale.ravel(), scale, rtol=1e-6)
    # Many offsets err alike, and the last bit decides between them: errors are compared.
    back = lambda x: x.reshape(group, -1, 24).transpose(1, 0, 2).reshape(64, 24)  # noqa: E731
    by_group = lambda x: np.abs(x - np.asarray(WEIGHT)).reshape(-1, group, 24).mean(1)  # noqa: E731
    np.testing.assert_allclose(by_group(ours.materialize()), by_group(back(dense)), rtol=2e-4)


@pytest.mark.parametrize("bits, expected", [(4, 7.4e-3), (3, 3.3e-2), (2, 0.189)])
def test_the_error_on_normal_weights_is_the_known_one(bits, expected):
    error = error_on_normal_weights(lambda w: hqq_matrix(w, bits=bits))
    assert error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", ["normal", "heavy tails"])
@pytest.mark.parametrize("bits", [2, 3])
def test_no_group_errs_more_than_where_it_starts_or_with_fewer_steps(bits, shape):
    weight = WEIGHT if shape == "normal" else jax.random.t(jax.random.key(1), 3.0, (64, 24))
    groups = lambda x: jnp.abs(x - weight).reshape(4, 16, 24).mean(1)  # noqa: E731
    by_steps = [
        groups(hqq_matrix(weight, bits=bits, group_size=16, steps=steps).materialize())
        for steps in (0, 3, 20)
    ]
    for fewer, more in itertools.pairwise(by_steps):
        assert jnp.all(more <= fewer * (1 + 1e-5))
        assert more.mean() < fewer.mean()


def test_outliers_are_left_out_of_the_mean_where_beta_says_so():
    weight = jnp.concatenate([jnp.linspace(0, 1, 63), jnp.array([40.0])])[:, None]
    plain = hqq_matrix(weight, bits=2, group_size=64, shrinkage=Shrinkage(beta=1e-9))
    careful = hqq_matrix(weight, bits=2, group_size=64, shrinkage=Shrinkage(beta=10.0))
    assert float(plain.offset[0, 0]) != float(careful.offset[0, 0])


def test_a_shift_moves_the_offset_only():
    # Whole numbers, so that the shifted weights are exact.
    weight = jnp.round(WEIGHT * 16)
    plain = hqq_matrix(weight, bits=3, group_size=16)
    moved = hqq_matrix(weight + 512, bits=3, group_size=16)
    assert np.array_equal(plain.scale, moved.scale)
    np.testing.assert_allclose(moved.offset, plain.offset + 512, atol=0.1)
    error = lambda x, w: np.abs(x.materialize() - w).reshape(4, 16, 24).mean(1)  # noqa: E731
    np.testing.assert_allclose(error(plain, weight), error(moved, weight + 512), rtol=1e-3)


def test_equal_weights_are_exact_and_zeros_are_zeros():
    weight = jnp.full((64, 3), 5.3).at[:, 1].set(0.0).at[:, 2].set(-1e-30)
    assert np.array_equal(hqq_matrix(weight, bits=4).materialize(), weight)


def test_codes_are_chosen_for_the_stored_scale_and_offset():
    half = hqq_matrix(WEIGHT, bits=4, group_size=16, scale_dtype=jnp.bfloat16)
    assert half.scale.dtype == half.offset.dtype == jnp.bfloat16
    spread = lambda x: np.repeat(np.asarray(x).astype(np.float32), 16, 0)  # noqa: E731
    expected = np.clip(np.round((WEIGHT - spread(half.offset)) / spread(half.scale)), 0, 15)
    assert np.array_equal(half.codes_matrix(), expected)


def test_no_steps_is_rounding_to_the_range_with_a_floating_zero():
    ours = hqq_matrix(WEIGHT + 3, bits=4, group_size=16, steps=0)
    assert np.array_equal(ours.offset, (WEIGHT + 3).reshape(4, 16, 24).min(1))
    integer = quantize_matrix(WEIGHT + 3, Grid("affine", 4, 16))  # whose grids hold 0
    assert np.all(np.asarray(ours.scale) <= np.asarray(integer.scale))
    assert ours.scale.mean() < 0.9 * integer.scale.mean()


def test_stacks_of_heads_become_quantized_weights_with_offsets():
    stack = jnp.stack([WEIGHT, 2 * WEIGHT]).reshape(2, 64, 4, 6)
    layout = {"w": Axes(inputs=(-3,), outputs=(-2, -1))}
    leaf = jw.apply(hqq(bits=4, group_size=16), {"w": stack}, layout=layout)["w"]
    assert isinstance(leaf, Quantized)
    assert leaf.offset.shape == (2, 4, 24)
    alone = hqq_matrix(WEIGHT, bits=4, group_size=16)
    np.testing.assert_allclose(
        leaf.materialize()[0].reshape(64, 24), alone.materialize(), rtol=1e-5
    )


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"bits": 1}, ValueError, "quantize.hqq: bits=1 must lie between 2 and 8"),
        ({"bits": 4, "group_size": (8, 8)}, TypeError, "group_size=(8, 8) must be an integer, N"),
        (
            {"bits": 4, "steps": -1},
            ValueError,
            "quantize.hqq: steps=-1 must be an integer of at least 0",
        ),
        ({"bits": 4, "shrinkage": Shrinkage(norm=2.0)}, ValueError, "must have norm in (0, 1]"),
        ({"bits": 4, "shrinkage": {"norm": 0.5}}, TypeError, "is no Shrinkage. Pass such as"),
        ({"bits": 4, "scale_dtype": jnp.int8}, TypeError, "must be float32, bfloat16 or float16"),
    ],
)
def test_settings_are_checked_when_built(settings, error, words):
    with pytest.raises(error) as raised:
        hqq(**settings)
    assert words in str(raised.value)


def test_values_that_are_not_finite_are_refused():
    bad = {"kernel": WEIGHT.at[20, 1].set(jnp.nan)}
    with pytest.raises(
        ValueError, match="'kernel': 1 of 24 blocks hold values that are not finite"
    ):
        jw.apply(hqq(bits=4), bad)


def test_weights_that_are_almost_equal_keep_their_differences_where_offsets_can_hold_them():
    weight = 1 + 1e-4 * jax.random.uniform(jax.random.key(0), (64, 4))
    found = {
        dtype: jw.apply(hqq(bits=4, group_size=64, scale_dtype=dtype), {"kernel": weight})["kernel"]
        for dtype in ("float32", "float16")
    }
    spread = float(weight.max() - weight.min())
    assert jnp.abs(found["float32"].materialize() - weight).max() < spread / 15
    assert jnp.abs(found["float16"].materialize() - weight).max() <= 1e-4  # all are 1
