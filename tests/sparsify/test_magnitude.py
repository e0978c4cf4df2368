import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Context, apply, conventional_layout, largest
from jaxweights.sparsify import magnitude, n_of_m_mask
from jaxweights.weights import Axes, Masked, Quantized, materialize
from tests._fixtures import fixture

SETTINGS = [
    {"sparsity": 0.4},
    {"sparsity": 0.4, "group": "output"},
    {"sparsity": 0.4, "group": "input_block", "block": 3},
    {"sparsity": 0.4, "group": "global"},
    {"keep": 1, "of": 4},
]
GROUPS = SETTINGS[:4]
name_of = lambda settings: settings.get("group", f"{settings.get('keep', 'leaf')}")  # noqa: E731


def tree(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": {"embedding": jax.random.normal(keys[2], (6, 4), dtype)},
        "mlp": {
            "bias": jnp.ones(8, dtype),
            "kernel": jax.random.normal(keys[0], (12, 8), dtype),
        },
        "layers": {"kernel": jax.random.normal(keys[1], (3, 12, 8), dtype)},
    }


LAYOUT = {"layers/kernel": Axes()}


def prune(params, **settings):
    return apply(magnitude(**settings), params, layout=LAYOUT)


def zeros_asked(settings):
    """Zeros in one 12 by 8 matrix, and in all four matrices."""
    match settings.get("group", "n_of_m" if "of" in settings else "leaf"):
        case "leaf":
            return 38, 4 * 38  # floor(0.4 * 96)
        case "output":
            return 8 * 4, 4 * 8 * 4  # floor(0.4 * 12)
        case "input_block":
            return 4 * 9, 4 * 4 * 9  # floor(0.4 * 24)
        case "global":
            return None, 153  # floor(0.4 * 384)
        case _:
            return 72, 4 * 72


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_counts_are_exact_and_the_rest_is_untouched(settings):
    params = tree(jnp.bfloat16)  # so coarse that scores tie
    pruned = prune(params, **settings)
    each, total = zeros_asked(settings)
    single, stacked = pruned["mlp"]["kernel"], pruned["layers"]["kernel"]
    assert int((~single.mask).sum()) + int((~stacked.mask).sum()) == total
    if each is not None:
        assert int((~single.mask).sum()) == each
        np.testing.assert_array_equal((~stacked.mask).sum(axis=(1, 2)), [each] * 3)
        for i in range(3):  # stacked matrices are ranked each for itself
            alone = prune_one({"kernel": params["layers"]["kernel"][i]}, settings)
            np.testing.assert_array_equal(stacked.mask[i], alone.mask)
    for leaf, before in ((single, params["mlp"]), (stacked, params["layers"])):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.base is before["kernel"]
    assert pruned["mlp"]["bias"] is params["mlp"]["bias"]
    assert pruned["embed"]["embedding"] is params["embed"]["embedding"]


def prune_one(params, settings):
    return apply(magnitude(**settings), params)["kernel"]


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_the_dense_form_under_jit_holds_the_same_values_as_masks_made_eagerly(settings):
    params = tree()
    dense = jax.jit(lambda p: prune(p, form="dense", **settings))(params)
    masked = prune(params, **settings)
    jax.tree.map(np.testing.assert_array_equal, dense, materialize(masked))


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_pruning_again_changes_nothing_and_more_pruning_nests(settings):
    params = tree()
    params["mlp"]["kernel"] = jnp.round(params["mlp"]["kernel"])  # zeros and ties among the kept
    once = prune(params, **settings)
    jax.tree.map(np.testing.assert_array_equal, once, prune(once, **settings))
    if "sparsity" in settings:
        more = prune(params, **settings | {"sparsity": 0.7})
        for name in ("mlp", "layers"):
            assert not (more[name]["kernel"].mask & ~once[name]["kernel"].mask).any()


