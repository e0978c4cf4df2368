"""What every merge must keep, one line a method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply, plan
from jaxweights.merge import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    iso_c,
    iso_cts,
    karcher,
    mean,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    pcb,
    ram_plus,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
)
from jaxweights.weights import Axes
from tests.merge._trees import assert_close, assert_same_bits, copy, finetuned, floats, tree

KEY = jax.random.key(0)
BASE = tree(0)
MODELS = [finetuned(BASE, seed) for seed in (1, 2, 3)]

# Nothing dropped and weights that sum to one: the mean of all is what is merged.
WHOLE = {
    "mean": lambda **k: mean(**k),
    "task_arithmetic": lambda **k: task_arithmetic(normalize=True, **k),
    "ties": lambda **k: ties(density=1.0, **k),
    "dare_linear": lambda **k: dare_linear(density=1.0, normalize=True, **k),
    "dare_ties": lambda **k: dare_ties(density=1.0, **k),
    "breadcrumbs": lambda **k: breadcrumbs(density=1.0, normalize=True, **k),
    "breadcrumbs_ties": lambda **k: breadcrumbs_ties(density=1.0, normalize=True, **k),
    "della_linear": lambda **k: della_linear(density=1.0, normalize=True, **k),
    "della": lambda **k: della(density=1.0, **k),
}
THIN = {
    "mean": lambda **k: mean(**k),
    "task_arithmetic": lambda **k: task_arithmetic(**k),
    "ties": lambda **k: ties(density=0.4, **k),
    "ties_leaf": lambda **k: ties(density=0.4, scope="leaf", **k),
    "dare_linear": lambda **k: dare_linear(density=0.4, **k),
    "dare_ties": lambda **k: dare_ties(density=0.6, trim=0.5, **k),
    "breadcrumbs": lambda **k: breadcrumbs(density=0.4, outliers=0.1, **k),
    "breadcrumbs_ties": lambda **k: breadcrumbs_ties(density=0.4, outliers=0.1, **k),
    "breadcrumbs_row": lambda **k: breadcrumbs(density=0.4, outliers=0.1, scope="row", **k),
    "della_linear": lambda **k: della_linear(**k),
    "della": lambda **k: della(density=0.5, epsilon=0.3, **k),
    "tsv": lambda **k: tsv(**k),
    "iso_c": lambda **k: iso_c(**k),
    "iso_cts": lambda **k: iso_cts(common=0.5, **k),
}
# Methods of norms, angles and variances; those that take no weights are left alone with them.
NORMED = {
    "slerp": lambda weights=None, **k: slerp(t=0.3, **k),
    "nuslerp": lambda **k: nuslerp(**k),
    "nuslerp_deltas": lambda **k: nuslerp(deltas=True, **k),
    "nuslerp_rows": lambda **k: nuslerp(deltas=True, group="output", **k),
    "karcher": lambda **k: karcher(**k),
    "karcher_deltas": lambda **k: karcher(deltas=True, **k),
    "multislerp": lambda **k: multislerp(**k),
    "multislerp_deltas": lambda **k: multislerp(deltas=True, **k),
    "model_stock": lambda weights=None, **k: model_stock(**k),
    "sce": lambda weights=None, **k: sce(**k),
}
FEWEST = {"slerp": 1} | {name: 2 for name in NORMED if "nuslerp" in name}
OTHERS = {
    "nearswap": lambda weights=None, **k: nearswap(t=0.01, **k),
    "sce_half": lambda weights=None, **k: sce(density=0.5, **k),
    "ram_plus": lambda weights=None, **k: ram_plus(epsilon=0.0, **k),
    "pcb": lambda **k: pcb(density=0.3, **k),
    "pcb_leaf": lambda **k: pcb(density=0.3, scope="leaf", **k),
}
FEWEST |= {"nearswap": 1}
DELTAS = {name: build for name, build in THIN.items() if name != "mean"}
whole = pytest.mark.parametrize("build", WHOLE.values(), ids=WHOLE)
thin = pytest.mark.parametrize("build", THIN.values(), ids=THIN)
deltas = pytest.mark.parametrize("build", DELTAS.values(), ids=DELTAS)


@whole
def test_copies_of_one_model_merge_to_it(build):
    merged = apply(build(), BASE, models=[copy(MODELS[0]) for _ in range(3)], key=KEY)
    assert_close(merged, MODELS[0])


@thin
def test_models_equal_to_the_base_merge_to_it_bit_for_bit(build):
    assert_same_bits(apply(build(), BASE, models=[copy(BASE), copy(BASE)], key=KEY), BASE)


@thin
def test_the_order_of_the_models_does_not_matter(build):
    weights, names = [0.5, 1.5, 1.0], ["math", "code", "chat"]
    tx = build(weights=weights, names=names)
    reverse = build(weights=weights[::-1], names=names[::-1])
    merged = apply(tx, BASE, models=MODELS, key=KEY)
    assert_close(merged, apply(reverse, BASE, models=MODELS[::-1], key=KEY))
    assert max(np.abs(x - y).max() for x, y in zip(floats(merged), floats(BASE))) > 1e-3


@deltas
def test_scale_zero_leaves_the_base_bit_for_bit(build):
    assert_same_bits(apply(build(scale=0.0), BASE, models=MODELS, key=KEY), BASE)


@whole
def test_one_model_that_is_not_thinned_out_replaces_the_base(build):
    assert_close(apply(build(), BASE, models=MODELS[:1], key=KEY), MODELS[0])


@deltas
def test_larger_deltas_scale_the_merged_delta(build):
    zero = jax.tree.map(jnp.zeros_like, BASE)
    once = [tree(seed) for seed in (1, 2, 3)]
    twice = jax.tree.map(lambda x: 2 * x, once)
    merged, doubled = (apply(build(), zero, models=m, key=KEY) for m in (once, twice))
    assert_close(jax.tree.map(lambda x: 2 * x, merged), doubled, largest=10)


@thin
def test_jit_gives_what_eager_gives(build):
    tx = build(weights=[0.5, 1.5, 1.0])
    jitted = jax.jit(lambda base, models, key: apply(tx, base, models=models, key=key))
    assert_close(jitted(BASE, MODELS, KEY), apply(tx, BASE, models=MODELS, key=KEY), ulps=1)


@thin
def test_bfloat16_models_are_merged_in_float32_and_cast_once(build):
    narrow = lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)  # noqa: E731
    wide = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t)  # noqa: E731
    base, models = narrow(BASE["dense"]), [narrow(m["dense"]) for m in MODELS]
    got = apply(build(), base, models=models, key=KEY)
    want = narrow(apply(build(), wide(base), models=[wide(m) for m in models], key=KEY))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@thin
def test_a_merge_can_be_planned_without_data(build):
    shapes = jax.eval_shape(lambda: BASE)
    found = plan(build(), shapes, models=[shapes, shapes])
    assert {leaf.path for leaf in found.changed} == {"dense/bias", "dense/kernel"}


@pytest.mark.parametrize(
    "build", [ties, breadcrumbs, lambda **k: dare_linear(density=0.5, rescale="l1", **k)]
)
def test_stacked_layers_are_never_mixed(build):
    stacked = Layout.of({"layers/up/kernel": Axes()}, traced=True)
    # One layer moves a thousand times as much as the other: mixed, it would take all.
    draw = np.random.default_rng(0).normal
    kernel = draw(size=(2, 7, 5)) * np.array([1.0, 1e3]).reshape(2, 1, 1)
    norm = draw(size=(2, 5)) * np.array([1.0, 1e3]).reshape(2, 1)
    model = {"layers": {"norm": jnp.asarray(norm, jnp.float32),
                        "up": {"kernel": jnp.asarray(kernel, jnp.float32)}}}  # fmt: skip
    base = jax.tree.map(jnp.zeros_like, model)
    options = {} if build not in (ties, breadcrumbs) else {"density": 0.4, "scope": "leaf"}
    got = apply(build(**options), base, models=[model], layout=stacked, key=KEY)
    for layer in range(2):
        ours = jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), got)
        if options:
            kept = [int((x != 0).sum()) for x in jax.tree.leaves(ours)]
            assert kept == [2, 14]
            alone = jax.tree.map(lambda x, layer=layer: x[layer], model)
            zero = jax.tree.map(jnp.zeros_like, alone)
            want = apply(build(**options), zero, models=[alone])
            assert jax.tree.all(jax.tree.map(np.array_equal, ours, want))
        else:
            size = np.abs(kernel[layer]).sum()
            np.testing.assert_allclose(
                np.abs(ours["layers"]["up"]["kernel"]).sum(), size, rtol=1e-5
            )


def names(table, *excluded):
    return pytest.mark.parametrize("name", [n for n in table if n not in excluded])


def models_of(name, models=MODELS):
    return models[: FEWEST.get(name, 3)]


def assert_near(got, want, rtol=1e-5):
    """What norms, sums over a leaf and solutions leave: a share of the leaf's own length."""
    for ours, theirs in zip(floats(got), floats(want), strict=True):
        assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs)


