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
    iso_c,
    iso_cts,
    mean,
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
    "tsv": lambda **k: tsv(**k),
    "iso_c": lambda **k: iso_c(**k),
    "iso_cts": lambda **k: iso_cts(common=0.5, **k),
}
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