def test_zeros_stay_and_more_come_to_a_masked_leaf():
    params = tree()
    light = prune(params, keep=3, of=4)
    both = prune(light, sparsity=0.5)["layers"]["kernel"]
    np.testing.assert_array_equal((~both.mask).sum(axis=(1, 2)), [48] * 3)
    assert not (both.mask & ~light["layers"]["kernel"].mask).any()
    assert isinstance(both.base, jax.Array)
    with pytest.raises(ValueError, match=r"48 of its 96 weights are zero already, more than the 9"):
        prune(prune(params, sparsity=0.5), sparsity=0.1)


def test_sparsity_zero_returns_the_tree_itself():
    params = tree()
    pruned = prune(params, sparsity=0.0)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(pruned), strict=True):
        assert before is after


def test_the_mask_depends_on_neither_sign_nor_scale_nor_order_of_inputs():
    weight = jax.random.normal(jax.random.key(0), (12, 8))
    signs = jax.random.rademacher(jax.random.key(1), (12, 8), weight.dtype)
    order = jax.random.permutation(jax.random.key(2), 12)
    mask = prune_one({"kernel": weight}, {"sparsity": 0.4})
    np.testing.assert_array_equal(
        prune_one({"kernel": weight * signs * 3}, {"sparsity": 0.4}).mask, mask.mask
    )
    np.testing.assert_array_equal(
        prune_one({"kernel": weight[order]}, {"sparsity": 0.4}).mask, mask.mask[order]
    )


def test_output_groups_do_not_see_the_scale_of_a_column():
    weight = jax.random.normal(jax.random.key(0), (12, 8))
    scaled = weight * 2.0 ** jnp.arange(8.0)[None]
    settings = {"sparsity": 0.4, "group": "output"}
    np.testing.assert_array_equal(
        prune_one({"kernel": weight}, settings).mask, prune_one({"kernel": scaled}, settings).mask
    )


def test_an_attention_kernel_is_ranked_as_the_matrix_it_is():
    kernel = jax.random.normal(jax.random.key(0), (12, 2, 4))
    axes = Axes(inputs=(-3,), outputs=(-2, -1))
    pruned = apply(magnitude(keep=2, of=4), {"q": kernel}, layout={"q": axes})["q"]
    expected = n_of_m_mask(kernel.reshape(12, 8), keep=2, of=4).reshape(12, 2, 4)
    np.testing.assert_array_equal(pruned.mask, expected)
    out = jnp.moveaxis(kernel, 0, 2)  # (heads, head_dim, d)
    axes = Axes(inputs=(-3, -2), outputs=(-1,))
    pruned = apply(magnitude(keep=2, of=4), {"o": out}, layout={"o": axes})["o"]
    expected = n_of_m_mask(out.reshape(8, 12), keep=2, of=4).reshape(2, 4, 12)
    np.testing.assert_array_equal(pruned.mask, expected)


def test_a_quantized_leaf_keeps_its_codes_under_the_mask():
    codes = jax.random.randint(jax.random.key(0), (8, 4), -8, 8).astype(jnp.int8)
    weight = Quantized.from_codes(codes, jnp.ones((1, 4)), bits=4)
    pruned = prune_one({"kernel": weight}, {"sparsity": 0.5})
    assert isinstance(pruned, Masked) and pruned.base is weight
    assert int((~pruned.mask).sum()) == 16
    with pytest.raises(ValueError, match=r"is already a Quantized\. Zeros cannot be written"):
        prune_one({"kernel": weight}, {"sparsity": 0.5, "form": "dense"})


def test_global_ranking_equals_sorting_everything_together():
    params = {"a": jax.random.normal(jax.random.key(0), (6, 4)), "b": jnp.ones((5, 2)) * 0.4}
    pruned = apply(magnitude(sparsity=0.5, group="global", min_keep=0.0), params)
    flat = np.concatenate([np.asarray(w).reshape(-1) for w in (params["a"], params["b"])])
    keep = np.ones(34, bool)
    keep[np.argsort(np.abs(flat), kind="stable")[:17]] = False
    found = np.concatenate([np.asarray(pruned[k].mask).reshape(-1) for k in "ab"])
    np.testing.assert_array_equal(found, keep)


