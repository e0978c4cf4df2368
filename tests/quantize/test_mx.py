import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import mx, mx_matrix, nvfp4, nvfp4_matrix
from jaxweights.quantize._levels import ELEMENTS, minifloat_code, minifloat_table
from jaxweights.weights import Axes, Codebook, Masked, NarrowFloat, Rescaled
from tests._fixtures import fixture
from tests.quantize._normal import error_on_normal_weights

WEIGHT = jax.random.normal(jax.random.key(0), (64, 24))
DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
LARGEST = {"e4m3": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6}
EXPONENTS = {"e4m3": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "e2m1": 2}
MANTISSAS = {"e4m3": 3, "e5m2": 2, "e3m2": 2, "e2m3": 3, "e2m1": 1}


def exponent_by_frexp(amax, element, rule):
    """Exponent of the scale in float64, from the words of the docstring."""
    mantissa, exponent = np.frexp(np.float64(amax))  # mantissa in [0.5, 1)
    floor = int(exponent) - 1
    largest = LARGEST[element] / 2.0 ** EXPONENTS[element]
    steps = 2 ** MANTISSAS[element]
    up = {
        "floor": False,
        "ceil": mantissa > 0.5,
        "rceil": 2 * mantissa > largest,
        "even": np.floor(2 * mantissa * steps + 0.5) >= 2 * steps,  # halves up: to the power
        "oas": 2 * mantissa >= {"e2m1": 7 / 4, "e4m3": 448 / 256 * 31 / 30}.get(element, 9),
    }[rule]
    return max(floor + int(up) - EXPONENTS[element], -127)


def mx_by_loops(weight, element, block, rule):
    dense = np.zeros(weight.shape)
    for r in range(0, len(weight), block):
        for o in range(weight.shape[1]):
            values = weight[r : r + block, o].astype(np.float64)
            if not values.any():
                continue
            scale = 2.0 ** exponent_by_frexp(np.abs(values).max(), element, rule)
            units = np.clip(values / scale, -LARGEST[element], LARGEST[element])
            narrow = units.astype(np.float32).astype(DTYPES[element]).astype(np.float64)
            dense[r : r + block, o] = narrow * scale
    return dense


@pytest.mark.parametrize("element", [*ELEMENTS])
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even", "oas"])
def test_values_and_scales_are_those_of_the_rule(element, rule):
    if rule == "oas" and element not in ("e2m1", "e4m3"):
        rule = "even"  # the same for these elements, see below
    weight = np.array(WEIGHT) * np.float32(2.0) ** np.arange(-12, 12)  # other exponents
    weight[:32, 0] = 0
    weight[32:, 1] = 2.0 ** np.arange(-20, 12)  # a power of two is the largest
    run = jax.jit(lambda w: mx_matrix(w, element=element, scale_rule=rule))
    matrix = run(jnp.asarray(weight))
    assert np.array_equal(matrix.materialize(), mx_by_loops(weight, element, 32, rule))
    assert isinstance(matrix, NarrowFloat if element in ("e4m3", "e5m2") else Codebook)
    assert matrix.scale.dtype == jnp.float8_e8m0fnu


@pytest.mark.parametrize("element", ["e5m2", "e3m2", "e2m3", "e2m1"])
def test_oas_is_even_but_for_e4m3(element):
    amax = jnp.tile(jnp.linspace(1, 2, 4000, endpoint=False)[None], (32, 1))
    of_rule = lambda e, r: np.asarray(mx_matrix(amax, element=e, scale_rule=r).scale)  # noqa: E731
    assert np.array_equal(of_rule(element, "oas"), of_rule(element, "even"))
    assert not np.array_equal(of_rule("e4m3", "oas"), of_rule("e4m3", "even"))


@pytest.mark.parametrize("element", [*ELEMENTS])
@pytest.mark.parametrize("block, axis", [(32, -1), (16, 0)])
def test_the_authors_emulation_is_reproduced(element, block, axis):
    stored = fixture("quantize/mx_formats.npz")
    bits = {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}[element]
    theirs = stored[f"fp{bits}_{element}_b{block}_axis{axis}"]
    weight = stored["W"].T if axis == -1 else stored["W"]
    theirs = theirs.T if axis == -1 else theirs
    ours = np.asarray(mx_matrix(jnp.asarray(weight), element=element, block=block).materialize())
    off = ours != theirs
    # They round ties away from zero: at most one entry, halfway between the two results.
    assert off.sum() <= 1
    assert np.array_equal((ours + theirs)[off] / 2, weight[off])


