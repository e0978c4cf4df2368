"""Grouped and depthwise convolutions, calibrated, quantized and run, against NumPy and floats."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxweights as jw
from jaxweights.quantize import (
    adadim,
    adaround,
    auto_round,
    awq,
    fp8_dynamic,
    fp8_static,
    gptq,
    gptq_matrix,
    hqq,
    int8_static,
    joint,
    learned_clip,
    nf4,
    nvfp4,
    refine,
    round_inputs,
    round_to_nearest,
    smooth,
)
from jaxweights.sparsify import magnitude, wanda
from jaxweights.weights import CONV_HWIO, Axes, Masked, Quantized

HWIO, OIHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def convolve(params, x, *, groups, names=HWIO, padding="VALID"):
    return jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), padding, dimension_numbers=names, feature_group_count=groups
    )


def channels_last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def rows_of_groups(x, height, width, groups):
    """Windows `(groups, tokens, height * width * channels / groups)` of NHWC images."""
    each = x.shape[-1] // groups
    down, across = range(x.shape[1] - height + 1), range(x.shape[2] - width + 1)
    cut = [x[:, r : r + height, c : c + width] for r, c in itertools.product(down, across)]
    cut = np.stack(cut, axis=1).reshape(-1, height, width, x.shape[-1])
    parts = [cut[..., g * each : (g + 1) * each] for g in range(groups)]
    return np.stack([part.reshape(len(cut), -1) for part in parts])


def oracle(x, kernel, groups):
    """VALID grouped convolution of NHWC with HWIO, group by group."""
    height, width, _, out = kernel.shape
    rows = rows_of_groups(x, height, width, groups)
    columns = kernel.reshape(-1, groups, out // groups)
    y = [rows[g] @ columns[:, g] for g in range(groups)]  # (tokens, out / groups)
    places = (x.shape[1] - height + 1, x.shape[2] - width + 1)
    return np.concatenate(y, axis=-1).reshape(len(x), *places, out)


def images(count, size, channels):
    """Images whose channels have sizes of their own, so that none can be taken for another."""
    sizes = 1.7 ** jnp.arange(channels, dtype=jnp.float32)[None, None, None]
    return jax.random.normal(jax.random.key(1), (count, size, size, channels)) * sizes


@pytest.fixture(params=[(4, 1, 8), (2, 2, 6), (4, 1, 4)], ids=["multiplier", "grouped", "depth"])
def case(request):
    """Groups, an HWIO kernel, and images."""
    groups, own, out = request.param
    kernel = jax.random.normal(jax.random.key(0), (3, 2, own, out))
    channels = groups * own
    x = images(3, 6, channels)
    return groups, kernel, x


@pytest.fixture
def grouped():
    """The middle one of these cases alone."""
    return 2, jax.random.normal(jax.random.key(0), (3, 2, 2, 6)), images(3, 6, 4)


def calibrated(tx, kernel, x, groups, names=HWIO):
    fn = lambda p, x: convolve(p, x, groups=groups, names=names)  # noqa: E731
    params = {"conv": kernel}
    return fn, jw.calibrate(fn, params, [x], needs=tx.needs(params))


# --- products of integers and of 8-bit floats ---------------------------------------------------


def test_int8_products_are_those_of_the_integers_of_each_group(case):
    groups, kernel, x = case
    fn, stats = calibrated(int8_static(), kernel, x, groups)
    leaf = jw.apply(int8_static(), {"conv": kernel}, stats=stats)["conv"]
    codes = np.asarray(leaf.weight_only().codes_matrix()).astype(np.int64).reshape(kernel.shape)
    step = np.float32(np.abs(x).max()) / np.float32(127)
    np.testing.assert_array_equal(leaf.input_scale, step.reshape(1, 1))
    integers = np.clip(np.round(np.asarray(x) / step), -127, 127).astype(np.int64)
    expected = oracle(integers, codes, groups) * step * np.asarray(leaf.scale)[0]
    y = jax.jit(jw.lift(fn, on_materialize="error"))({"conv": leaf}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    floats = oracle(np.asarray(x), np.asarray(kernel), groups)
    assert 1e-4 < np.linalg.norm(y - floats) / np.linalg.norm(floats) < 0.02


def test_fp8_products_are_those_of_rounded_weights_and_inputs(case):
    groups, kernel, x = case
    fn, stats = calibrated(fp8_static(), kernel, x, groups)
    leaf = jw.apply(fp8_static(), {"conv": kernel}, stats=stats)["conv"]
    step = np.float32(np.abs(x).max()) / np.float32(448)
    narrow = (np.asarray(x) / step).astype(jnp.float8_e4m3fn).astype(np.float32) * step
    dense = np.asarray(leaf.materialize())
    y = jax.jit(jw.lift(fn, on_materialize="error"))({"conv": leaf}, x)
    np.testing.assert_allclose(y, oracle(narrow, dense, groups), rtol=1e-4, atol=1e-4)
    floats = oracle(np.asarray(x), np.asarray(kernel), groups)
    assert 1e-3 < np.linalg.norm(y - floats) / np.linalg.norm(floats) < 0.06


@pytest.mark.parametrize("tx", [int8_static(), fp8_static()], ids=["int8", "fp8"])
def test_kernels_with_outputs_first_give_the_same_products(tx):
    kernel = jax.random.normal(jax.random.key(0), (3, 2, 2, 6))
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
    fn, stats = calibrated(tx, kernel, x, 2)
    expected = jw.lift(fn)(jw.apply(tx, {"conv": kernel}, stats=stats), x)
    turned, first = jnp.transpose(kernel, (3, 2, 0, 1)), jnp.moveaxis(x, -1, 1)
    fn, stats = calibrated(tx, turned, first, 2, OIHW)
    y = jw.lift(fn, on_materialize="error")(jw.apply(tx, {"conv": turned}, stats=stats), first)
    np.testing.assert_allclose(channels_last(y), expected, rtol=1e-5, atol=1e-5)


def test_one_nvfp4_scale_serves_the_inputs_of_all_groups():
    kernel, x = jnp.ones((2, 2, 4, 8)), jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    tx = round_inputs(form="nvfp4")
    _, stats = calibrated(tx, kernel, x, 2)
    scale = jw.apply(tx, {"conv": kernel}, stats=stats)["conv"].input_scale
    np.testing.assert_allclose(scale, 448 * 6 / np.abs(x).max().reshape(1, 1), rtol=1e-6)


@pytest.mark.parametrize("form", ["low_rank", "factored", "quantized", "masked"])
def test_other_representations_compute_as_their_dense_kernels(grouped, form):
    groups, kernel, x = grouped
    tx = {
        "low_rank": jw.quantize.loftq(round_to_nearest(bits=4), rank=2),
        "factored": jw.adapt.truncate(rank=2),
        "quantized": round_to_nearest(bits=4),
        "masked": magnitude(sparsity=0.5),
    }[form]
    leaf = jw.apply(tx, {"conv": kernel}, layout={"conv": CONV_HWIO})["conv"]
    y = jw.lift(lambda p, x: convolve(p, x, groups=groups))({"conv": leaf}, x)
    expected = oracle(np.asarray(x), np.asarray(leaf.materialize()), groups)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


# --- Gram matrices of groups --------------------------------------------------------------------


def parts(matrix, groups):
    """Columns `(groups, in, out / groups)` of a kernel's matrix."""
    matrix = np.asarray(matrix, np.float32)
    return np.moveaxis(matrix.reshape(len(matrix), groups, -1), 1, 0)