def test_global_ranking_empties_no_matrix_and_says_when_it_cannot_be():
    params = {"large": jnp.ones((10, 10)), "small": jnp.full((10, 10), 1e-3, jnp.bfloat16)}
    pruned = apply(magnitude(sparsity=0.6, group="global", min_keep=0.05), params)
    assert int(pruned["small"].mask.sum()) == 5  # although all 100 are smaller
    assert int(pruned["large"].mask.sum()) == 75
    emptied = apply(magnitude(sparsity=0.6, group="global", min_keep=0.0), params)
    assert not emptied["small"].mask.any()
    with pytest.raises(
        ValueError, match=r"asks for 198 zeros among the 200.* keeps 10\. Ask for at"
    ):
        apply(magnitude(sparsity=0.99, group="global", min_keep=0.05), params)


def test_a_schedule_reads_the_step_and_compiles_once():
    compiles = []

    def ramp(step):
        compiles.append(1)
        return jnp.minimum(step.astype(jnp.float32) / 10, 0.9)

    tx = magnitude(sparsity=ramp, form="dense")
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 10))}
    layout = conventional_layout(params)
    update = jax.jit(lambda p, step: tx.update(p, (), Context(step=step, layout=layout))[0])
    for step in (0, 3, 7, 12):
        zeros = int((update(params, jnp.int32(step))["kernel"] == 0).sum())
        assert zeros == min(10 * step, 90)
    assert len(compiles) == 1
    with pytest.raises(ValueError, match="'step' is missing"):
        apply(tx, params)
    with pytest.raises(ValueError, match="the fraction of zeros"):
        apply(magnitude(sparsity=lambda step: 1.5), params, step=1)


def test_a_traced_sparsity_ranks_globally_too():
    params = tree()
    run = jax.jit(lambda s: prune(params, sparsity=s, group="global", form="dense"))
    for sparsity in (0.25, 0.5):
        dense = run(jnp.float32(sparsity))
        zeros = sum(int((dense[k]["kernel"] == 0).sum()) for k in ("mlp", "layers"))
        assert zeros == 384 * sparsity


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"sparsity": 1.0},
            r"sparsity=1.0 must lie in \[0, 1\): sparsity is the fraction of zeros",
        ),
        ({"sparsity": -0.1}, "sparsity=-0.1 must lie"),
        ({"sparsity": float("nan")}, "sparsity=nan must lie"),
        ({}, "give sparsity, the fraction of zeros, or keep and of"),
        ({"sparsity": 0.5, "keep": 2, "of": 4}, "both say how many weights stay"),
        ({"sparsity": 0.5, "form": "sparse"}, "form='sparse' must be 'masked' or 'dense'"),
        ({"sparsity": 0.5, "group": "global", "min_keep": 1.5}, r"min_keep=1.5 must lie in"),
    ],
)
def test_settings_out_of_range_are_refused_when_built(settings, words):
    with pytest.raises(ValueError, match=f"sparsify.magnitude: .*{words}"):
        magnitude(**settings)


def test_a_sparsity_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match="sparsity='half' must be a number"):
        magnitude(sparsity="half")