@names(NORMED)
def test_copies_of_one_model_merge_to_it_with_norms(name):
    # SLERP goes from the tree to one model: for it the tree is a copy, too.
    base = MODELS[0] if name == "slerp" else BASE
    copies = models_of(name, [copy(MODELS[0]) for _ in range(3)])
    assert_near(apply(NORMED[name](), base, models=copies), MODELS[0])


@names(NORMED | OTHERS)
def test_models_equal_to_the_base_merge_to_it_with_norms(name):
    copies = models_of(name, [copy(BASE) for _ in range(3)])
    assert_near(apply((NORMED | OTHERS)[name](), BASE, models=copies), BASE, rtol=1e-6)


@names(NORMED | OTHERS, "slerp", "nearswap")
def test_the_order_of_the_models_does_not_matter_with_norms(name):
    build, models = (NORMED | OTHERS)[name], models_of(name)
    weights = [0.5, 1.5, 1.0][: len(models)]
    merged = apply(build(weights=weights), BASE, models=models)
    assert_near(merged, apply(build(weights=weights[::-1]), BASE, models=models[::-1]))
    assert max(np.abs(x - y).max() for x, y in zip(floats(merged), floats(BASE))) > 1e-3


@names(NORMED, "slerp", "nuslerp", "nuslerp_deltas", "nuslerp_rows", "model_stock")
def test_one_model_replaces_the_base_with_norms(name):
    assert_near(apply(NORMED[name](), BASE, models=MODELS[:1]), MODELS[0])


