"""A user's own method behaves like those of the library."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.core import Layout, apply
from jaxweights.merge import method, task_arithmetic
from jaxweights.stream import transform_checkpoint
from jaxweights.weights import Axes
from tests.merge._trees import assert_close, finetuned, tree

BASE = tree(0)
MODELS = [finetuned(BASE, seed) for seed in (1, 2)]


@method(scope="entry")
def arithmetic(base, models, *, weights: Sequence[float], scale: float = 1.0):
    return base + scale * sum(w * (m - base) for w, m in zip(weights, models, strict=True))


@method
def centred(base, models, *, kind: str = "mean"):
    """Depends on a whole matrix, so that mixing layers would show."""
    total = sum(models) - len(models) * base
    return base + (total - jnp.mean(total) if kind == "mean" else total / jnp.std(total))


def test_it_is_what_the_librarys_own_method_is():
    ours = apply(arithmetic(weights=[0.5, -0.2], scale=0.7), BASE, models=MODELS)
    theirs = apply(task_arithmetic(weights=[0.5, -0.2], scale=0.7), BASE, models=MODELS)
    assert_close(ours, theirs)


def test_numbers_may_be_traced_and_differentiated():
    def total(scale):
        merged = apply(arithmetic(weights=1.0, scale=scale), BASE, models=MODELS)
        return merged["dense"]["kernel"].sum()

    gradient = jax.grad(total)(0.5)
    deltas = sum(m["dense"]["kernel"] - BASE["dense"]["kernel"] for m in MODELS)
    np.testing.assert_allclose(gradient, deltas.sum(), rtol=1e-4)


def test_stacked_layers_are_merged_one_by_one():
    draw = np.random.default_rng(0).normal
    stacked = {"kernel": jnp.asarray(draw(size=(3, 6, 5)), jnp.float32)}
    base = jax.tree.map(jnp.zeros_like, stacked)
    layout = Layout.of({"kernel": Axes()}, traced=True)
    merged = apply(centred(), base, models=[stacked], layout=layout)["kernel"]
    np.testing.assert_allclose(merged.mean(axis=(1, 2)), 0, atol=1e-6)
    assert abs(float(stacked["kernel"][0].mean())) > 1e-3


def test_a_stream_runs_it(tmp_path):
    for i, name in enumerate(("base", "tuned")):
        weight = np.random.default_rng(i).normal(size=(40, 30)).astype(np.float32)
        write_safetensors(tmp_path / name, {"w.weight": weight})
    tx = arithmetic(weights=0.5)
    assert tx.scope == "entry"
    transform_checkpoint(tx, tmp_path / "base", tmp_path / "out", models=[tmp_path / "tuned"])
    first, second = (open_checkpoint(tmp_path / n).read("w.weight") for n in ("base", "tuned"))
    got = open_checkpoint(tmp_path / "out").read("w.weight")
    np.testing.assert_allclose(got, first + 0.5 * (second - first), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"weights": 1.0, "scal": 2.0}, r"merge.arithmetic: unknown settings \['scal'\].*scale"),
        ({}, r"merge.arithmetic: \['weights'\] must be given"),
        ({"weights": "all"}, r"weights='all' must be a number, or one per model"),
        ({"weights": 1.0, "scale": True}, r"scale=True must be a number"),
        ({"weights": 1.0, "out_dtype": "int8"}, r"out_dtype=int8 is no floating dtype"),
    ],
)
def test_wrong_settings_are_refused_when_it_is_built(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        arithmetic(**settings)


def test_one_number_per_model_is_counted():
    with pytest.raises(ValueError, match="weights has 3 entries for 2 models"):
        apply(arithmetic(weights=[1.0, 2.0, 3.0]), BASE, models=MODELS)


def test_functions_of_another_form_are_refused():
    with pytest.raises(TypeError, match=r"\['t'\] have no type that is known"):
        method(lambda base, models, *, t=1: base)
    with pytest.raises(TypeError, match=r"takes \['base'\]"):
        method(lambda base: base)

    @method
    def shrinks(base, models):
        return base[:1]

    with pytest.raises(TypeError, match=r"shape \(1,\) for a leaf of shape \(5,\)"):
        apply(shrinks(), {"bias": jnp.ones(5)}, models=[{"bias": jnp.zeros(5)}])


def test_nan_in_a_model_is_an_error_even_where_the_method_drops_it():
    broken = {"w": jnp.array([1.0, jnp.nan])}

    @method
    def keeps_base(base, models):
        return base

    with pytest.raises(ValueError, match=r"'w': 1 of 2 values of models\[0\] are not finite"):
        apply(keeps_base(), {"w": jnp.ones(2)}, models=[broken])