@pytest.mark.parametrize("element", [*ELEMENTS])
def test_codes_are_those_of_the_dtype_ties_to_even(element):
    kind = ELEMENTS[element]
    table = minifloat_table(kind)
    finite = table[np.abs(table) <= kind.largest]
    ties = np.sort(finite)[:-1] / 2 + np.sort(finite)[1:] / 2
    spread = np.random.default_rng(0).normal(size=5000) * 10.0 ** np.linspace(-6, 6, 5000)
    units = np.concatenate([finite, ties, spread]).astype(np.float32)
    codes = np.asarray(jax.jit(lambda x: minifloat_code(x, kind))(units))
    expected = np.clip(units, -kind.largest, kind.largest).astype(DTYPES[element])
    assert np.array_equal(codes, expected.view(np.uint8))
    assert np.array_equal(table[codes], expected.astype(np.float32))


@pytest.mark.parametrize(
    "element, rule, error",
    [
        ("e4m3", "floor", 8.6e-4),
        ("e2m1", "floor", 1.32e-2),
        ("e2m1", "oas", 1.25e-2),
        ("e2m1", "rceil", 1.33e-2),
    ],
)
def test_the_error_on_normal_weights_is_the_known_one(element, rule, error):
    found = error_on_normal_weights(lambda w: mx_matrix(w, element=element, scale_rule=rule))
    assert found == pytest.approx(error, rel=0.03)


def test_the_error_of_nvfp4_on_normal_weights_is_the_known_one():
    assert error_on_normal_weights(nvfp4_matrix) == pytest.approx(9.05e-3, rel=0.03)


@pytest.mark.parametrize("element", [*ELEMENTS])
def test_powers_of_two_are_exact_and_scales_rise_with_them(element):
    amax = jnp.asarray(np.exp2(np.arange(-100, 100, dtype=np.float32)))
    matrix = mx_matrix(jnp.tile(amax[None], (32, 1)), element=element)
    assert np.array_equal(matrix.materialize()[0], amax)
    stored = np.asarray(matrix.scale).view(np.uint8)[0]
    assert np.all(np.diff(stored.astype(int)) == 1)


@pytest.mark.parametrize("element", [*ELEMENTS])
def test_decoding_and_encoding_again_changes_nothing(element):
    once = mx_matrix(WEIGHT, element=element)
    again = mx_matrix(once.materialize(), element=element)
    assert np.array_equal(again.materialize(), once.materialize())


def test_zeros_and_denormals_are_zeros_and_the_largest_float_is_near():
    zeros = mx_matrix(jnp.zeros((32, 1)), element="e2m1")
    assert not np.any(zeros.materialize())
    assert np.asarray(zeros.scale).view(np.uint8)[0, 0] == 0  # 2**-127
    denormal = mx_matrix(jnp.full((32, 1), 1e-44), element="e4m3").materialize()
    assert np.all(np.abs(denormal) <= 1e-44)
    huge = mx_matrix(jnp.full((32, 1), 3e38), element="e4m3", scale_rule="ceil").materialize()
    np.testing.assert_allclose(huge, 3e38, rtol=0.04)


def nvfp4_by_loops(weight):
    f = np.float32
    outer = f(448 * 6) / f(np.abs(weight).max())
    dense = np.zeros_like(weight)
    for r in range(0, len(weight), 16):
        for o in range(weight.shape[1]):
            block = weight[r : r + 16, o]
            scale = f((np.abs(block).max() / f(6) * outer).astype(DTYPES["e4m3"])) / outer
            if scale == 0:
                continue
            units = np.clip(block / scale, f(-6), f(6)).astype(DTYPES["e2m1"])
            dense[r : r + 16, o] = units.astype(f) * scale
    return dense


def test_nvfp4_has_scales_of_scales():
    weight = np.array(WEIGHT) * np.linspace(0.01, 3, 24).astype(np.float32)
    weight[:16, 3] = 0
    weight[16:32, 4] *= 1e-9  # its scale is 0 in e4m3
    matrix = jax.jit(nvfp4_matrix)(jnp.asarray(weight))
    assert np.array_equal(matrix.materialize(), nvfp4_by_loops(weight))
    assert matrix.scale.values.dtype == jnp.float8_e4m3fn
    assert matrix.scale.scale.shape == (1, 1)
    assert matrix.nbytes == 64 * 24 // 2 + 4 * 24 + 4 + 16 * 4