# They differ in the fields that are put side by side.
SETTINGS = {
    "outputs": {},
    "tensor": {"group_size": "tensor", "grid": "narrow"},
    "output groups": {"group_size": 1, "group_axis": "output"},
    "static groups": {"group_size": 3, "act_order": True, "static_groups": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gptq_rounds_each_group_as_a_matrix_of_its_own(grouped, name):
    groups, kernel, x = grouped
    tx = gptq(bits=3, **SETTINGS[name])
    _, stats = calibrated(tx, kernel, x, groups)
    leaf = jw.apply(tx, {"conv": kernel}, stats=stats)["conv"]
    assert isinstance(leaf, Quantized) and leaf.shape == kernel.shape
    rows = rows_of_groups(np.asarray(x), 3, 2, groups)
    found = parts(leaf.materialize().reshape(-1, kernel.shape[-1]), groups)
    codes = parts(leaf.codes_matrix(), groups)
    given = parts(kernel.reshape(-1, kernel.shape[-1]), groups)
    for g in range(groups):
        alone = gptq_matrix(given[g], rows[g].T @ rows[g], bits=3, **SETTINGS[name])
        np.testing.assert_array_equal(codes[g], alone.codes.codes)
        scale = np.asarray(alone.codes.scale)
        blocks = (len(codes[g]) // scale.shape[0], codes.shape[-1] // scale.shape[1])
        spread = lambda field, b=blocks: np.repeat(np.repeat(field, b[0], 0), b[1], 1)  # noqa: E731
        zero = alone.codes.zero_point
        zero = 0 if zero is None else spread(np.asarray(zero, np.float32))
        expected = (np.asarray(alone.codes.codes, np.float32) - zero) * spread(scale)
        np.testing.assert_allclose(found[g], expected, rtol=1e-6, atol=1e-6)


def test_gptq_loses_less_of_the_outputs_than_rounding(grouped):
    groups, kernel, _ = grouped
    # Neighbouring pixels are alike, so that errors of one row can be made up for by others.
    base = jax.random.normal(jax.random.key(3), (4, 9, 9, groups * kernel.shape[2]))
    x = jax.lax.reduce_window(base, 0.0, jax.lax.add, (1, 4, 4, 1), (1, 1, 1, 1), "VALID")
    tx = gptq(bits=3)
    fn, stats = calibrated(tx, kernel, x, groups)
    y = fn({"conv": kernel}, x)
    error = lambda params: float(jnp.linalg.norm(jw.lift(fn)(params, x) - y))  # noqa: E731
    plain = jw.apply(round_to_nearest(bits=3), {"conv": kernel}, layout={"conv": CONV_HWIO})
    assert error(jw.apply(tx, {"conv": kernel}, stats=stats)) < 0.8 * error(plain)


@pytest.mark.parametrize(
    "tx",
    [adaround(bits=3, steps=9), auto_round(bits=3, steps=9), learned_clip(bits=3, steps=9)],
    ids=["adaround", "auto_round", "learned_clip"],
)
def test_learned_rounding_goes_by_groups(tx):
    groups, own = 2, 2
    kernel = jax.random.normal(jax.random.key(0), (2, 2, own, 4))
    x = images(2, 5, 4)
    _, stats = calibrated(tx, kernel, x, groups)
    leaf = jw.apply(tx, {"conv": kernel}, stats=stats)["conv"]
    columns = kernel.reshape(8, groups, 2)
    for g in range(groups):  # each group is a convolution by itself
        alone = {"conv": columns[:, g].reshape(2, 2, own, 2)}
        seen = jw.calibrate(
            lambda p, x: convolve(p, x, groups=1),
            alone,
            [x[..., g * own : (g + 1) * own]],
            needs=tx.needs(alone),
        )
        expected = jw.apply(tx, alone, stats=seen)["conv"].materialize()
        np.testing.assert_allclose(leaf.materialize()[..., 2 * g : 2 * g + 2], expected, 1e-4, 1e-5)


@pytest.mark.parametrize(
    "form, settings",
    [("masked", {"sparsity": 0.5}), ("dense", {"keep": 1, "of": 3})],
    ids=["half", "1:3"],
)
def test_wanda_ranks_by_the_inputs_of_an_outputs_own_group(grouped, settings, form):
    groups, kernel, x = grouped
    tx = wanda(form=form, **settings)
    _, stats = calibrated(tx, kernel, x, groups)
    leaf = jw.apply(tx, {"conv": kernel}, stats=stats)["conv"]
    assert isinstance(leaf, Masked) == (form == "masked")
    kept = np.asarray(leaf.mask if form == "masked" else leaf != 0)
    norms = np.linalg.norm(rows_of_groups(np.asarray(x), 3, 2, groups), axis=1)
    scores = np.abs(parts(kernel.reshape(-1, kernel.shape[-1]), groups)) * norms[..., None]
    runs = scores.shape[1] if "sparsity" in settings else 3
    zeros = runs // 2 if "sparsity" in settings else 2
    in_runs = scores.reshape(groups, -1, runs, scores.shape[-1])
    removed = np.argsort(np.argsort(in_runs, axis=2), axis=2) < zeros
    expected = ~removed.reshape(scores.shape)
    np.testing.assert_array_equal(parts(kept.reshape(-1, kernel.shape[-1]), groups), expected)


def test_a_stack_of_grouped_kernels_keeps_layers_apart():
    kernels = jax.random.normal(jax.random.key(0), (2, 3, 3, 2, 4))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))

    def scan(p, x):
        step = lambda h, k: (convolve({"conv": k}, h, groups=2, padding="SAME"), None)  # noqa: E731
        return jax.lax.scan(step, x, p["conv"])[0]

    tx = gptq(bits=3, group_size=9)
    stats = jw.calibrate(scan, {"conv": kernels}, [x], needs=tx.needs({"conv": kernels}))
    whole = jw.apply(tx, {"conv": kernels}, stats=stats)["conv"]
    fn = jax.jit(lambda p, x: convolve(p, x, groups=2, padding="SAME"))
    h = x
    for layer, kernel in enumerate(kernels):
        one = jw.calibrate(fn, {"conv": kernel}, [h], needs=tx.needs({"conv": kernel}))
        alone = jw.apply(tx, {"conv": kernel}, stats=one)["conv"].materialize()
        np.testing.assert_allclose(whole.materialize()[layer], alone, rtol=1e-5, atol=1e-5)
        h = fn({"conv": kernel}, h)
    assert jax.eval_shape(jw.lift(scan), {"conv": whole}, x).shape == x.shape


def test_masks_and_bfloat16_stay():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 4), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4), jnp.bfloat16)
    pruned = jw.apply(magnitude(sparsity=0.5), {"conv": kernel}, layout={"conv": CONV_HWIO})
    tx = gptq(bits=4)
    fn = lambda p, x: convolve(p, x, groups=4)  # noqa: E731
    stats = jw.calibrate(fn, pruned, [x], needs=tx.needs(pruned))
    leaf = jw.apply(tx, pruned, stats=stats)["conv"]
    assert isinstance(leaf, Masked) and isinstance(leaf.base, Quantized)
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf.mask, pruned["conv"].mask)
    assert np.all(np.asarray(leaf.materialize())[~np.asarray(leaf.mask)] == 0)