@names(NORMED)
def test_larger_deltas_scale_the_merged_delta_with_norms(name):
    zero = jax.tree.map(jnp.zeros_like, BASE)
    # SLERP scales with both of its ends.
    base = tree(7) if name == "slerp" else zero
    once = models_of(name, [tree(seed) for seed in (1, 2, 3)])
    thrice = lambda t: jax.tree.map(lambda x: 3 * x, t)  # noqa: E731
    merged = apply(NORMED[name](), base, models=once)
    assert_near(apply(NORMED[name](), thrice(base), models=thrice(once)), thrice(merged))


@names(NORMED | OTHERS)
def test_jit_gives_what_eager_gives_with_norms(name):
    tx, models = (NORMED | OTHERS)[name](), models_of(name)
    jitted = jax.jit(lambda base, models: apply(tx, base, models=models))
    assert_near(jitted(BASE, models), apply(tx, BASE, models=models), rtol=1e-6)


@names(NORMED | OTHERS)
def test_bfloat16_models_are_merged_in_float32_with_norms(name):
    narrow = lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)  # noqa: E731
    wide = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t)  # noqa: E731
    tx = (NORMED | OTHERS)[name]()
    base, models = narrow(BASE["dense"]), [narrow(m["dense"]) for m in models_of(name)]
    got = apply(tx, base, models=models)
    want = narrow(apply(tx, wide(base), models=[wide(m) for m in models]))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@names(NORMED | OTHERS, "pcb")
def test_stacked_layers_are_never_mixed_with_norms(name):
    tx, layout = (NORMED | OTHERS)[name](), Layout.of({"dense/kernel": Axes()}, traced=True)
    # Two layers, one of which is a thousand times larger, apart and stacked.
    layers = [[tree(10 * i + j, size) for j in range(4)] for i, size in enumerate((1.0, 1e3))]
    first, second = (jax.tree.map(jnp.asarray, layer) for layer in layers)
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in zip(first, second)]
    together = apply(tx, stacked[0], models=models_of(name, stacked[1:]), layout=layout)
    for i, layer in enumerate(layers):
        alone = apply(tx, layer[0], models=models_of(name, layer[1:]))
        assert_near(jax.tree.map(lambda x, i=i: x[i], together), alone)


def test_merging_runs_on_a_sharded_tree_and_keeps_the_sharding(mesh):
    spec = jax.sharding.PartitionSpec("data", "model")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    draw = np.random.default_rng(0).normal
    trees = [{"kernel": jnp.asarray(draw(size=(16, 16)), jnp.float32)} for _ in range(3)]
    placed = [jax.device_put(t, sharding) for t in trees]
    for tx in (mean(), ties(density=0.3), dare_linear(density=0.5)):
        want = apply(tx, trees[0], models=trees[1:], key=KEY)["kernel"]
        got = apply(tx, placed[0], models=placed[1:], key=KEY)["kernel"]
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        assert got.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("build", [mean, task_arithmetic, lambda: dare_linear(density=0.5)])
def test_elementwise_merges_need_no_collective(mesh, build):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    shape = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=sharding)
    tree_of = {"kernel": shape}
    merge = jax.jit(lambda base, models, key: apply(build(), base, models=models, key=key))
    text = merge.lower(tree_of, [tree_of] * 2, KEY).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