def test_each_expert_has_a_scale_of_its_own():
    experts = jnp.stack([WEIGHT, 1000 * WEIGHT])
    leaf = jw.apply(nvfp4(), {"w": experts}, layout={"w": Axes()})["w"]
    assert leaf.scale.scale.shape == (2, 1, 1)
    alone = nvfp4_matrix(WEIGHT)
    assert np.array_equal(leaf.codes[0], alone.codes)
    assert np.array_equal(leaf.materialize()[0], alone.materialize())


def test_matrices_of_a_layer_may_share_the_scale_of_scales():
    loud = jnp.array([1.0, 8.0])[:, None, None]
    params = {
        "q": loud * WEIGHT[None, :32],
        "k": 3 * loud * WEIGHT[None, 32:],
        "head": 100 * WEIGHT[:32],
    }
    layout = {"q|k": Axes(), "head": Axes()}
    new = jw.apply(nvfp4(scope="layer"), params, layout=layout)
    largest = np.abs(np.stack([params["q"], params["k"]])).max((0, 2, 3))
    for name in "qk":
        outer = new[name].scale.scale.reshape(-1)
        np.testing.assert_allclose(outer, 448 * 6 / largest, rtol=1e-6)
        alone = jw.apply(nvfp4(), params, layout=layout)[name]
        error, least = (jnp.linalg.norm(x.materialize() - params[name]) for x in (new[name], alone))
        assert error < 1.1 * least
        for i in range(2):
            one = nvfp4_matrix(params[name][i], jnp.float32(largest[i]))
            assert np.array_equal(new[name].materialize()[i], one.materialize())
    own = jw.apply(nvfp4(), params, layout=layout)["q"].scale.scale  # of the quieter matrix
    assert np.all(own > 2 * new["q"].scale.scale)
    # Of another stack, so of no layer of these.
    rounded = jw.apply(jw.partition(("head", nvfp4(scope="layer"))), params)["head"]
    assert np.array_equal(rounded.materialize(), nvfp4_matrix(params["head"]).materialize())


def test_a_layer_may_hold_changes_of_inputs_and_masks():
    weight, mask = WEIGHT.at[0].mul(9), jnp.arange(64)[:, None] % 64 > 0
    kept = Rescaled.of(WEIGHT, jnp.linspace(0.5, 2, 64))
    masked = Masked(weight, jnp.broadcast_to(mask, WEIGHT.shape))
    new = jw.apply(nvfp4(scope="layer"), {"kept": kept, "masked": masked})
    largest = max(np.abs(WEIGHT).max(), np.abs(masked.materialize()).max())
    for matrix in (new["kept"].base, new["masked"].base):
        np.testing.assert_allclose(matrix.scale.scale, [[448 * 6 / largest]], rtol=1e-6)


def test_a_leaf_that_is_not_finite_spoils_no_other_of_its_layer():
    params = {"good": WEIGHT, "bad": WEIGHT.at[3, 2].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"^quantize.nvfp4: 'bad': 1 of .* \[3, 2\]") as error:
        jw.apply(nvfp4(scope="layer"), params)
    assert "good" not in str(error.value)


def test_zeros_stay_zeros_in_nvfp4():
    assert not np.any(nvfp4_matrix(jnp.zeros((16, 2))).materialize())


def test_settings_are_checked_when_built():
    with pytest.raises(ValueError, match=r"quantize\.mx: element='e8m0' is unknown. Choose one of"):
        mx(element="e8m0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale_rule='up' is unknown\. Choose one of"):
        mx(element="e2m1", scale_rule="up")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group_size"):
        mx(element="e2m1", group_size=64)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "tx, words",
    [
        (mx(element="e2m1"), "quantize.mx: 'kernel': the block of 32 rows that MX formats have"),
        (nvfp4(), "quantize.nvfp4: 'kernel': the block of 16 rows that NVFP4 has"),
    ],
)
def test_an_input_axis_that_blocks_do_not_divide_is_refused(tx, words):
    with pytest.raises(ValueError) as error:
        jw.apply(tx, {"kernel": jnp.ones((40, 8))})
    rest = " does not divide the input axis, which has length 40. Leave this weight out with"
    assert words + rest in str(error.value)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "tx, words",
    [
        (mx(element="e4m3"), "1 of 2 blocks hold values that are not finite"),
        (mx(element="e2m1"), "1 of 2 blocks hold values that are not finite"),
        (nvfp4(), "holds values that are not finite"),  # its scale of scales serves all blocks
    ],
)
def test_values_that_are_not_finite_are_refused(tx, words, bad):
    with pytest.raises(ValueError, match=f"'kernel': {words}"):
        jw.apply(tx, {"kernel": jnp.ones((32, 2)).at[20, 1].set(bad)})