def test_bad_leaves_are_named_in_one_message():
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((7, 4)), "c": jnp.ones((8, 4))}
    with pytest.raises(ValueError) as error:
        apply(magnitude(keep=2, of=4), params)
    lines = str(error.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["a", "b"]
    assert "input axis 6 is not divisible by 4" in lines[0]
    with pytest.raises(ValueError, match=r"'a': sparsity=0.9999999.*keep nothing. Ask for at most"):
        apply(magnitude(sparsity=0.9999999), {"a": jnp.ones((1, 2))})
    with pytest.raises(ValueError, match="'a': 1 of 4 values are not finite"):
        apply(magnitude(sparsity=0.5), {"a": jnp.array([[1.0, jnp.nan], [1.0, 1.0]])})


def test_abstract_trees_give_abstract_results():
    abstract = jax.eval_shape(lambda p: prune(p, sparsity=0.5), tree())
    assert isinstance(abstract["mlp"]["kernel"], Masked)
    assert abstract["layers"]["kernel"].mask.shape == (3, 12, 8)


@pytest.mark.parametrize("case, sparsity", [("magnitude_s50", 0.5), ("magnitude_s30", 0.3)])
def test_leaf_masks_equal_those_of_the_wanda_authors_baseline(case, sparsity):
    data = fixture("sparsify/wanda.npz")
    for name in ("layer0.fc1", "layer0.fc2", "layer1.fc1", "layer1.fc2"):
        kernel, after = data[f"before/{name}"].T, data[f"{case}/after/{name}"].T
        # Their threshold `score <= sorted[int(n * s)]` removes one more than asked.
        zeros = int(kernel.size * sparsity) + 1
        pruned = prune_one({"kernel": jnp.asarray(kernel)}, {"sparsity": zeros / kernel.size})
        np.testing.assert_array_equal(pruned.materialize(), after)


@pytest.mark.parametrize("case, keep, of", [("magnitude_nm24", 2, 4), ("magnitude_nm48", 4, 8)])
def test_runs_equal_those_of_the_wanda_authors_baseline(case, keep, of):
    data = fixture("sparsify/wanda.npz")
    for name in ("layer0.fc1", "layer0.fc2", "layer1.fc1", "layer1.fc2"):
        kernel = jnp.asarray(data[f"before/{name}"].T)
        pruned = prune_one({"kernel": kernel}, {"keep": keep, "of": of})
        np.testing.assert_array_equal(pruned.materialize(), data[f"{case}/after/{name}"].T)


@pytest.mark.parametrize(
    "case, settings",
    [
        ("magnitude", {}),
        ("global_magnitude", {"group": "global", "normalize": True, "min_keep": 0.0}),
        ("global_magnitude_nonorm", {"group": "global", "min_keep": 0.0}),
    ],
)
def test_masks_equal_those_of_jaxpruner(case, settings):
    data = fixture("sparsify/jaxpruner.npz")
    names = [f"Dense_{i}/kernel" for i in range(3)]
    params = {name: jnp.asarray(data[f"params/{name}"]) for name in names}
    pruned = apply(magnitude(sparsity=0.7, **settings), params)
    for name in names:
        np.testing.assert_array_equal(pruned[name].mask, data[f"{case}/mask/{name}"].astype(bool))


def test_selection_and_runs_equal_those_of_jaxpruner():
    data = fixture("sparsify/jaxpruner.npz")
    masks = {key: data[key].astype(bool) for key in data if key.startswith("mask/")}
    for sparsity, kept in ((0.5, 384), (0.8, 154)):
        for scores in ("scores", "scores_ties"):  # of ties they keep the first
            mask = largest(jnp.asarray(data[scores]), kept)
            np.testing.assert_array_equal(mask, masks[f"mask/unstructured_{sparsity}/{scores}"])
    scores = jnp.asarray(data["scores"])
    along_inputs = n_of_m_mask(scores, keep=2, of=4)
    np.testing.assert_array_equal(along_inputs, masks["mask/nm24_axis0_0.5/scores"])
    for keep in (1, 2):
        along_outputs = n_of_m_mask(scores.T, keep=keep, of=4).T
        np.testing.assert_array_equal(along_outputs, masks[f"mask/nm{keep}4_last_0.5/scores"])


@pytest.mark.parametrize("settings", [GROUPS[0], GROUPS[3], SETTINGS[4]], ids=name_of)
def test_a_sharded_tree_gives_the_same_masks_and_keeps_its_sharding(mesh, settings):
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 24))}
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    placed = jax.device_put(params, sharding)
    pruned = prune_one(placed, settings)
    np.testing.assert_array_equal(pruned.mask, prune_one(params, settings).mask)
    assert pruned.mask.sharding.is_equivalent_to(sharding, 2)
