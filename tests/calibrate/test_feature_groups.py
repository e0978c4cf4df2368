"""Statistics of grouped and depthwise convolutions, against windows that NumPy cuts out."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import calibrate

SUMS = frozenset({"sum", "abs_sum", "second_moment"})
EXTREMES = frozenset({"min", "max"})


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def windows(x, spatial, *, groups, stride=1, dilation=1):
    """Windows `(groups, windows, channels / groups, *spatial)` of `(batch, *space, channels)`."""
    space, channels = x.shape[1:-1], x.shape[-1]
    starts = [range(0, n - dilation * (k - 1), stride) for n, k in zip(space, spatial, strict=True)]
    found = []
    for g in range(groups):
        own = x[..., g * channels // groups : (g + 1) * channels // groups]
        rows = []
        for example, *at in itertools.product(range(len(x)), *starts):
            cut = tuple(
                slice(a, a + dilation * (k - 1) + 1, dilation)
                for a, k in zip(at, spatial, strict=True)
            )
            rows.append(np.moveaxis(own[(example, *cut)], -1, 0))
        found.append(np.stack(rows))
    return np.stack(found)


def statistics(rows):
    """Of `(groups, tokens, in)`."""
    rows = rows.astype(np.float64)
    return {
        "sum": rows.sum(1),
        "abs_sum": np.abs(rows).sum(1),
        "second_moment": np.square(rows).sum(1),
        "min": rows.min(1),
        "max": rows.max(1),
        "gram": np.einsum("gti,gtj->gij", rows, rows),
    }


def convolve(p, x, names, groups, **options):
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": "VALID"} | options
    return jax.lax.conv_general_dilated(
        x, p["conv"], dimension_numbers=names, feature_group_count=groups, **options
    )


# Of each case: axis names, groups, kernel, input with channels last, and options.
CASES = {
    "depthwise": (("NHWC", "HWIO", "NHWC"), 4, (3, 2, 1, 4), (2, 5, 6, 4), {}),
    "depthwise, two outputs each": (("NHWC", "HWIO", "NHWC"), 4, (2, 2, 1, 8), (2, 4, 4, 4), {}),
    "grouped, strided, dilated": (
        ("NHWC", "HWIO", "NHWC"),
        2,
        (2, 2, 3, 4),
        (2, 6, 7, 6),
        {"window_strides": (2, 2), "rhs_dilation": (2, 2)},
    ),
    "as torch and Equinox": (("NCHW", "OIHW", "NCHW"), 3, (6, 2, 2, 3), (2, 5, 5, 6), {}),
    "in one dimension": (("NWC", "WIO", "NWC"), 2, (3, 2, 4), (2, 7, 4), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_group_has_the_statistics_of_its_own_channels(case):
    names, groups, shape, space, options = CASES[case]
    kernel = draw(0, *shape)
    # Every channel has a size of its own, so that none can be taken for another.
    batches = [draw(seed, *space) * np.float32(1.5) ** np.arange(space[-1]) for seed in (1, 2)]
    outputs_first = names[1].startswith("O")
    spatial = shape[2:] if outputs_first else shape[:-2]
    stride, dilation = (options.get(k, (1,))[0] for k in ("window_strides", "rhs_dilation"))
    cut = [windows(x, spatial, groups=groups, stride=stride, dilation=dilation) for x in batches]
    cut = np.concatenate(cut, axis=1)
    # A kernel lists its inputs in its own order: (channel, *space) or (*space, channel).
    cut = cut if outputs_first else np.moveaxis(cut, 2, -1)
    rows = cut.reshape(*cut.shape[:2], -1)
    given = [np.moveaxis(x, -1, 1) if outputs_first else x for x in batches]
    fn = lambda p, x: convolve(p, x, names, groups, **options)  # noqa: E731
    # The oracle's rows are those that the model multiplies with its groups of columns.
    columns = np.moveaxis(kernel, 0, -1) if outputs_first else kernel
    columns = columns.reshape(rows.shape[-1], groups, -1)
    outputs = np.concatenate(
        [
            np.moveaxis(y, 1, -1) if outputs_first else y
            for y in (np.asarray(fn({"conv": kernel}, x)) for x in given)
        ]
    )
    expected = np.einsum("gti,igo->tgo", rows, columns).reshape(-1, outputs.shape[-1])
    np.testing.assert_allclose(
        outputs.reshape(-1, outputs.shape[-1]), expected, rtol=1e-4, atol=1e-4
    )
    for names_wanted in (SUMS | EXTREMES, frozenset({"gram"})):
        stats = calibrate(fn, {"conv": kernel}, given, needs={"conv": names_wanted})
        assert stats.get("conv", "count").tolist() == [rows.shape[1]] * groups
        assert stats.feature_groups("conv", ()) == groups
        for name in names_wanted:
            found = stats.get("conv", name)
            expected = statistics(rows)[name]
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3, err_msg=name)


def test_scanned_depthwise_kernels_have_groups_behind_their_stack():
    x, kernels = draw(0, 2, 5, 5, 3), draw(1, 2, 1, 1, 1, 3)
    names = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        step = lambda h, k: (convolve({"conv": k}, h, names, 3), None)  # noqa: E731
        return jax.lax.scan(step, x, p["conv"])[0]

    stats = calibrate(fn, {"conv": kernels}, [x], needs={"conv": {"gram", "max"}})
    assert stats.get("conv", "gram").shape == (2, 3, 1, 1)
    second = x * kernels[0].reshape(3)
    for layer, seen in enumerate((x, second)):
        flat = seen.reshape(-1, 3)
        gram, most = stats.get("conv", "gram")[layer], stats.get("conv", "max")[layer]
        np.testing.assert_allclose(gram[:, 0, 0], np.square(flat).sum(0), rtol=1e-4)
        np.testing.assert_allclose(most[:, 0], flat.max(0), rtol=1e-5)
    assert stats.get("conv", "count").tolist() == [[50, 50, 50]] * 2
    assert stats.feature_groups("conv", (2,)) == 3


def test_masked_examples_do_not_count_in_any_group():
    x, kernel = draw(0, 3, 4, 4, 2), draw(1, 2, 2, 1, 2)
    fn = lambda p, x: convolve(p, x, ("NHWC", "HWIO", "NHWC"), 2)  # noqa: E731
    keep = np.array([True, False, True])
    needs = {"conv": SUMS | EXTREMES}
    masked = calibrate(fn, {"conv": kernel}, [x], needs=needs, mask=lambda _: keep)
    fewer = calibrate(fn, {"conv": kernel}, [x[keep]], needs=needs)
    for name in (*SUMS, *EXTREMES, "count"):
        found, expected = masked.get("conv", name), fewer.get("conv", name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_kernels_share_statistics_only_where_they_are_grouped_alike():
    x = draw(0, 1, 4, 4, 4)
    params = {"a": draw(1, 2, 2, 1, 4), "b": draw(2, 2, 2, 1, 8), "c": draw(3, 2, 2, 2, 4)}
    names = ("NHWC", "HWIO", "NHWC")
    groups = {"a": 4, "b": 4, "c": 2}

    def fn(p, x):
        return [convolve({"conv": p[k]}, x, names, groups[k]) for k in p]

    stats = calibrate(fn, params, [x], needs=dict.fromkeys(params, frozenset({"gram"})))
    assert stats.owners == (("b", "a"),)
    assert stats.get("c", "gram").shape == (2, 8, 8)


def test_inputs_of_groups_are_paired_with_those_of_a_reference_model():
    x, params = draw(0, 2, 4, 4, 2), {"scale": np.float32([1.0, 2.0]), "conv": draw(1, 1, 1, 1, 2)}
    names = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        return convolve(p, x * p["scale"].reshape(1, 1, 1, 2), names, 2)

    reference = params | {"scale": np.float32([3.0, 5.0])}
    needs = {"conv": frozenset({"gram", "cross_gram"})}
    stats = calibrate(fn, params, [x], needs=needs, reference=reference)
    squares = np.square(x.reshape(-1, 2)).sum(0)
    np.testing.assert_allclose(stats.get("conv", "cross_gram")[:, 0, 0], squares * [3, 10], 1e-5)


def test_kernels_that_are_grouped_in_two_ways_are_refused_by_name():
    def fn(p, x):
        names = ("NHWC", "HWIO", "NHWC")
        return convolve(p, x, names, 2), convolve(p, x[..., :2], names, 1)

    params, x = {"conv": draw(0, 1, 1, 2, 4)}, draw(1, 1, 2, 2, 4)
    words = r"calibrate: 'conv': the model convolves with it in \[1, 2\] feature groups by turns"
    with pytest.raises(ValueError, match=words):
        calibrate(fn, params, [x], needs={"conv": {"max"}})


def test_batch_groups_are_refused_by_name():
    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            batch_group_count=2,
        )

    params, x = {"conv": draw(0, 1, 1, 3, 4)}, draw(1, 2, 2, 2, 3)
    with pytest.raises(ValueError, match=r"calibrate: 'conv': this convolution has 2 batch groups"):
        calibrate(fn, params, [x], needs={"conv": {"max"}})


def test_statistics_of_halves_add_up_and_survive_a_tie():
    x, kernel = draw(0, 4, 3, 3, 2), jnp.asarray(draw(1, 2, 2, 1, 2))
    names = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        first = convolve({"conv": p["a"]}, x, names, 2)
        return first + convolve({"conv": p["b"]}, 2 * x, names, 2)

    params = {"a": kernel, "b": kernel}
    run = lambda x: calibrate(  # noqa: E731
        fn, params, [x], needs=dict.fromkeys(params, frozenset({"gram", "max"}))
    )
    whole, both = run(x), run(x[:1]) + run(x[1:])
    np.testing.assert_allclose(whole.get("a", "gram"), both.get("a", "gram"), rtol=1e-5)
    tied = whole.of_tied({"a": "a", "b": "a"})
    np.testing.assert_allclose(tied.get("a", "gram"), 5 * whole.get("a", "gram"), rtol=1e-5)
    # One array in convolutions of other groups has no statistics that serve both.
    other = jw.Stats({"a": whole.values["a"], "b": {"count": jnp.ones(3)}}, (), whole.layout)
    with pytest.raises(ValueError, match=r"apply: 'a': is one array with \['b'\].*feature groups"):
        other.of_tied({"a": "a", "b": "a"})
