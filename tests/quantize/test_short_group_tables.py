"""Weights with tables of levels, too, have a last group that is shorter with pad="zero"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import quantize
from jaxweights.checkpoint.exchange._bitsandbytes import unfit_bitsandbytes
from jaxweights.core import Layout, Stats
from jaxweights.quantize import packed_bytes
from jaxweights.quantize.training._thresholds import threshold_distance
from jaxweights.weights import Axes, Codebook, Masked

GROUP, INPUTS, OUTPUTS = 12, 32, 6  # two groups and two thirds of one
ROWS = 36  # with zeros that fill up the last
SHORT = {"group_size": GROUP, "pad": "zero"}


def data():
    """A weight and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)) @ rng.normal(size=(4, INPUTS))
    x += 0.4 * rng.normal(size=(256, INPUTS))
    weight = rng.normal(size=(INPUTS, OUTPUTS)) * np.linspace(0.2, 3, INPUTS)[:, None]
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


WEIGHT, GRAM = data()


def one(tx, leaf, gram=GRAM):
    layout = Layout.of({"kernel": Axes()})
    count = jnp.full(gram.shape[:-2], 256, jnp.int32)
    stats = Stats({"kernel": {"gram": gram, "count": count}}, layout=layout)
    return jw.apply(tx, {"kernel": leaf}, stats=stats)["kernel"]


def by_hand(array, axes=(0,)):
    """Zeros behind the inputs, up to a whole number of groups."""
    return jnp.pad(array, [(0, 4 if axis in axes else 0) for axis in range(array.ndim)])


FREE = {
    "nf4": quantize.nf4,
    "fp4": quantize.fp4,
    "power": functools.partial(quantize.power, bits=3),
    "power, a leaf each": functools.partial(quantize.power, bits=4, scope="leaf"),
}
CALIBRATED = {
    "nupes": functools.partial(quantize.nupes, bits=3, steps=30, learning_rate=0.02),
    "nupes, mse": functools.partial(quantize.nupes, bits=2, steps=30, search="mse"),
    "gptq": functools.partial(quantize.gptq, bits=4, grid="nf4"),
    "gptq, ordered": functools.partial(
        quantize.gptq, bits=4, grid="fp4", act_order=True, static_groups=True
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_codes_are_those_of_the_matrix_padded_by_hand_and_cut(name):
    tx = FREE[name](**SHORT)
    weight, whole = one(tx, WEIGHT), one(tx, by_hand(WEIGHT))
    assert (weight.full_group, weight.group_size) == (GROUP, GROUP)
    assert (whole.full_group, weight.shape) == (0, WEIGHT.shape)
    np.testing.assert_array_equal(weight.codes_matrix(), whole.codes_matrix()[:INPUTS])
    np.testing.assert_array_equal(weight.scale, whole.scale)
    np.testing.assert_array_equal(weight.table, whole.table)
    np.testing.assert_array_equal(weight.materialize(), whole.materialize()[:INPUTS])
    last = one(FREE[name](group_size=None), WEIGHT[24:])
    np.testing.assert_array_equal(weight.scale[2:], last.scale)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_codes_are_those_of_the_matrix_padded_by_hand_and_cut(name):
    tx = CALIBRATED[name](**SHORT)
    weight = one(tx, WEIGHT)
    assert (weight.full_group, weight.scale.shape) == (GROUP, (3, OUTPUTS))
    plain = {"gptq": "nf4", "gptq, ordered": "fp4"}.get(name)
    if plain:
        rounded = FREE[plain](**SHORT)
    else:  # of its exponents, 1 alone
        rounded = quantize.power(bits=3 if name == "nupes" else 2, exponents=[1.0], **SHORT)
    error = lambda x: float(quantize.output_error(WEIGHT, x.materialize(), GRAM))  # noqa: E731
    assert error(weight) < error(one(rounded, WEIGHT))
    if name == "gptq, ordered":  # inputs of padding come last by hand, where they are dead
        return
    whole = one(tx, by_hand(WEIGHT), by_hand(GRAM, (0, 1)))
    same = weight.codes_matrix() == whole.codes_matrix()[:INPUTS]
    assert same.mean() > 0.95  # a padded Gram matrix has a smaller mean: sums round apart


def test_pruned_weights_stay_zero():
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, WEIGHT.shape)
    pruned = Masked(jnp.where(mask, WEIGHT, 0), mask)
    weight = one(CALIBRATED["nupes"](**SHORT), pruned)
    assert weight.base.full_group == GROUP
    assert np.all(weight.base.materialize()[~mask] == 0)


@pytest.mark.parametrize("name", [*FREE, *CALIBRATED])
def test_a_group_that_divides_needs_no_padding_and_a_long_one_is_all(name):
    make = (FREE | CALIBRATED)[name]
    for given, plain in ((8, 8), (np.int64(64), None), (32, None)):
        weight, expected = (
            one(make(group_size=given, pad="zero"), WEIGHT),
            one(make(group_size=plain), WEIGHT),
        )
        assert weight.full_group == 0
        np.testing.assert_array_equal(weight.materialize(), expected.materialize())


@pytest.mark.parametrize("name", ["nf4", "power", "nupes", "gptq"])
def test_stacks_are_padded_matrix_by_matrix(name):
    tx = (FREE | CALIBRATED)[name](**SHORT)
    stack = jnp.stack([WEIGHT, 2 * WEIGHT[::-1]]).astype(jnp.bfloat16)
    both = one(tx, stack, jnp.stack([GRAM, GRAM]))
    assert both.scale.shape == (2, 3, OUTPUTS)
    if name == "power":  # its exponent is that of all matrices
        return
    for i in range(2):
        alone = one(tx, stack[i])
        np.testing.assert_array_equal(both.materialize()[i], alone.materialize())


def test_double_quantization_takes_the_scales_of_the_shorter_group():
    weight = one(quantize.nf4(double_quantization=True, **SHORT), WEIGHT)
    whole = one(quantize.nf4(double_quantization=True, **SHORT), by_hand(WEIGHT))
    assert isinstance(weight.scale, Codebook) and weight.scale.shape == (3, OUTPUTS)
    np.testing.assert_array_equal(weight.materialize(), whole.materialize()[:INPUTS])


def test_products_columns_and_slices_see_the_scale_of_every_input():
    weight = one(quantize.nf4(**SHORT), WEIGHT)
    dense = np.asarray(weight.materialize())
    x = jax.random.normal(jax.random.key(1), (5, INPUTS))
    product = jax.jit(jw.lift(lambda w, x: x @ w))(weight, x)
    np.testing.assert_allclose(product, x @ dense, rtol=1e-5, atol=1e-5)
    y = jax.random.normal(jax.random.key(1), (5, OUTPUTS))
    back = jax.jit(jw.lift(lambda w, y: y @ w.T))(weight, y)
    np.testing.assert_allclose(back, y @ dense.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weight.columns(jnp.array([4, 0])), dense[:, [4, 0]].T)
    slope = jax.grad(lambda x: jw.lift(lambda w, x: jnp.sum(jnp.sin(x @ w)))(weight, x))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense)))(x)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)


