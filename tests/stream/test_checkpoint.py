"""A stream over a checkpoint gives what `apply` gives in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, save_tree, write_safetensors
from jaxweights.stream import _jobs, transform_checkpoint


def _tensors(seed):
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": draw.normal(size=(40, 32)),
        "model.layers.0.mlp.up_proj.weight": draw.normal(size=(48, 32)),
        "model.layers.0.norm.weight": draw.normal(size=32),
        "conv.weight": draw.normal(size=(8, 4, 3, 3)),
    }
    return {n: x.astype(np.float32) for n, x in tensors.items()} | {"ids": np.arange(5)}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("base", "tuned")):
        write_safetensors(tmp_path / name, _tensors(i), files={"config.json": "{}"})
    return tmp_path


def test_rounding_groups_the_inputs_of_torch_matrices(folder):
    tx = jw.quantize.round_to_nearest(bits=4, group_size=16)
    transform_checkpoint(tx, folder / "base", folder / "out", match=".*(up_proj|ids).*")
    got = dict(open_checkpoint(folder / "out").items())
    up = "model.layers.0.mlp.up_proj.weight"
    want = jw.apply(tx, {"kernel": jnp.asarray(_tensors(0)[up].T)})["kernel"].materialize().T
    np.testing.assert_array_equal(got[up], np.asarray(want))
    for name in got.keys() - {up}:
        np.testing.assert_array_equal(got[name], _tensors(0)[name])
    assert open_checkpoint(folder / "out").files.keys() == {"config.json"}


def test_a_merge_reads_models_beside_the_source(folder):
    tx = jw.merge.task_arithmetic(weights=[0.5])
    done = transform_checkpoint(tx, folder / "base", folder / "out", models=[folder / "tuned"])
    got = dict(open_checkpoint(folder / "out").items())
    first, second = _tensors(0), _tensors(1)
    for name in got.keys() - {"ids"}:
        want = first[name] + 0.5 * (second[name] - first[name])
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-7)
    assert done.tensors == 5


def test_chains_of_leaf_transforms_stream_from_an_orbax_tree(tmp_path):
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (32, 8))}}
    save_tree(tmp_path / "tree", params)
    tx = jw.chain(jw.sparsify.magnitude(sparsity=0.5), jw.quantize.round_to_nearest(bits=8))
    transform_checkpoint(tx, tmp_path / "tree", tmp_path / "out")
    got = open_checkpoint(tmp_path / "out").read("layer/kernel")
    want = jw.apply(tx, params)["layer"]["kernel"].materialize()
    np.testing.assert_array_equal(got, np.asarray(want))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jw.merge.ties(density=0.3),
        lambda: jw.merge.ties(density=0.5, weights=[1.0, -0.5], scale=0.7),
        lambda: jw.merge.breadcrumbs_ties(density=0.5, outliers=0.1, scope="tree"),
        lambda: jw.merge.delta_merge(consensus="sum", scope="tree"),
    ],
    ids=["ties", "weighted", "breadcrumbs", "majority"],
)
@pytest.mark.parametrize("piece", [1 << 20, 1 << 10], ids=["whole", "pieces"])
def test_thresholds_over_the_whole_tree_are_those_of_memory(tmp_path, monkeypatch, make, piece):
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", piece)
    trees = []
    for i, name in enumerate(("base", "first", "second")):
        draw = np.random.default_rng(i)
        # Few levels, so that many entries tie at the threshold, across tensors too.
        tree = {n: draw.integers(-4, 5, s).astype(np.float32) for n, s in SHAPES.items()}
        write_safetensors(tmp_path / name, tree | {"steps": np.arange(3)})
        trees.append(tree)
    tx = make()
    models = [tmp_path / "first", tmp_path / "second"]
    transform_checkpoint(tx, tmp_path / "base", tmp_path / "out", models=models)
    base, *others = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    want = jw.apply(tx, base, models=others)
    got = dict(open_checkpoint(tmp_path / "out").items())
    for name in SHAPES:
        np.testing.assert_allclose(got[name], np.asarray(want[name]), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(got["steps"], np.arange(3))


SHAPES = {"b.weight": (30, 40), "a.weight": (50, 60), "c.bias": (70,), "d.conv": (4, 3, 5, 5)}


@pytest.mark.parametrize(
    "tx, words",
    [
        (
            lambda: jw.sparsify.magnitude(sparsity=0.5, group="global"),
            "looks at the whole tree.*Rank by leaf",
        ),
        (lambda: jw.sparsify.wanda(sparsity=0.5), "reads statistics"),
    ],
)
def test_what_cannot_run_tensor_by_tensor_is_refused(folder, tx, words):
    with pytest.raises(ValueError, match=words):
        transform_checkpoint(tx(), folder / "base", folder / "out", models=[folder / "tuned"])
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda rounding: jw.partition(
            ("model.embed.*", rounding(bits=8)), (".*up_proj.*", rounding(bits=4))
        ),
        lambda rounding: jw.partition(
            (".*norm.*", jw.identity()),
            (".*up_proj.*", jw.partition((".*weight", rounding(bits=4)))),
            (..., jw.chain(jw.sparsify.magnitude(sparsity=0.5), rounding(bits=8))),
        ),
        lambda rounding: jw.chain(
            jw.sparsify.magnitude(sparsity=0.5), jw.partition((".*up.*", rounding(bits=8)))
        ),
        lambda rounding: jw.quantize.loftq(
            jw.partition((".*up.*", rounding(bits=2)), (..., jw.identity())), rank=2, iterations=1
        ),
    ],
    ids=["two rules", "nested", "in a chain", "around"],
)
def test_rules_by_pattern_stream(folder, make):
    tx = make(jw.quantize.round_to_nearest)
    transform_checkpoint(tx, folder / "base", folder / "out", layout=AXES)
    got = dict(open_checkpoint(folder / "out").items())
    first = {n: jnp.asarray(x) for n, x in _tensors(0).items() if n != "ids"}
    want = jw.materialize(jw.apply(tx, first, layout=AXES))
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=1e-6, err_msg=name)
    changed = {name for name in first if (got[name] != first[name]).any()}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert "model.layers.0.norm.weight" not in changed


AXES = {
    "model.*(embed_tokens|up_proj).*": jw.Axes(inputs=(-1,), outputs=(-2,)),
    "conv.*": jw.Axes(inputs=(-3, -2, -1), outputs=(-4,)),
}


def test_rules_of_which_one_matches_nothing_or_looks_at_the_whole_tree_are_refused(folder):
    rounding = jw.quantize.round_to_nearest(bits=8)
    with pytest.raises(ValueError, match="partition: pattern 'nope' matches no leaf"):
        tx = jw.partition(("nope", rounding), (..., jw.identity()))
        transform_checkpoint(tx, folder / "base", folder / "out")
    models = {"models": [folder / "tuned"]}
    with pytest.raises(ValueError, match=r"merge.ties looks at the whole tree.*Rank by leaf"):
        tx = jw.partition((".*up.*", jw.merge.ties(density=0.5)))
        transform_checkpoint(tx, folder / "base", folder / "out", **models)
    with pytest.raises(ValueError, match="wanda reads statistics"):
        tx = jw.partition((".*up.*", jw.sparsify.wanda(sparsity=0.5)))
        transform_checkpoint(tx, folder / "base", folder / "out")


def test_merges_by_pattern_stream_and_are_sliced(folder):
    tx = jw.partition((".*norm.*", jw.merge.mean()), (..., jw.merge.slerp(t=0.3)))
    transform_checkpoint(tx, folder / "base", folder / "out", models=[folder / "tuned"])
    got = dict(open_checkpoint(folder / "out").items())
    trees = [{n: jnp.asarray(x) for n, x in _tensors(i).items() if n != "ids"} for i in range(2)]
    want = jw.apply(tx, trees[0], models=trees[1:], layout=AXES)
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=2e-6, err_msg=name)
    assert tx.on("conv.weight").settings.name == "merge.slerp"  # which is what slices it


def test_patterns_that_match_nothing_and_models_that_differ_are_refused(folder):
    tx = jw.merge.mean()
    with pytest.raises(ValueError, match="match='nope' matches no floating tensor"):
        transform_checkpoint(tx, folder / "base", folder / "out", match="nope")
    with pytest.raises(ValueError, match="layout: pattern 'nope' matches no tensor"):
        layout = {"nope": jw.Axes()}
        transform_checkpoint(tx, folder / "base", folder / "out", layout=layout)
    other = {name: x for name, x in _tensors(2).items() if name != "ids"}
    other["conv.weight"] = other["conv.weight"][:4]
    write_safetensors(folder / "other", other)
    with pytest.raises(ValueError, match=r"lacks \['ids'\](.|\n)*'conv.weight': is \(4, 4, 3, 3\)"):
        transform_checkpoint(tx, folder / "base", folder / "out", models=[folder / "other"])


def test_resuming_asks_for_the_words_that_tell_settings_apart(folder):
    with pytest.raises(ValueError, match="Pass recipe"):
        transform_checkpoint(jw.merge.mean(), folder / "base", folder / "out", resume=True)
