"""combine_adapters: sums of adapters from their factors, and what each mode promises."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxweights.adapt import combine_adapters, lora, rslora
from jaxweights.core import apply
from jaxweights.weights import EMBEDDING, Axes, LowRank, Masked, Quantized, View, materialize
from tests._fixtures import fixture

# float32 sums of tens of terms of order 1, through two QR and one SVD.
TOL = {"rtol": 0, "atol": 2e-5}
HEADS = Axes(inputs=(-3,), outputs=(-2, -1))


def draw(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


BASE = {
    "attention": {"kernel": draw(0, (12, 2, 4))},
    "dense": {"kernel": draw(1, (12, 9)), "bias": draw(2, (9,))},
    "stack": {"kernel": draw(3, (3, 7, 5))},
}
VIEWS = {
    "attention": View.of((12, 2, 4), HEADS),
    "dense": View.of((12, 9)),
    "stack": View.of((3, 7, 5)),
}


def adapter(seed, rank=2, scaling=2.0, only=("attention", "dense", "stack")):
    """Factors on three kinds of leaves: heads, a plain matrix, a stack with scalings of its own."""
    new = {name: dict(leaves) for name, leaves in BASE.items()}
    for i, name in enumerate(only):
        base, view = BASE[name]["kernel"], VIEWS[name]
        stack = (3,) if name == "stack" else ()
        down = draw(100 * seed + i, (*stack, view.in_dim, rank))
        up = draw(100 * seed + 50 + i, (*stack, rank, view.out_dim))
        scale = scaling * jnp.arange(1.0, 4.0) if stack else scaling
        new[name]["kernel"] = LowRank.over(base, down, up, scaling=scale, view=view)
    return new


def deltas(tree):
    """Dense deltas in float64, `(*stack, in, out)`."""
    found = {}
    for name, leaves in tree.items():
        leaf = leaves["kernel"]
        if isinstance(leaf, LowRank):
            s = np.asarray(leaf.scaling, np.float64)[..., None, None]
            found[name] = s * (np.float64(leaf.down) @ np.float64(leaf.up))
    return found


def assert_deltas(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], **(tolerance or TOL), err_msg=name)


def weighted_sum(trees, weights):
    total = {}
    for tree, weight in zip(trees, weights, strict=True):
        for name, delta in deltas(tree).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


# --- beside peft --------------------------------------------------------------------------------


def peft_trees(group):
    arrays = fixture("adapt/weighted_adapters.npz")
    count = len({key.split("/")[1] for key in arrays if key.startswith(f"{group}/ad")})
    trees = []
    for i in range(count):
        tree = {}
        for name in ("fc1", "fc2"):
            prefix = f"{group}/ad{i}/{name}"
            tree[name] = LowRank.over(
                jnp.asarray(arrays[f"{group}/base/{name}.weight"].T),
                jnp.asarray(arrays[f"{prefix}.A"].T),
                jnp.asarray(arrays[f"{prefix}.B"].T),
                scaling=float(arrays[f"{prefix}.scaling"]),
            )
        trees.append(tree)
    return arrays, trees


@pytest.mark.parametrize(
    "case, mode",
    [
        ("mixed_rank/cat", "cat"),
        ("mixed_rank/cat_negative", "cat"),
        ("mixed_rank/svd", "svd"),
        ("mixed_rank/svd_rank", "svd"),
        ("same_rank/linear", "linear"),
        ("same_rank/linear_negative", "linear"),
        ("same_rank/dare_linear_d1", "linear"),  # which drops nothing
    ],
)
def test_combined_deltas_are_those_of_peft(case, mode):
    arrays, trees = peft_trees(case.split("/")[0])
    settings = json.loads(str(arrays["meta"]))["cases"][case]
    weights, rank = settings["weights"], settings.get("svd_rank")
    merged, report = combine_adapters(trees, weights, mode=mode, rank=rank)
    for name, leaf in merged.items():
        want = arrays[f"{case}/{name}.delta"].T
        np.testing.assert_allclose(leaf.delta.materialize(), want, rtol=0, atol=1e-5)
        assert report[name].rank == leaf.rank == arrays[f"{case}/{name}.A"].shape[0]


# --- what every mode promises -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cat", "svd", "linear"])
@pytest.mark.parametrize("make", [lora(rank=3, alpha=6), rslora(rank=3, alpha=6)])
def test_one_adapter_of_weight_one_keeps_its_delta(mode, make):
    axes = {"attention/kernel": HEADS, "stack/kernel": Axes(), "dense/kernel": Axes()}
    tree = apply(make, BASE, layout=axes)
    for i, leaves in enumerate(tree.values()):
        up = leaves["kernel"].up
        leaves["kernel"] = dataclasses.replace(leaves["kernel"], up=draw(i, up.shape))
    merged, report = combine_adapters([tree], mode=mode)
    assert_deltas(deltas(merged), deltas(tree))
    assert all(float(loss.error) < 1e-6 and loss.rank == 3 for loss in report.values())


@pytest.mark.parametrize("mode", ["cat", "svd", "linear"])
def test_an_adapter_and_its_negative_cancel(mode):
    tree = adapter(1)
    merged, _ = combine_adapters([tree, adapter(1)], [1.0, -1.0], mode=mode)
    # Rounding of sums of order 10 is all that is left.
    assert_deltas(deltas(merged), {n: np.zeros_like(d) for n, d in deltas(tree).items()})


@pytest.mark.parametrize("seed", range(5))
def test_cat_is_the_dense_sum_and_svd_of_full_rank_is_cat(seed):
    rng = np.random.default_rng(seed)
    ranks, weights = rng.integers(1, 5, 3), rng.normal(size=3)
    trees = [adapter(10 * seed + i, int(r), float(rng.normal())) for i, r in enumerate(ranks)]
    cat, report = combine_adapters(trees, weights)
    assert_deltas(deltas(cat), weighted_sum(trees, weights), rtol=0, atol=5e-5)
    assert all(x.rank == sum(ranks) and x.error == 0 for x in report.values())
    svd, report = combine_adapters(trees, weights, mode="svd", rank=int(sum(ranks)) + 2)
    assert_deltas(deltas(svd), deltas(cat), rtol=0, atol=1e-4)
    assert all(float(x.error) < 1e-6 for x in report.values())
    assert report["attention/kernel"].rank == min(sum(ranks), 8)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_of_svd_is_the_tail_of_the_singular_values(rank):
    trees, weights = [adapter(1, 4), adapter(2, 3)], [1.0, -0.5]
    merged, report = combine_adapters(trees, weights, mode="svd", rank=rank)
    for name, total in weighted_sum(trees, weights).items():
        values = np.linalg.svd(total, compute_uv=False)
        tail = np.sqrt((values[..., rank:] ** 2).sum())
        assert tail > 1  # there is something to lose
        error = np.linalg.norm(deltas(merged)[name] - total)
        np.testing.assert_allclose(error, tail, rtol=1e-5)
        relative = tail / np.linalg.norm(total)
        np.testing.assert_allclose(report[f"{name}/kernel"].error, relative, rtol=1e-5)


def test_linear_adds_cross_terms_and_reports_them():
    trees = [adapter(1), adapter(2)]
    merged, report = combine_adapters(trees, mode="linear")
    total = weighted_sum(trees, [1, 1])
    for name, delta in deltas(merged).items():
        off = np.linalg.norm(delta - total[name]) / np.linalg.norm(total[name])
        assert off > 0.5  # two products that were never trained, as large as the two that were
        np.testing.assert_allclose(report[f"{name}/kernel"].error, off, rtol=1e-5)


def test_factors_of_the_truncation_are_balanced():
    merged, _ = combine_adapters([adapter(1, 4), adapter(2, 3)], mode="svd", rank=4)
    leaf = merged["dense"]["kernel"]
    np.testing.assert_allclose(
        jnp.linalg.norm(leaf.down, axis=0), jnp.linalg.norm(leaf.up, axis=1), rtol=1e-5
    )


def test_untrained_adapters_have_nothing_to_lose():
    axes = {"attention/kernel": HEADS, "stack/kernel": Axes(), "dense/kernel": Axes()}
    tree = apply(lora(rank=3), BASE, layout=axes)
    for mode in ("cat", "svd", "linear"):
        merged, report = combine_adapters([tree, tree], mode=mode)
        chex.assert_trees_all_equal(materialize(merged), BASE)
        assert all(loss.error == 0 for loss in report.values())


# --- trees --------------------------------------------------------------------------------------


def test_leaves_that_one_adapter_changes_get_its_delta_alone():
    first, second = adapter(1, only=("dense",)), adapter(2, 3, only=("stack", "dense"))
    for mode in ("cat", "svd"):
        merged, report = combine_adapters([first, second], [1.0, 0.5], mode=mode, rank=None)
        assert merged["attention"]["kernel"] is BASE["attention"]["kernel"]
        assert report["stack/kernel"].rank == 3
        want = 0.5 * deltas(second)["stack"]
        np.testing.assert_allclose(deltas(merged)["stack"], want, **TOL)
    assert report.keys() == {"dense/kernel", "stack/kernel"}


def test_the_base_stays_the_same_object_and_may_be_quantized_or_masked():
    weight = adapter(1)["dense"]["kernel"]
    kernel = BASE["dense"]["kernel"]
    masked = Masked(kernel, kernel > 0)
    codes = jnp.asarray(np.arange(108).reshape(12, 9) % 15 - 7, jnp.int8)
    quantized = Quantized.from_codes(codes, jnp.full((1, 9), 0.5), bits=4)
    for base in (kernel, masked, quantized):
        tree = {"kernel": dataclasses.replace(weight, base=base)}
        merged, _ = combine_adapters([tree, tree], [0.25, 0.75])
        assert merged["kernel"].base is base
        np.testing.assert_allclose(
            merged["kernel"].delta.materialize(), weight.delta.materialize(), **TOL
        )


def test_factors_under_a_mask_are_found():
    weight = adapter(1)["dense"]["kernel"]
    tree = {"kernel": Masked(weight, jnp.ones(weight.shape, bool))}
    merged, _ = combine_adapters([tree, tree], [0.5, 0.5])
    assert isinstance(merged["kernel"], Masked)
    assert merged["kernel"].base.rank == 4


def test_tables_of_embeddings_are_combined_as_they_are_read():
    table = draw(1, (10, 6))
    view = View.of(table.shape, EMBEDDING)
    make = lambda s: {  # noqa: E731
        "embedding": LowRank.over(
            table,
            draw(s, (6, 2)),
            draw(s + 9, (2, 10)),
            view=view,
        )
    }
    merged, _ = combine_adapters([make(1), make(2)])
    want = table + sum(make(s)["embedding"].delta.materialize() for s in (1, 2))
    np.testing.assert_allclose(materialize(merged)["embedding"], want, **TOL)


def test_bfloat16_factors_are_combined_in_float32():
    trees = [
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter(i)["dense"]["kernel"])
        for i in (1, 2)
    ]
    trees = [
        {"kernel": dataclasses.replace(t, scaling=t.scaling.astype(jnp.float32))} for t in trees
    ]
    merged, _ = combine_adapters(trees, [0.3, 0.7])
    assert merged["kernel"].down.dtype == jnp.float32
    want = sum(
        w * 2.0 * np.float64(t["kernel"].down) @ np.float64(t["kernel"].up)
        for w, t in zip((0.3, 0.7), trees, strict=True)
    )
    np.testing.assert_allclose(merged["kernel"].delta.materialize(), want, **TOL)
    narrow, _ = combine_adapters(trees, dtype=jnp.bfloat16)
    assert narrow["kernel"].up.dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", ["cat", "svd", "linear"])
def test_weights_may_be_traced_and_are_differentiable(mode):
    trees = [adapter(1, only=("dense",)), adapter(2, only=("dense",))]

    def total(weights):
        merged, _ = combine_adapters(trees, weights, mode=mode)
        return jnp.sum(merged["dense"]["kernel"].delta.materialize() ** 2)

    weights = jnp.array([0.7, 0.4])
    value, slope = jax.jit(jax.value_and_grad(total))(weights)
    np.testing.assert_allclose(value, total(weights), rtol=1e-5)
    if mode == "cat":
        step = 1e-2  # central differences of a quadratic are exact but for rounding
        for i in range(2):
            e = jnp.zeros(2).at[i].set(step)
            want = (total(weights + e) - total(weights - e)) / (2 * step)
            np.testing.assert_allclose(slope[i], want, rtol=1e-3)


def test_no_array_as_large_as_a_weight_is_formed():
    make = lambda s: {  # noqa: E731
        "k": LowRank.over(jnp.zeros((300, 400)), draw(s, (300, 2)), draw(s, (2, 400)))
    }
    for mode in ("cat", "svd", "linear"):

        def run(first, second, mode=mode):
            merged, _ = combine_adapters([first, second], mode=mode)
            return merged["k"].down, merged["k"].up

        text = str(jax.make_jaxpr(run)(make(1), make(2)))
        computed = [line.split(" = ")[0] for line in text.splitlines() if " = " in line]
        assert len(computed) > 5
        assert not [line for line in computed if "300,400" in line or "400,300" in line]


@pytest.mark.parametrize("mode, rank", [("cat", None), ("svd", 4)])
def test_factors_over_a_sharded_base_are_spread_like_it(mode, rank, mesh):
    spec = lambda *names: NamedSharding(mesh, PartitionSpec(*names))  # noqa: E731
    base = jax.device_put(draw(0, (8, 12)), spec("data", "model"))
    trees = [
        {"k": LowRank.over(base, draw(s, (8, 2)), draw(s + 9, (2, 12)), scaling=0.5)}
        for s in (1, 2)
    ]
    combined = combine_adapters(trees, [1.0, -1.0], mode=mode, rank=rank)[0]["k"]
    assert combined.base is base
    assert combined.down.sharding.is_equivalent_to(spec("data", None), 2)
    assert combined.up.sharding.is_equivalent_to(spec(None, "model"), 2)
    want = sum(w * t["k"].delta.materialize() for w, t in zip((1, -1), trees, strict=True))
    np.testing.assert_allclose(combined.delta.materialize(), want, **TOL)


# --- refusals -----------------------------------------------------------------------------------


def test_adapters_of_other_bases_are_refused():
    other = adapter(2)
    kernel = other["dense"]["kernel"]
    other["dense"]["kernel"] = dataclasses.replace(kernel, base=kernel.base + 1)
    with pytest.raises(ValueError, match=r"'dense/kernel': has another base in adapters\[1\]"):
        combine_adapters([adapter(1), other])


def test_leaves_trained_beside_the_factors_are_refused_or_taken_from_the_first():
    other = adapter(2)
    other["dense"]["bias"] = other["dense"]["bias"] + 1
    with pytest.raises(ValueError, match=r"'dense/bias': has no factors and differs in .*\('b'\)"):
        combine_adapters([adapter(1), other], names=["a", "b"])
    merged, _ = combine_adapters([adapter(1), other], others="first")
    assert merged["dense"]["bias"] is BASE["dense"]["bias"]


def test_different_ranks_are_refused_by_linear():
    with pytest.raises(ValueError, match=r"'dense/kernel': has ranks \[2, 3\], and mode='linear'"):
        combine_adapters([adapter(1, 2), adapter(2, 3)], mode="linear")


def test_other_trees_shapes_and_axes_are_refused():
    with pytest.raises(ValueError, match=r"adapters\[1\] lacks \['attention/kernel'\]"):
        combine_adapters([adapter(1), {k: v for k, v in adapter(2).items() if k != "attention"}])
    make = lambda shape, axes: {  # noqa: E731
        "k": LowRank.over(
            jnp.zeros(shape), jnp.ones((4, 1)), jnp.ones((1, 4)), view=View.of(shape, axes)
        )
    }
    with pytest.raises(ValueError, match=r"'k': has factors for Axes\(inputs=\(-1,\)"):
        combine_adapters([make((4, 4), Axes()), make((4, 4), EMBEDDING)])
    other = {"k": LowRank.over(jnp.zeros((5, 4)), jnp.ones((5, 1)), jnp.ones((1, 4)))}
    with pytest.raises(ValueError, match=r"'k': is \(5, 4\) in adapters\[1\] but \(4, 4\)"):
        combine_adapters([make((4, 4), Axes()), other])


def test_factors_that_are_not_finite_are_named():
    bad = adapter(2)
    kernel = bad["stack"]["kernel"]
    bad["stack"]["kernel"] = dataclasses.replace(kernel, up=kernel.up.at[1, 0, 0].set(jnp.nan))
    for mode in ("cat", "svd", "linear"):
        with pytest.raises(ValueError, match=r"'stack/kernel': up of adapters\[1\] is not finite"):
            combine_adapters([adapter(1), bad], mode=mode)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mode": "ties"}, r"mode='ties' is not one of 'cat', 'svd', 'linear'"),
        ({"rank": 2}, r"rank=2 goes with mode='svd' only"),
        ({"rank": 0, "mode": "svd"}, r"rank=0 must be at least 1"),
        ({"weights": [1.0]}, r"weights=\[1.0\] must be 2 finite numbers"),
        ({"weights": [1.0, float("nan")]}, r"must be 2 finite numbers"),
        ({"dtype": jnp.int8}, r"cannot hold factors"),
        ({"others": "last"}, r"others='last' is not one of"),
        ({"names": ["a"]}, r"names has 1 entries for 2 adapters"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=rf"adapt.combine_adapters: {words}|{words}"):
        combine_adapters([adapter(1), adapter(2)], **settings)


def test_trees_without_factors_are_refused():
    with pytest.raises(ValueError, match="adapters is empty"):
        combine_adapters([])
    with pytest.raises(TypeError, match=r"adapters is a dict. Pass a list of trees"):
        combine_adapters(adapter(1))
    with pytest.raises(ValueError, match=r"adapters\[1\] has no leaf with low-rank factors"):
        combine_adapters([adapter(1), BASE])