def test_jit_gives_the_codes_of_eager_and_reports_name_every_group():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 4))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    seen = {}
    tx = gptq(bits=4, report=lambda path, leaf: seen.update({path: leaf}))
    _, stats = calibrated(tx, kernel, x, 4)
    eager = jw.apply(tx, {"conv": kernel}, stats=stats)["conv"]
    assert seen["conv"].tokens.tolist() == [32] * 4 and seen["conv"].error.shape == (4,)
    traced = jax.jit(lambda p, s: jw.apply(tx, p, stats=s))({"conv": kernel}, stats)["conv"]
    np.testing.assert_array_equal(traced.codes, eager.codes)


def test_the_output_error_of_compare_and_allocate_is_that_of_the_convolution(grouped):
    groups, kernel, x = grouped
    fn, stats = calibrated(gptq(bits=4), kernel, x, groups)
    params = {"conv": kernel}
    candidates = {"three": round_to_nearest(bits=3), "eight": round_to_nearest(bits=8)}
    chosen = jw.quantize.allocate(
        params, candidates, bits_per_weight=7.0 + 32 / 6, stats=stats, measure="relative"
    )
    y = fn(params, x)
    for name, tx in candidates.items():
        rough = jw.apply(tx, params, stats=stats)
        change = jnp.sum(jnp.square(jw.lift(fn)(rough, x) - y)) / jnp.sum(jnp.square(y))
        report = jw.analyze.compare(params, rough, stats=stats)["conv"]
        np.testing.assert_allclose(report.output_error, change, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(chosen.leaves[0].options[name][1], change, rtol=1e-3, atol=1e-7)


# --- refusals -----------------------------------------------------------------------------------

_GROUPS = r"'conv': the model convolves with it in 2 feature groups, each with inputs of its own.*"
_REMEDY = r"Choose quantize.gptq to integers.*or leave this weight out with `partition`"


@pytest.mark.parametrize(
    "tx",
    [
        gptq(bits=4, grid="nf4"),
        gptq(bits=4, group_size=2, act_order=True),
        awq(bits=4, group_size=None),
        smooth(),
        adadim(bits=4),
        joint(round_to_nearest(bits=4), rank=1),
        refine(round_to_nearest(bits=4)),
        wanda(sparsity=0.5, group="leaf"),
        wanda(sparsity=0.5, group="global"),
    ],
    ids=lambda tx: tx.name,
)
def test_methods_of_one_input_for_all_outputs_refuse_groups_by_name(tx):
    kernel, x = jnp.ones((2, 2, 2, 4)), jax.random.normal(jax.random.key(0), (1, 5, 5, 4))
    _, stats = calibrated(tx, kernel, x, 2)
    with pytest.raises(ValueError, match=f"{re.escape(tx.name.split('(')[0])}: {_GROUPS}{_REMEDY}"):
        jw.apply(tx, {"conv": kernel}, stats=stats)


def test_represented_kernels_are_not_taken_apart():
    kernel, x = jnp.ones((2, 2, 2, 4)), jax.random.normal(jax.random.key(0), (1, 5, 5, 4))
    tx = wanda(sparsity=0.5)
    _, stats = calibrated(tx, kernel, x, 2)
    rounded = jw.apply(round_to_nearest(bits=4), {"conv": kernel}, layout={"conv": CONV_HWIO})
    words = (
        r"sparsify.wanda: 'conv': is a Quantized, which cannot be taken apart into its 2 feature"
    )
    with pytest.raises(ValueError, match=words):
        jw.apply(tx, rounded, stats=stats)


def test_merging_by_statistics_refuses_groups_by_name():
    kernel, x = jnp.ones((2, 2, 2, 4)), jax.random.normal(jax.random.key(0), (1, 5, 5, 4))
    fn = lambda p, x: convolve(p, x, groups=2)  # noqa: E731
    params = {"conv": kernel}
    stats = jw.calibrate(fn, params, [x], needs=jw.merge.regmean_needs(params))
    with pytest.raises(ValueError, match=f"merge.regmean: {_GROUPS}"):
        jw.apply(jw.merge.regmean(stats=[stats]), params, models=[params])
    rounded = jw.apply(round_to_nearest(bits=4), params, layout={"conv": CONV_HWIO})
    with pytest.raises(ValueError, match=f"quantize.add_deltas: {_GROUPS}"):
        jw.quantize.add_deltas(rounded, params, rounding="gptq", stats=stats)
    _, report = jw.quantize.add_deltas(rounded, params, stats=stats)
    assert 0 <= float(report["conv"].output_survived) <= 1


def test_methods_without_data_see_nine_inputs_of_a_depthwise_kernel():
    params, layout = (
        {"conv": jax.random.normal(jax.random.key(0), (3, 3, 1, 8))},
        {"conv": CONV_HWIO},
    )
    divides = r"'conv': group_size=32 does not divide the input axis, which has length 9. Choose "
    divides += r"one of 1, 3, 9, fill up the last group by pad='zero', or leave this weight out"
    for tx in (
        round_to_nearest(bits=4, group_size=32),
        nf4(group_size=32),
        hqq(bits=4, group_size=32),
    ):
        with pytest.raises(ValueError, match=divides):
            jw.apply(tx, params, layout=layout)
    with pytest.raises(ValueError, match=r"'conv': the block of 16 rows .* length 9\. Leave this"):
        jw.apply(nvfp4(), params, layout=layout)
    words = r"'conv': input axis 9 is not divisible by 4. Pass tail='dense' or tail='partial'"
    with pytest.raises(ValueError, match=words):
        jw.apply(magnitude(keep=2, of=4), params, layout=layout)
    with pytest.raises(ValueError, match=r"'conv': rank=10 exceeds min\(in=9, out=8\)=8"):
        jw.apply(jw.adapt.lora(rank=10), params, layout=layout, key=jax.random.key(0))
    # One scale for each channel; the largest magnitudes of three rows, for three rows.
    kernel = np.asarray(params["conv"]).reshape(9, 8)
    whole = jw.apply(round_to_nearest(bits=4, grid="narrow"), params, layout=layout)["conv"]
    np.testing.assert_allclose(whole.scale[0], np.abs(kernel).max(0) / 7, rtol=1e-6)
    rows = jw.apply(nf4(group_size=3), params, layout=layout)["conv"]
    np.testing.assert_allclose(rows.scale, np.abs(kernel).reshape(3, 3, 8).max(1), rtol=1e-6)
    half = jw.apply(magnitude(sparsity=0.5, group="output"), params, layout=layout)["conv"]
    assert half.mask.reshape(9, 8).sum(0).tolist() == [5] * 8


# --- whole networks -----------------------------------------------------------------------------


class Separable(nn.Module):
    """A stem, a depthwise-separable block, a grouped convolution as of ResNeXt, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(12, (1, 1), name="pointwise")(x))
        x = nn.relu(nn.Conv(12, (3, 3), strides=2, feature_group_count=4, name="grouped")(x))
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def network():
    net, x = Separable(), jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    params = jax.jit(net.init)(jax.random.key(1), x)["params"]
    fn = jax.jit(lambda p, x: net.apply({"params": p}, x))
    return fn, params, x, fn(params, x)


def lifted(fn, params, x, on_materialize="ok"):
    return jax.jit(jw.lift(fn, on_materialize=on_materialize))(params, x)


def relative(y, expected):
    return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(
    "tx, error", [(int8_static(), 0.03), (fp8_static(), 0.08)], ids=["int8", "fp8"]
)
def test_a_depthwise_separable_network_runs_in_8_bits(network, tx, error):
    fn, params, x, expected = network
    stats = jw.calibrate(fn, params, [x[:8], x[8:]], needs=tx.needs(params))
    narrow = jw.apply(tx, params, stats=stats)
    assert not any(isinstance(layer["kernel"], jax.Array) for layer in narrow.values())
    y = lifted(fn, narrow, x, "error")
    assert 1e-4 < relative(y, expected) < error


def test_a_tree_may_mix_methods_for_grouped_and_other_convolutions(network):
    fn, params, x, expected = network
    mixed = jw.partition(
        (r"(depthwise|grouped)/kernel", int8_static()), (r"(stem|pointwise)/kernel", gptq(bits=4))
    )
    stats = jw.calibrate(fn, params, [x], needs=mixed.needs(params))
    assert stats.get("depthwise/kernel", "gram") is None
    new = jw.apply(mixed, params, stats=stats)
    kinds = {name: type(layer["kernel"]).__name__ for name, layer in new.items()}
    assert kinds["depthwise"] == kinds["grouped"] == "QuantizedProduct"
    assert kinds["stem"] == kinds["pointwise"] == "Quantized"
    assert isinstance(new["classifier"]["kernel"], jax.Array)
    assert relative(lifted(fn, new, x), expected) < 0.15


def test_gptq_takes_the_whole_network_and_beats_rounding(network):
    fn, params, x, expected = network
    tx = gptq(bits=4)
    stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
    plain = jw.apply(round_to_nearest(bits=4), params, stats=stats)
    error = relative(lifted(fn, jw.apply(tx, params, stats=stats), x), expected)
    assert error < 0.8 * relative(lifted(fn, plain, x), expected)


def test_nnx_modules_calibrate_and_run_too():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.depth = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
            self.point = nnx.Conv(4, 6, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.point(nnx.relu(self.depth(x)))

    graph, state = nnx.split(Block(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    tx = int8_static()
    stats = jw.calibrate(fn, state, [x], needs=tx.needs(state))
    (path,) = [p for p in stats.paths if p.startswith("depth/")]
    assert stats.get(path, "max").shape == (4, 9)
    y = jw.lift(fn, on_materialize="error")(jw.apply(tx, state, stats=stats), x)
    assert 1e-4 < relative(y, fn(state, x)) < 0.03


def test_dynamic_scales_need_no_calibration(network):
    fn, params, x, expected = network
    layout = jw.infer_layout(fn, params, x)
    y = lifted(fn, jw.apply(fp8_dynamic(), params, layout=layout), x, "error")
    assert relative(y, expected) < 0.08
    assert layout["depthwise/kernel"] == Axes((-4, -3, -2), (-1,), kind="conv")