def test_a_changed_weight_goes_back_to_its_levels():
    weight = one(quantize.nf4(**SHORT), WEIGHT)
    target = WEIGHT + 0.3
    moved = quantize.requantize(weight, target).weight
    np.testing.assert_array_equal(moved.scale, weight.scale)
    scale = np.repeat(np.asarray(weight.scale), GROUP, axis=0)[:INPUTS]
    distance = np.abs(np.asarray(target / scale)[..., None] - np.asarray(weight.table))
    np.testing.assert_array_equal(moved.codes_matrix(), distance.argmin(-1))
    better = quantize.requantize(weight, target, GRAM, rescale=True).weight
    error = lambda x: float(quantize.output_error(target, x.materialize(), GRAM))  # noqa: E731
    assert error(better) < error(moved)


def test_offsets_of_groups_are_taken_off_before_a_weight_is_rounded_again():
    codes = jnp.asarray(np.arange(32)[:, None] % 2, jnp.uint8)
    scale, offset = jnp.full((3, 1), 2.0), jnp.array([[10.0], [20.0], [30.0]])
    table = jnp.array([0.0, 1.0])
    weight = Codebook.from_codes(codes, table, scale, offset, bits=1, full_group=GROUP)
    expected = np.repeat(offset, GROUP, axis=0)[:INPUTS] + 2 * codes.astype(jnp.float32)
    np.testing.assert_array_equal(weight.materialize(), expected)
    again = quantize.requantize(weight, weight.materialize()).weight
    np.testing.assert_array_equal(again.codes_matrix(), codes)


def test_thresholds_lie_between_the_levels_of_the_group_of_an_input():
    tx = quantize.nf4(**SHORT)
    whole = by_hand(WEIGHT)
    ours = threshold_distance(WEIGHT, one(tx, WEIGHT))
    np.testing.assert_allclose(ours, threshold_distance(whole, one(tx, whole))[:INPUTS], rtol=1e-6)


def test_codes_in_a_file_take_their_own_bits():
    weight = one(quantize.power(bits=3, exponents=[0.5], **SHORT), WEIGHT)
    assert packed_bytes(weight) == INPUTS * OUTPUTS * 3 // 8 + 4 * (3 * OUTPUTS + 7)
    doubled = one(quantize.nf4(group_size=8, double_quantization=True), WEIGHT)
    scales = 4 * OUTPUTS + 4 * (1 + 1 + 256)  # codes, their scale, mean and levels
    assert packed_bytes(doubled) == INPUTS * OUTPUTS * 4 // 8 + 4 * 16 + scales


@pytest.mark.parametrize(
    "make", [quantize.nf4, quantize.fp4, FREE["power"], CALIBRATED["nupes"], CALIBRATED["gptq"]]
)
def test_what_cannot_be_padded_is_refused_when_built(make):
    for size in (None, "tensor"):
        with pytest.raises(ValueError, match="pad='zero' fills up groups of rows, but group_size="):
            make(group_size=size, pad="zero")
    with pytest.raises(ValueError, match=r"pad='one' is unknown\. Choose"):
        make(group_size=8, pad="one")
    with pytest.raises(ValueError, match="fill up the last group by pad='zero'"):
        one(make(group_size=GROUP), WEIGHT)


def test_blocks_of_bitsandbytes_are_of_one_size():
    (problem,) = unfit_bitsandbytes(one(quantize.nf4(**SHORT), WEIGHT))
    assert problem == (
        "has groups of 12 inputs of which the last is shorter, but blocks of bitsandbytes are of "
        "one size. Quantize with a power of two from 32 on that divides the 32 inputs"
    )


def test_groups_that_do_not_fit_are_refused():
    codes, table = jnp.zeros((12, 2), jnp.uint8), jnp.zeros(16)
    with pytest.raises(ValueError, match="Codebook: full_group=5 makes no 2 groups of 12 inputs"):
        Codebook.from_codes(codes, table, jnp.ones((2, 2)), bits=4, full_group=5)
    with pytest.raises(ValueError, match="Codebook: full_group=5 makes no 1 groups of 12 inputs"):
        Codebook.from_codes(codes, table, jnp.ones((3, 2)), jnp.ones((1, 2)), bits=4, full_group=5)
