"""Matrices whose inputs no whole number of groups makes: pad="zero" fills up the last group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import quantize
from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.core import Layout
from jaxweights.models._alike import in_one_form
from jaxweights.quantize.training._thresholds import threshold_distance
from jaxweights.weights import Axes, Masked, QuantizedProduct

GROUP = 12
INPUTS = 32  # two groups and two thirds of one
WEIGHT = jax.random.normal(jax.random.key(0), (INPUTS, 6))
KINDS = ["narrow", "full", "half", "signed_max", "affine", "gptq_sym"]

rounding = functools.partial(quantize.round_to_nearest, bits=4, group_size=GROUP, pad="zero")


def padded_by_hand(matrix):
    """Rows of zeros up to a whole number of groups."""
    return np.pad(matrix, ((0, -len(matrix) % GROUP), (0, 0)))


def one(tx, leaf, **context):
    return jw.apply(tx, {"kernel": leaf}, **context)["kernel"]


def assert_cut(weight, whole, rows=INPUTS):
    """The weight holds the codes and scales of the whole one, without its last rows."""
    np.testing.assert_array_equal(weight.codes_matrix(), whole.codes_matrix()[..., :rows, :])
    np.testing.assert_array_equal(weight.scale, whole.scale)
    if whole.zero_point is not None:
        np.testing.assert_array_equal(weight.zero_point, whole.zero_point)
    np.testing.assert_array_equal(weight.materialize(), whole.materialize()[..., :rows, :])


@pytest.mark.parametrize("search", ["absmax", "mse", 95.0])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_matrix_padded_by_hand_and_cut(kind, search):
    tx = rounding(grid=kind, search=search)
    weight, whole = one(tx, WEIGHT), one(tx, padded_by_hand(WEIGHT))
    assert weight.full_group == GROUP and whole.full_group == 0
    assert weight.shape == (INPUTS, 6)
    assert_cut(weight, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_full_groups_are_those_of_the_matrix_without_the_last(kind):
    tx = rounding(grid=kind)
    weight, cut = one(tx, WEIGHT), one(tx, WEIGHT[:24])
    np.testing.assert_array_equal(weight.codes_matrix()[:24], cut.codes_matrix())
    np.testing.assert_array_equal(weight.scale[:2], cut.scale)
    short = one(quantize.round_to_nearest(bits=4, grid=kind), WEIGHT[24:])
    np.testing.assert_array_equal(weight.codes_matrix()[24:], short.codes_matrix())
    np.testing.assert_array_equal(weight.scale[2:], short.scale)


def test_a_group_longer_than_the_matrix_is_all_of_it():
    whole = one(quantize.round_to_nearest(bits=4), WEIGHT)
    for weight in (one(rounding(group_size=128), WEIGHT), one(rounding(group_size=32), WEIGHT)):
        assert jax.tree.structure(weight) == jax.tree.structure(whole)
        assert_cut(weight, whole)


def test_a_group_that_divides_needs_no_padding():
    plain = one(quantize.round_to_nearest(bits=4, group_size=8), WEIGHT)
    weight = one(rounding(group_size=8), WEIGHT)
    assert jax.tree.structure(weight) == jax.tree.structure(plain)
    assert_cut(weight, plain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacks_kernels_of_attention_and_convolutions_are_padded_matrix_by_matrix(dtype):
    tx = rounding(grid="affine")
    stack = jax.random.normal(jax.random.key(1), (3, INPUTS, 6), dtype)
    weight = one(tx, stack, layout=Layout.of({"kernel": Axes()}))
    assert weight.dtype == dtype
    for i in range(3):
        alone = one(tx, stack[i])
        np.testing.assert_array_equal(weight.materialize()[i], alone.materialize())
    kernel = stack[0].reshape(INPUTS, 2, 3)
    axes = Axes(inputs=(-3,), outputs=(-2, -1))
    heads = one(tx, kernel, layout=Layout.of({"kernel": axes}))
    np.testing.assert_array_equal(
        heads.materialize().reshape(INPUTS, 6), one(tx, stack[0]).matrix()
    )
    conv = stack[0].reshape(2, 4, 4, 6)
    axes = Axes(inputs=(-4, -3, -2), outputs=(-1,), kind="conv")
    image = one(tx, conv, layout=Layout.of({"kernel": axes}))
    np.testing.assert_array_equal(image.materialize().reshape(INPUTS, 6), heads.matrix())


def test_groups_of_zeros_and_masked_weights_stay_zero():
    zeros = one(rounding(grid="affine"), WEIGHT.at[24:].set(0))
    assert np.all(zeros.materialize()[24:] == 0)
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, WEIGHT.shape)
    masked = one(rounding(), Masked(jnp.where(mask, WEIGHT, 0), mask))
    assert isinstance(masked, Masked)
    assert np.all(masked.materialize()[~mask] == 0)


def test_products_are_those_of_the_dense_weight():
    weight = one(rounding(grid="affine"), WEIGHT)
    x = jax.random.normal(jax.random.key(3), (5, INPUTS))
    y = jax.jit(jw.lift(lambda weight, x: x @ weight))(weight, x)
    np.testing.assert_allclose(y, x @ weight.materialize(), rtol=1e-5, atol=1e-5)
    table = jw.lift(lambda weight, i: weight[i])(weight, jnp.array([31, 0]))
    np.testing.assert_array_equal(table, weight.materialize()[jnp.array([31, 0])])
    z = jax.random.normal(jax.random.key(4), (5, 6))
    y = jw.lift(lambda weight, z: z @ weight.T)(weight, z)
    np.testing.assert_allclose(y, z @ weight.materialize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["narrow", "affine"])
def test_products_of_integers_fill_up_the_last_group(kind):
    weight = one(rounding(grid=kind), WEIGHT)
    product = one(quantize.int8_dynamic(), weight)
    assert isinstance(product, QuantizedProduct)
    assert product.codes.shape == (6, 36)
    np.testing.assert_array_equal(product.materialize(), weight.materialize())
    again = product.weight_only()
    assert (again.full_group, again.shape) == (GROUP, weight.shape)
    np.testing.assert_array_equal(again.materialize(), weight.materialize())
    np.testing.assert_array_equal(product.columns(jnp.array([2])), weight.columns(jnp.array([2])))
    # Inputs that are integers already are not rounded.
    x = jax.random.randint(jax.random.key(5), (5, INPUTS), -127, 128).at[:, 0].set(127)
    x = x.astype(jnp.float32)
    multiply = jw.lift(lambda weight, x: x @ weight)
    y = jax.jit(multiply)(product, x)
    np.testing.assert_allclose(y, x @ weight.materialize(), rtol=1e-5, atol=1e-3)
    slope = jax.grad(lambda x: multiply(product, x)[:, 2].sum())(x)
    np.testing.assert_allclose(slope[0], weight.materialize()[:, 2], rtol=1e-5, atol=1e-6)
    kept = jnp.ones((INPUTS, 6), bool).at[31].set(False)
    assert np.all(product.masked(kept).materialize()[31] == 0)
    assert np.any(product.masked(kept).materialize()[30] != 0)


def test_saving_and_loading_keep_the_shorter_group(tmp_path):
    tree = {"kernel": one(rounding(grid="affine"), WEIGHT)}
    save_tree(tmp_path / "saved", tree)
    loaded = load_tree(tmp_path / "saved").tree
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    np.testing.assert_array_equal(loaded["kernel"].materialize(), tree["kernel"].materialize())


def test_what_a_weight_takes_counts_no_padding():
    weight = one(rounding(bits=3, grid="affine"), WEIGHT)
    codes, scales, zeros = INPUTS * 6 * 3, 3 * 6 * 32, 3 * 6 * 3
    assert quantize.packed_bytes(weight) == -(-(codes + scales + zeros) // 8)


def test_a_weight_with_a_shorter_group_is_refined_and_takes_a_change_on_its_grid():
    x = jax.random.normal(jax.random.key(6), (64, INPUTS)) * jnp.linspace(0.2, 3, INPUTS)[None]
    gram = x.T @ x
    weight, whole = one(rounding(bits=3), WEIGHT), one(rounding(bits=3), padded_by_hand(WEIGHT))
    wide = padded_by_hand(padded_by_hand(gram).T)
    better = quantize.refine_weight(weight, WEIGHT, gram)
    error = lambda weight: float(quantize.output_error(WEIGHT, weight.materialize(), gram))  # noqa: E731
    assert error(better) < 0.9 * error(weight)
    expected = quantize.refine_weight(whole, jnp.asarray(padded_by_hand(WEIGHT)), jnp.asarray(wide))
    np.testing.assert_array_equal(better.codes_matrix(), expected.codes_matrix()[:INPUTS])
    np.testing.assert_allclose(better.scale, expected.scale, rtol=1e-4)
    target = WEIGHT + 0.3 * jax.random.normal(jax.random.key(7), WEIGHT.shape)
    moved = quantize.requantize(weight, target).weight
    np.testing.assert_array_equal(moved.scale, weight.scale)
    nearest = np.clip(np.round(target / np.repeat(weight.scale, GROUP, 0)[:INPUTS]), -4, 3)
    np.testing.assert_array_equal(moved.codes_matrix(), nearest)


def test_training_on_such_a_grid_sees_the_levels_of_every_input():
    tx = rounding(bits=3, grid="affine")
    x = jax.random.normal(jax.random.key(8), (5, INPUTS))

    def loss(params):
        fake = quantize.fake_quant(params, tx, clipped="zero")
        return jnp.sum(jnp.tanh(x @ fake["kernel"]))

    value, slope = jax.value_and_grad(loss)({"kernel": WEIGHT})
    weight = one(tx, WEIGHT)
    expected, pull = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(weight.materialize())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope["kernel"], pull, rtol=1e-4, atol=1e-5)  # nothing is clipped
    whole = jnp.asarray(padded_by_hand(WEIGHT))
    np.testing.assert_allclose(
        threshold_distance(WEIGHT, weight),
        threshold_distance(whole, one(tx, whole))[:INPUTS],
        rtol=1e-6,
    )


def test_codes_and_scales_are_distilled():
    x = jax.random.normal(jax.random.key(9), (64, INPUTS))
    model = lambda params, x: jnp.tanh(x @ params["kernel"])  # noqa: E731
    original, start = {"kernel": WEIGHT}, {"kernel": one(rounding(bits=2), WEIGHT)}
    found = quantize.distill(model, original, start, [(x,)] * 4, steps=40)
    assert found.params["kernel"].full_group == GROUP
    error = lambda params: jnp.mean(  # noqa: E731
        jnp.square(model(original, x) - jw.lift(model)(params, x))
    )
    assert error(found.params) < 0.9 * error(start)


def test_layers_are_stacked_where_their_groups_are_alike():
    host = lambda tx: jax.tree.map(np.asarray, one(tx, WEIGHT))  # noqa: E731
    unlike = [
        host(rounding(bits=3, grid="affine")),
        host(rounding(bits=4)),
        host(quantize.round_to_nearest(bits=8)),
    ]
    alike = in_one_form(unlike)
    assert len({jax.tree.structure(layer) for layer in alike}) == 1
    for one_form, layer in zip(alike, unlike, strict=True):
        np.testing.assert_array_equal(one_form.materialize(), layer.materialize())
    assert in_one_form([unlike[0], host(quantize.round_to_nearest(bits=3, group_size=8))]) is None


def test_embeddings_are_padded_along_what_they_are_multiplied_by():
    table = jax.random.normal(jax.random.key(10), (50, INPUTS))
    axes = Axes(inputs=(-1,), outputs=(-2,), kind="embedding")
    tx = jw.partition(("kernel", rounding()))
    weight = one(tx, table, layout=Layout.of({"kernel": axes}))
    assert weight.scale.shape == (3, 50)
    rows = jw.lift(lambda table, i: table[i])(weight, jnp.array([49, 0]))
    np.testing.assert_array_equal(rows, weight.materialize()[jnp.array([49, 0])])


def test_inputs_that_are_sharded_give_the_same_codes(mesh):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", "data"))
    plain = one(rounding(), WEIGHT)
    sharded = one(rounding(), jax.device_put(WEIGHT, spec))
    np.testing.assert_array_equal(plain.materialize(), sharded.materialize())


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"pad": "edge"},
            r"round_to_nearest: pad='edge' is unknown. Choose 'zero' \(rows of zeros",
        ),
        ({"pad": True}, "pad=True is unknown"),
        ({"group_size": None}, "pad='zero' fills up groups of rows, but group_size=None along the"),
        ({"group_size": "tensor"}, "but group_size='tensor' along the input axis makes none"),
        ({"group_axis": "output"}, "but group_size=12 along the output axis makes none. Pass an"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        rounding(**settings)


def test_without_it_the_error_names_it():
    with pytest.raises(ValueError, match="8, 16, 32, fill up the last group by pad='zero', or"):
        one(rounding(pad=None), WEIGHT)
    with pytest.raises(ValueError, match="1, 2, 3, 6, or leave this weight out"):
        one(rounding(pad=None, group_axis="output", group_size=4), WEIGHT)
