"""extract_lora: differences of models as factors, what is lost, and what is only reported."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxweights.adapt import combine_adapters, extract_lora, merge_adapters
from jaxweights.core import apply
from jaxweights.quantize import round_to_nearest
from jaxweights.weights import Axes, LowRank, Quantized, materialize

HEADS = Axes(inputs=(-3,), outputs=(-2, -1))
LAYOUT = {"attention/kernel": HEADS, "stack/kernel": Axes()}


def draw(seed, shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(seed, scale=1.0):
    return {
        "attention": {"kernel": draw(seed, (12, 2, 4), scale)},
        "dense": {"bias": draw(seed + 1, (9,), scale), "kernel": draw(seed + 2, (12, 9), scale)},
        "embedding": draw(seed + 3, (10, 6), scale),
        "stack": {"kernel": draw(seed + 4, (3, 7, 5), scale)},
    }


BASE = model(0)
TUNED = jax.tree.map(jnp.add, BASE, model(10, 1e-2))
KERNELS = ("attention", "dense", "stack")


def matrices(tree):
    """Dense matrices in float64."""
    kernels = {name: np.asarray(tree[name]["kernel"], np.float64) for name in KERNELS}
    return kernels | {"attention": kernels["attention"].reshape(12, 8)}


DELTAS = {name: x - matrices(BASE)[name] for name, x in matrices(TUNED).items()}


def test_full_rank_is_exact():
    adapted, report = extract_lora(BASE, TUNED, rank=100, layout=LAYOUT)
    # Two roundings of numbers near 4.
    chex.assert_trees_all_close(materialize(adapted), TUNED, rtol=0, atol=2e-6)
    assert {p: x.rank for p, x in report.factors.items()} == {
        "attention/kernel": 8,
        "dense/kernel": 9,
        "stack/kernel": 5,
    }
    for name in KERNELS:
        leaf = adapted[name]["kernel"]
        assert isinstance(leaf, LowRank)
        assert leaf.base is BASE[name]["kernel"]


@settings(max_examples=8, deadline=None)
@given(rank=st.integers(1, 5))
def test_the_error_is_the_tail_of_the_singular_values(rank):
    adapted, report = extract_lora(BASE, TUNED, rank=rank, layout=LAYOUT)
    for name, delta in DELTAS.items():
        values = np.linalg.svd(delta, compute_uv=False)
        tail = np.sqrt((values[..., rank:] ** 2).sum())
        got = matrices({n: {"kernel": adapted[n]["kernel"].delta.materialize()} for n in KERNELS})
        np.testing.assert_allclose(
            np.linalg.norm(got[name] - delta), tail, rtol=1e-3, atol=1e-7
        )  # the float32 rounding of the difference itself is 1e-5 of it
        relative = tail / np.linalg.norm(delta)
        np.testing.assert_allclose(
            report.factors[f"{name}/kernel"].error, relative, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_takes_the_lowest_rank_that_keeps_it(energy):
    adapted, report = extract_lora(BASE, TUNED, energy=energy, layout=LAYOUT)
    for name, delta in DELTAS.items():
        shares = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2, axis=-1)
        shares = (shares / shares[..., -1:]).reshape(-1, shares.shape[-1])
        want = int((shares >= energy).argmax(axis=1).max()) + 1
        assert adapted[name]["kernel"].rank == report.factors[f"{name}/kernel"].rank == want
    capped, _ = extract_lora(BASE, TUNED, energy=energy, rank=2, layout=LAYOUT)
    assert all(capped[name]["kernel"].rank == 2 for name in KERNELS)


def test_all_the_energy_of_a_low_rank_change_is_its_rank():
    change = draw(5, (64, 3)) @ draw(6, (3, 48))
    base = {"kernel": jnp.zeros((64, 48))}
    adapted, report = extract_lora(base, {"kernel": change}, energy=1.0)
    assert adapted["kernel"].rank == 3
    assert float(report.factors["kernel"].error) < 1e-6
    np.testing.assert_allclose(materialize(adapted)["kernel"], change, rtol=0, atol=1e-5)


def test_what_gets_no_factors_is_taken_and_reported():
    adapted, report = extract_lora(BASE, TUNED, rank=2, layout=LAYOUT)
    assert report.others.keys() == {"dense/bias", "embedding"}
    change = np.linalg.norm(TUNED["embedding"] - BASE["embedding"])
    want = change / np.linalg.norm(BASE["embedding"])
    np.testing.assert_allclose(report.others["embedding"], want, rtol=1e-5)
    assert adapted["embedding"] is TUNED["embedding"]
    kept, report = extract_lora(BASE, TUNED, rank=2, layout=LAYOUT, others="base")
    assert kept["dense"]["bias"] is BASE["dense"]["bias"]
    assert report.others.keys() == {"dense/bias", "embedding"}
    with pytest.raises(ValueError) as error:
        extract_lora(BASE, TUNED, rank=2, layout=LAYOUT, others="error")
    assert "'dense/bias': differs by 0.0" in str(error.value)
    assert "'embedding': differs by 0.0" in str(error.value)


def test_targets_name_embeddings_too_and_refuse_vectors():
    adapted, report = extract_lora(BASE, TUNED, rank=6, targets="embedding", layout=LAYOUT)
    assert report.factors.keys() == {"embedding"}
    assert isinstance(adapted["embedding"], LowRank)
    np.testing.assert_allclose(
        materialize(adapted)["embedding"], TUNED["embedding"], rtol=0, atol=2e-6
    )
    assert report.others.keys() == {
        "attention/kernel",
        "dense/bias",
        "dense/kernel",
        "stack/kernel",
    }
    with pytest.raises(ValueError, match=r"'dense/bias': has shape \(9,\) and is no matrix"):
        extract_lora(BASE, TUNED, rank=6, targets="dense/.*", layout=LAYOUT)


def test_equal_leaves_stay_as_they_are():
    tuned = {**BASE, "dense": {**BASE["dense"], "kernel": TUNED["dense"]["kernel"]}}
    adapted, report = extract_lora(BASE, tuned, rank=2, layout=LAYOUT)
    assert adapted["stack"]["kernel"] is BASE["stack"]["kernel"]
    assert report.factors["stack/kernel"].rank == 0
    assert not report.others


def test_factors_of_what_quantization_lost_halve_its_error():
    rough = apply(round_to_nearest(bits=2, group_size=None), {"kernel": BASE["dense"]["kernel"]})
    assert isinstance(rough["kernel"], Quantized)
    original = {"kernel": BASE["dense"]["kernel"]}
    full, _ = extract_lora(rough, original, rank=9)
    np.testing.assert_allclose(materialize(full)["kernel"], original["kernel"], rtol=0, atol=5e-6)
    assert full["kernel"].base is rough["kernel"]
    half, _ = extract_lora(rough, original, rank=4)
    error = lambda tree: float(jnp.linalg.norm(materialize(tree)["kernel"] - original["kernel"]))  # noqa: E731
    assert error(half) < 0.5 * error(rough)


def test_extracted_adapters_add_up_like_task_vectors():
    other = jax.tree.map(jnp.add, BASE, model(20, 1e-2))
    adapters = [
        extract_lora(BASE, tuned, rank=9, layout=LAYOUT, others="base")[0]
        for tuned in (TUNED, other)
    ]
    both, _ = combine_adapters(adapters, [1.0, 0.5])
    merged, _ = merge_adapters(both)
    for name in KERNELS:
        parts = (BASE, TUNED, other)
        base, one, two = (np.asarray(t[name]["kernel"], np.float64) for t in parts)
        want = base + (one - base) + 0.5 * (two - base)
        np.testing.assert_allclose(merged[name]["kernel"], want, rtol=0, atol=3e-6)


def test_bfloat16_models_are_subtracted_in_float32():
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    base, tuned = narrow(BASE), narrow(TUNED)
    adapted, _ = extract_lora(base, tuned, rank=9, layout=LAYOUT)
    assert adapted["dense"]["kernel"].down.dtype == jnp.float32
    got, want = materialize(adapted)["dense"]["kernel"], tuned["dense"]["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)  # the error of the factors is far below one step


def test_a_fixed_rank_works_under_jit_and_energy_does_not():
    run = lambda b, t: extract_lora(b, t, rank=2, layout=LAYOUT)[0]  # noqa: E731
    jitted = materialize(jax.jit(run)(BASE, TUNED))
    chex.assert_trees_all_close(jitted, materialize(run(BASE, TUNED)), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"'attention/kernel': energy=0.5 chooses a rank by"):
        jax.jit(lambda b, t: extract_lora(b, t, energy=0.5, layout=LAYOUT)[0])(BASE, TUNED)


def test_factors_over_a_sharded_base_are_spread_like_it(mesh):
    place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model")))  # noqa: E731
    base, tuned = ({"kernel": place(draw(s, (8, 12)))} for s in (1, 2))
    adapted, _ = extract_lora(base, tuned, rank=8)
    down = adapted["kernel"].down.sharding
    assert down.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", None)), 2)
    np.testing.assert_allclose(materialize(adapted)["kernel"], tuned["kernel"], rtol=0, atol=5e-6)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({}, ValueError, "neither rank nor energy is given"),
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": 2.5}, TypeError, "rank=2.5 must be an integer"),
        ({"energy": 0.0}, ValueError, r"energy=0.0 must lie in \(0, 1\]"),
        ({"rank": 1, "others": "first"}, ValueError, "others='first' is not one of"),
        ({"rank": 1, "dtype": jnp.int8}, ValueError, "cannot hold factors"),
        ({"rank": 1, "targets": "nothing"}, ValueError, "targets='nothing' matches no leaf"),
    ],
)
def test_bad_settings_are_refused(options, error, words):
    with pytest.raises(error, match=f"adapt.extract_lora: .*{words}|adapt.extract_lora: {words}"):
        extract_lora(BASE, TUNED, layout=LAYOUT, **options)


def test_models_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"lacks \['stack/kernel'\]"):
        extract_lora(BASE, {k: v for k, v in TUNED.items() if k != "stack"}, rank=1)
    with pytest.raises(ValueError, match=r"tuned has \['extra'\], which base lacks"):
        extract_lora(BASE, {**TUNED, "extra": jnp.ones(2)}, rank=1)
    with pytest.raises(ValueError, match=r"'embedding': is \(11, 6\) in models\[0\] \('tuned'\)"):
        extract_lora(BASE, {**TUNED, "embedding": jnp.ones((11, 6))}, rank=1)


def test_ambiguous_axes_and_factors_over_factors_are_refused():
    with pytest.raises(ValueError, match=r"'attention/kernel': has shape \(12, 2, 4\); which of"):
        extract_lora(BASE, TUNED, rank=1)
    adapted, _ = extract_lora(BASE, TUNED, rank=1, layout=LAYOUT)
    with pytest.raises(ValueError, match="'dense/kernel': has low-rank factors already"):
        extract_lora(adapted, TUNED, rank=1, layout=LAYOUT)


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}])
def test_values_that_are_not_finite_are_refused(options):
    bad = {**TUNED, "dense": {**TUNED["dense"], "kernel": jnp.full((12, 9), jnp.nan)}}
    with pytest.raises(ValueError, match="'dense/kernel': has values in tuned that are not finite"):
        extract_lora(BASE, bad, layout=LAYOUT, **options)
    with pytest.raises(ValueError, match="'dense/kernel': has values in base that are not finite"):
        extract_lora(bad, BASE, layout=LAYOUT, **options)
