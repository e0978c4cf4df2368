import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import Grid, decode, quantize_matrix
from jaxweights.quantize._grid import make_grid
from jaxweights.weights._divide import divide
from tests._fixtures import fixture
from tests.quantize._grid import KINDS, dequantized


def grid_by_loops(weight, kind, bits, group):
    """The table of the docstring in NumPy, one group after another."""
    in_dim, out_dim = weight.shape
    top, levels = 2 ** (bits - 1) - 1, 2**bits - 1
    codes = np.zeros(weight.shape, int)
    scales = np.zeros((in_dim // group, out_dim), np.float32)
    zeros = np.zeros_like(scales)
    for r in range(in_dim // group):
        for o in range(out_dim):
            w = weight[r * group : (r + 1) * group, o]
            low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
            amax = max(-low, high)
            scale = {
                "narrow": amax / np.float32(top),
                "full": amax / np.float32(top),
                "half": amax / np.float32(top + 0.5),
                "signed_max": (high if high > -low else low) / np.float32(-(top + 1)),
                "affine": (high - low) / np.float32(levels),
                "gptq_sym": 2 * amax / np.float32(levels),
            }[kind]
            scale = scale if scale != 0 else np.float32(1)
            unsigned = kind in ("affine", "gptq_sym")
            bottom = {"narrow": -top}.get(kind, 0 if unsigned else -top - 1)
            largest = levels if unsigned else top
            if kind == "affine":
                zeros[r, o] = np.clip(np.round(-low / scale), 0, levels)
            elif kind == "gptq_sym":
                zeros[r, o] = top + 1
            scales[r, o] = scale
            steps = np.round(w / scale) + zeros[r, o]
            codes[r * group : (r + 1) * group, o] = np.clip(steps, bottom, largest)
    return codes, scales, zeros


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, compiled", [(2, False), (3, False), (4, True), (8, False)])
def test_codes_and_scales_equal_those_of_the_table(kind, bits, compiled):
    weight = np.random.default_rng(bits).normal(size=(48, 5)).astype(np.float32)
    weight[16:32, 1] = 0  # a group of zeros
    weight[:16, 2] = np.abs(weight[:16, 2])  # one that is never negative
    weight[:16, 3] = -np.abs(weight[:16, 3])
    run = jax.jit(quantize_matrix, static_argnums=1) if compiled else quantize_matrix
    ours = run(jnp.asarray(weight), Grid(kind, bits, 16))
    codes, scales, zeros = grid_by_loops(weight, kind, bits, 16)
    assert np.array_equal(ours.scale, scales)
    assert np.array_equal(ours.codes, codes)
    assert np.array_equal(0 * zeros if ours.zero_point is None else ours.zero_point, zeros)


GOLDEN = [
    (8, 128, {"narrow": 4.18e-5, "affine": 3.50e-5}),
    (4, None, {"narrow": 2.47e-2, "half": 2.16e-2, "signed_max": 1.89e-2, "affine": 1.95e-2}),
    (4, 128, {"narrow": 1.38e-2, "half": 1.23e-2, "signed_max": 1.07e-2, "affine": 1.01e-2}),
    (4, 32, {"narrow": 9.41e-3, "half": 8.99e-3, "signed_max": 7.39e-3, "affine": 6.53e-3}),
    (3, 128, {"narrow": 7.50e-2, "half": 5.63e-2, "signed_max": 4.32e-2, "affine": 4.64e-2}),
    (2, 64, {"narrow": 0.515, "half": 0.261, "signed_max": 0.156, "affine": 0.209}),
]


@pytest.mark.parametrize(
    "bits, group, kind, expected",
    [(bits, group, kind, error) for bits, group, row in GOLDEN for kind, error in row.items()],
)
def test_error_on_normal_weights_is_the_known_one(bits, group, kind, expected):
    # Measured elsewhere to three digits on another draw; 512 columns of 4096 vary by under 1 %.
    weight = jax.random.normal(jax.random.key(0), (4096, 256))
    codes = quantize_matrix(weight, Grid(kind, bits, group))
    error = np.mean((dequantized(codes, weight.shape) - np.asarray(weight)) ** 2)
    assert error / np.mean(np.asarray(weight) ** 2) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_quotient_is_the_nearest_float(compiled):
    # Where XLA multiplies by a reciprocal instead, about a third of these are off by an ulp.
    values = jax.random.normal(jax.random.key(0), (64, 32))
    by = jnp.abs(jax.random.normal(jax.random.key(1), (1, 32))) + 0.1
    run = lambda f: jax.jit(f) if compiled else f  # noqa: E731
    assert np.array_equal(run(divide)(values, by), np.asarray(values) / np.asarray(by))
    constant = run(lambda x: divide(x, 127))(values)
    assert np.array_equal(constant, np.asarray(values) / np.float32(127))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 8])
def test_an_entry_inside_the_range_is_at_most_half_a_step_away(kind, bits):
    weight = jax.random.normal(jax.random.key(0), (64, 16))
    codes = quantize_matrix(weight, Grid(kind, bits, 32))
    dense = dequantized(codes, weight.shape)
    step = np.abs(np.repeat(np.asarray(codes.scale), 32, 0))
    smallest, largest = Grid(kind, bits).code_range
    values = np.asarray(codes.codes)
    assert values.min() >= smallest
    assert values.max() <= largest
    inside = (values > smallest) & (values < largest)
    assert inside.any()
    assert np.all((np.abs(dense - weight) <= step * (0.5 + 1e-5))[inside])


@pytest.mark.parametrize("bits, group", [(2, None), (4, 32), (8, None)])
def test_narrow_is_idempotent(bits, group):
    weight = jax.random.normal(jax.random.key(0), (64, 16))
    grid = Grid("narrow", bits, group)
    first = quantize_matrix(weight, grid)
    second = quantize_matrix(jnp.asarray(dequantized(first, weight.shape)), grid)
    assert np.array_equal(first.codes, second.codes)
    np.testing.assert_array_max_ulp(np.asarray(first.scale), np.asarray(second.scale), maxulp=1)


@pytest.mark.parametrize("kind", ["signed_max", "affine"])
def test_a_power_of_two_scales_only_the_scales(kind):
    weight = jax.random.normal(jax.random.key(0), (64, 16))
    plain, scaled = (quantize_matrix(w, Grid(kind, 4, 32)) for w in (weight, weight * 8))
    assert np.array_equal(plain.codes, scaled.codes)
    assert np.array_equal(plain.scale * 8, scaled.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [8, "tensor"])
def test_zeros_stay_exact_zeros(kind, group):
    weight = jax.random.normal(jax.random.key(0), (16, 6)) + 3  # far from zero
    weight = weight.at[::3].set(0.0).at[:, 2].set(0.0)
    codes = quantize_matrix(weight, Grid(kind, 3, group))
    dense = dequantized(codes, weight.shape)
    assert np.all(dense[np.asarray(weight) == 0] == 0)
    assert np.any(dense != 0)
    if group != "tensor":
        assert np.all(np.asarray(codes.scale)[:, 2] == 1)


def test_a_group_too_small_for_its_scales_dtype_becomes_zero():
    weight = jnp.full((8, 2), 1e-7).at[:, 1].set(1.0)  # 1e-7 / 127 underflows in float16
    codes = quantize_matrix(weight, Grid("narrow", 8, None, np.dtype(np.float16)))
    assert codes.scale.dtype == jnp.float16
    assert np.all(dequantized(codes, weight.shape)[:, 0] == 0)
    assert float(codes.scale[0, 0]) == 0  # which transforms refuse


@pytest.mark.parametrize("kind", ["narrow", "affine"])
def test_codes_suit_the_scale_that_is_stored(kind):
    weight = jax.random.normal(jax.random.key(0), (64, 16))
    codes = quantize_matrix(weight, Grid(kind, 8, 32, np.dtype(jnp.bfloat16)))
    assert codes.scale.dtype == jnp.bfloat16
    step = np.abs(np.repeat(np.asarray(codes.scale).astype(np.float32), 32, 0))
    smallest, largest = Grid(kind, 8).code_range
    inside = (codes.codes > smallest) & (codes.codes < largest)
    # With codes for the unrounded scale, errors would reach 127 * 2**-9 = a quarter step more.
    error = np.abs(dequantized(codes, weight.shape) - weight)
    assert np.all((error <= step * (0.5 + 1e-4))[inside])


@pytest.mark.parametrize("kind", ["narrow", "signed_max", "affine"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("group", [32, None, "tensor", 11])
def test_values_that_are_not_finite_show_in_the_scales_of_their_groups_alone(kind, compiled, group):
    weight = jax.random.normal(jax.random.key(0), (33 if group == 11 else 64, 5))
    weight = weight.at[5, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    run = jax.jit(quantize_matrix, static_argnums=1) if compiled else quantize_matrix
    scale = np.asarray(run(weight, Grid(kind, 4, group)).scale)
    expected = [[0, 0]] if group == "tensor" else [[0, 0], [0, 1], [0, 2]]
    assert np.argwhere(~np.isfinite(scale)).tolist() == expected


@pytest.mark.parametrize("kind, group", [("narrow", None), ("signed_max", 16), ("affine", 16)])
def test_outputs_do_not_know_of_each_other(kind, group):
    weight = jax.random.normal(jax.random.key(0), (32, 8))
    order = jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
    whole = quantize_matrix(weight, Grid(kind, 4, group))
    moved = quantize_matrix(weight[:, order], Grid(kind, 4, group))
    half = quantize_matrix(weight[:, :4], Grid(kind, 4, group))
    assert np.array_equal(whole.codes[:, order], moved.codes)
    assert np.array_equal(whole.scale[:, order], moved.scale)
    assert np.array_equal(whole.codes[:, :4], half.codes)


def test_more_rows_leave_other_groups_alone():
    weight = jax.random.normal(jax.random.key(0), (32, 8))
    padded = quantize_matrix(jnp.pad(weight, ((0, 16), (0, 0))), Grid("affine", 4, 16))
    assert np.array_equal(padded.codes[:32], quantize_matrix(weight, Grid("affine", 4, 16)).codes)
    assert not dequantized(padded, (48, 8))[32:].any()


def test_bfloat16_weights_are_rounded_as_their_float32_values():
    weight = jax.random.normal(jax.random.key(0), (32, 8), jnp.bfloat16)
    ours = quantize_matrix(weight, Grid("signed_max", 4, 16))
    wide = quantize_matrix(weight.astype(jnp.float32), Grid("signed_max", 4, 16))
    assert np.array_equal(ours.codes, wide.codes)


def test_an_empty_matrix_has_no_codes():
    for shape in ((0, 4), (4, 0)):
        codes = quantize_matrix(jnp.zeros(shape), Grid("signed_max", 4))
        assert codes.codes.shape == shape


AUTHORS = [
    (f"b{bits}_{'sym' if sym else 'asym'}_{over}{'_mse' if mse else ''}", bits, sym, over, mse)
    for bits in (2, 4, 8)
    for sym in (False, True)
    for over in ("row", "tensor")
    for mse in (False, True)
    if not (mse and (bits == 8 or over == "tensor"))
]


@pytest.mark.parametrize("case, bits, sym, over, mse", AUTHORS)
def test_gptqs_own_quantizer_is_reproduced(case, bits, sym, over, mse):
    stored = fixture("quantize/rtn_gptq_quantizer.npz")
    weight = stored["W"].T
    grid = Grid(
        "gptq_sym" if sym else "affine",
        bits,
        None if over == "row" else "tensor",
        search="mse" if mse else "absmax",
    )
    ours = quantize_matrix(jnp.asarray(weight), grid)
    keep = np.ones(48, bool)
    if over == "row":
        keep[3] = False  # all zero: any scale will do
        # Row 5 has no negative entry: the authors' symmetric scale is half of what it takes there.
        keep[5] = not sym
        scale, zero = ours.scale[0, keep], ours.zero_point[0, keep]
        theirs = stored[f"{case}/scale"][keep, 0], stored[f"{case}/zero"][keep, 0]
    else:
        scale, zero = ours.scale[0, 0], ours.zero_point[0, 0]
        theirs = stored[f"{case}/scale"][0, 0], stored[f"{case}/zero"][0, 0]
    np.testing.assert_allclose(scale, theirs[0], rtol=1e-6)
    np.testing.assert_array_equal(zero, theirs[1])
    dense = dequantized(ours, weight.shape).T[keep]
    off = np.abs(dense - stored[f"{case}/dq"][keep]) > 1e-6 * np.abs(stored["W"]).max()
    # A symmetric row's extreme entry lies exactly on a tie between two codes.
    assert off.sum(axis=1).max() <= (1 if sym else 0)


TORCHAO = [
    ("int4_g32_sym", Grid("half", 4, 32)),
    ("int3_g64_sym", Grid("half", 3, 64)),
    ("int4_row_sym", Grid("half", 4)),
    ("int8_weight_only", Grid("half", 8)),
    ("affine_s8_tensor_sym", Grid("half", 8, "tensor")),
    ("int4_g32_asym", Grid("affine", 4, 32)),
    ("int2_g16_asym", Grid("affine", 2, 16)),
    ("affine_u4_g32_asym", Grid("affine", 4, 32)),
]


@pytest.mark.parametrize("case, grid", TORCHAO, ids=[case for case, _ in TORCHAO])
def test_torchaos_grids_are_reproduced(case, grid):
    stored = fixture("quantize/torchao.npz")
    ours = quantize_matrix(jnp.asarray(stored["W"].T), grid)
    scale = np.atleast_2d(stored[f"{case}/scale"]).T
    np.testing.assert_allclose(ours.scale, scale, rtol=1e-6)
    codes, theirs = np.asarray(ours.codes).astype(int).T, stored[f"{case}/qdata"].astype(int)
    # Their signed codes of affine grids start at -2**(bits - 1).
    shift = 2 ** (grid.bits - 1) if ours.zero_point is not None and theirs.min() < 0 else 0
    # The extreme of a symmetric group lies on a tie between two codes.
    off = codes != theirs + shift
    assert off.sum() <= (ours.scale.size if grid.kind == "half" else 0)
    spread = np.repeat(np.repeat(scale, 128 // scale.shape[0], 0), 64 // scale.shape[1], 1)
    steps = np.abs(stored["W"] / spread.T)
    np.testing.assert_allclose(steps[off], 2.0 ** (grid.bits - 1) - 0.5, rtol=1e-6)
    if ours.zero_point is not None:
        assert np.array_equal(ours.zero_point.T, stored[f"{case}/zero_point"].astype(int) + shift)
    dense = dequantized(ours, (128, 64)).T
    np.testing.assert_allclose(dense[~off], stored[f"{case}/dq"][~off], atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_glm_130b_is_narrow_per_output_with_float16_scales_and_no_code_leaves_the_range(bits):
    weight = np.random.default_rng(bits).normal(size=(64, 4096)).astype(np.float32)
    top = 2 ** (bits - 1) - 1
    amax = np.abs(weight).max(0)
    scale = (amax / np.float32(top)).astype(np.float16)  # cast first, then divided by
    steps = np.round(weight / scale.astype(np.float32))
    ours = quantize_matrix(jnp.asarray(weight), Grid("narrow", bits, scale_dtype=np.float16))
    assert np.array_equal(np.asarray(ours.scale)[0], scale)
    assert np.array_equal(ours.codes, np.clip(steps, -top, top))
    # The extreme of each output gets the extreme code; a denormal scale, rounded down by a third,
    # would take it beyond, where their release wraps around.
    assert np.all(np.abs(np.asarray(ours.codes)).max(0) == top)
    tiny = jnp.full((2, 1), 8.9e-8 * top)
    small = quantize_matrix(tiny, Grid("narrow", bits, scale_dtype=np.float16))
    assert round(float(tiny[0, 0]) / float(small.scale[0, 0])) > top
    assert small.codes.tolist() == [[top], [top]]


def test_decode_undoes_a_row_of_codes():
    codes = jnp.array([[0, 15]], jnp.int32)
    dense = decode(codes, jnp.array([[0.5, 2.0]]), jnp.array([[4, 4]], jnp.uint8))
    assert dense.tolist() == [[-2.0, 22.0]]


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"bits": 1}, ValueError, "bits=1 must lie between 2 and 8"),
        ({"bits": 9}, ValueError, "bits=9 must lie between 2 and 8"),
        ({"bits": 4.0}, TypeError, "bits=4.0 must be an integer"),
        ({"bits": 4, "group_size": 0}, ValueError, "group_size=0 must be at least 1"),
        ({"bits": 4, "group_size": "row"}, TypeError, "'row' must be an integer, None"),
        ({"bits": 4, "grid": "nearest"}, ValueError, "grid='nearest' is unknown. Choose one of"),
        ({"bits": 4, "search": "rms"}, ValueError, "search='rms' is unknown. Choose 'absmax'"),
        ({"bits": 4, "search": ("rms",)}, ValueError, "must be ('rms', multiple), such as"),
        ({"bits": 4, "search": ("rms", "2")}, TypeError, "search='2' must be a number"),
        ({"bits": 4, "search": ("rms", 0)}, ValueError, "must be positive and finite"),
        (
            {"bits": 4, "search": ("rms", 2.0), "grid": "affine"},
            ValueError,
            "as far below 0 as above, which grid='affine' does not have. Choose a symmetric grid",
        ),
        (
            {"bits": 4, "search": ("rms", 2.0), "group_size": 8, "pad": "zero"},
            ValueError,
            "is a mean, to which the zeros of pad='zero' do not belong. Leave one of them out",
        ),
        ({"bits": 4, "search": 40.0}, ValueError, "search=40.0 must be a percentile above 50"),
        ({"bits": 4, "scale_dtype": jnp.int8}, TypeError, "must be float32, bfloat16 or float16"),
    ],
)
def test_settings_are_checked(settings, error, words):
    with pytest.raises(error) as raised:
        make_grid("quantize.test", **settings)
    assert words in str(raised.value)
    assert str(raised.value).startswith("quantize.test: ")
