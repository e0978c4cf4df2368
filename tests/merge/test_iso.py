"""Isotropic merges give every direction the same size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import iso_c, iso_cts, task_vector
from jaxweights.weights import Axes
from tests.merge._matrices import (
    LAYOUT,
    SHAPE,
    draw,
    low_rank,
    merged,
    spectrum,
    stacked_models,
    truncated,
)
from tests.merge._public import NAMES, results, whole_checkpoint

both = pytest.mark.parametrize("build", [iso_c, iso_cts])


@pytest.mark.parametrize("case, tx", [("iso_c", iso_c()), ("iso_cts", iso_cts(common=0.8))])
def test_it_agrees_with_its_authors(case, tx):
    want = results("tsv_iso", ("",))[0][case]
    base = {path: whole_checkpoint("base")[path] for path in want}
    models = [{path: whole_checkpoint(name)[path] for path in want} for name in NAMES]
    layout = {p: Axes(inputs=(-1,), outputs=(-2,)) for p in want if want[p].ndim == 2}
    got = task_vector(apply(tx, base, models=models, layout=layout), base)
    for path, expected in want.items():
        np.testing.assert_allclose(got[path], expected, rtol=0, atol=1e-5, err_msg=path)


@both
def test_all_singular_values_are_equal(build):
    deltas = [draw(i, 8, 8) for i in range(3)]
    values = spectrum(merged(build(), deltas))
    np.testing.assert_allclose(values, values.mean(), rtol=1e-5)


def test_the_nuclear_norm_of_the_sum_is_kept():
    deltas = [draw(i, *SHAPE) for i in range(3)]
    got = merged(iso_c(), deltas)
    np.testing.assert_allclose(spectrum(got).sum(), spectrum(sum(deltas)).sum(), rtol=1e-5)
    left, _, right = np.linalg.svd(sum(deltas).astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(got, spectrum(got).mean() * left @ right, rtol=0, atol=1e-5)


@both
def test_directions_that_no_low_rank_delta_has_stay_empty(build):
    deltas = [low_rank(i, 1, (12, 10)) for i in range(3)]
    got = merged(build(), deltas)
    values = spectrum(got)
    np.testing.assert_allclose(values[:3], values[0], rtol=1e-4)
    assert values[3:].max() < 1e-4 * values[0]
    # Its outputs and inputs are those of the deltas.
    total = truncated(sum(deltas), 3)
    inside = np.linalg.svd(total)[0][:, :3]
    np.testing.assert_allclose(inside @ (inside.T @ got), got, rtol=0, atol=1e-3)
    expected = spectrum(sum(deltas))[:3].mean()
    np.testing.assert_allclose(values[0], expected, rtol=1e-3)


def test_task_directions_are_outside_of_what_the_common_ones_write():
    # One direction that all share, and one that each has for itself, far weaker than the shared.
    left, right = np.linalg.qr(draw(0, 9, 9))[0], np.linalg.qr(draw(1, 9, 9))[0]
    deltas = [
        10 * np.outer(left[:, 0], right[0]) + np.outer(left[:, 1 + i], right[1 + i])
        for i in range(2)
    ]
    got = merged(iso_cts(common=0.15), deltas)
    values = [left[:, i] @ got @ right[i] for i in range(3)]
    # The mean of 20 and twice 1, over the three directions that there are.
    np.testing.assert_allclose(values, [22 / 3] * 3, rtol=1e-3)


def test_more_directions_than_there_are_are_never_asked_for():
    # Rounding 3.5 directions a model up to 4 would take 8 of 7.
    got = merged(iso_cts(common=0.01), [draw(i, 7, 7) for i in range(2)])
    assert (spectrum(got) > 1e-4).sum() == 7


@both
def test_order_and_unit_do_not_matter(build):
    deltas = [draw(i, *SHAPE) for i in range(3)]
    got = merged(build(), deltas)
    np.testing.assert_allclose(merged(build(), deltas[::-1]), got, rtol=0, atol=1e-5)
    scaled = merged(build(), [1e-4 * d for d in deltas])
    np.testing.assert_allclose(scaled * 1e4, got, rtol=0, atol=1e-4)
    doubled = merged(build(weights=[2, 2, 2], scale=0.5), deltas)
    np.testing.assert_allclose(doubled, got, rtol=0, atol=1e-5)


@both
def test_deltas_of_zero_leave_the_base(build):
    np.testing.assert_array_equal(merged(build(), [np.zeros(SHAPE, np.float32)] * 2), 0)


@both
def test_layers_and_heads_are_merged_as_their_matrices_and_the_rest_averaged(build):
    models = stacked_models()
    base = jax.tree.map(jnp.zeros_like, models[0])
    got = apply(build(), base, models=models, layout=LAYOUT)
    for layer in range(2):
        alone = merged(build(), [np.asarray(m["layers"]["kernel"][layer]) for m in models])
        np.testing.assert_allclose(got["layers"]["kernel"][layer], alone, rtol=1e-5, atol=1e-5)
    alone = merged(build(), [np.asarray(m["heads"]["kernel"]).reshape(6, 4) for m in models])
    heads = np.asarray(got["heads"]["kernel"]).reshape(6, 4)
    np.testing.assert_allclose(heads, alone, rtol=0, atol=1e-5)
    want = np.mean([m["layers"]["norm"] for m in models], axis=0)
    np.testing.assert_allclose(got["layers"]["norm"], want, rtol=0, atol=1e-6)


def test_bad_settings_are_refused_when_built():
    with pytest.raises(ValueError, match=r"merge.iso_cts: common=1.5 must lie in \(0, 1\]"):
        iso_cts(common=1.5)
