"""Layer stacking: what is taken from where, what is renumbered, and what does not fit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import flatten
from jaxweights.merge import LayerSlice, stack_layers
from jaxweights.weights import LowRank
from tests.merge._public import results, whole_checkpoint
from tests.merge._trees import assert_same_bits

DEPTH = 4
NAMED = r"decoder/layer_(\d+)"


def draw(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 3, dtype)


def scanned(seed=0, depth=DEPTH, width=6, dtype=jnp.float32):
    """A residual model whose layers are stacked on axis 0."""
    return {
        "embed": {"embedding": draw(seed, (9, width), dtype)},
        "final_norm": {"scale": draw(seed + 1, (width,), dtype)},
        "head": {"kernel": draw(seed + 2, (width, 9), dtype)},
        "layers": {
            "down": {"kernel": draw(seed + 3, (depth, 8, width), dtype)},
            "norm": {"scale": draw(seed + 4, (depth, width), dtype)},
            "up": {"kernel": draw(seed + 5, (depth, width, 8), dtype)},
        },
    }


def named(model, container=dict):
    """The same model with a subtree for every layer."""
    layers = model["layers"]
    depth = layers["norm"]["scale"].shape[0]
    each = [jax.tree.map(lambda x: x[i], layers) for i in range(depth)]  # noqa: B023
    rest = {name: leaves for name, leaves in model.items() if name != "layers"}
    if container is not dict:
        return rest | {"decoder": {"layer": container(each)}}
    return rest | {"decoder": {f"layer_{i}": layer for i, layer in enumerate(each)}}


def run(model, tokens):
    h = model["embed"]["embedding"][tokens]

    def layer(h, p):
        x = h * p["norm"]["scale"][None]
        return h + jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    h, _ = jax.lax.scan(layer, h, model["layers"])
    return (h * model["final_norm"]["scale"][None]) @ model["head"]["kernel"]


# --- beside mergekit ----------------------------------------------------------------------------


def test_stacked_checkpoints_are_those_of_mergekit():
    merged, _ = results("passthrough", ("",))
    first, second = whole_checkpoint("ft1"), whole_checkpoint("ft2")
    scale = {r".*o_proj.*": 0.5, r".*down_proj.*": 0.25}
    got = stack_layers([(first, 0, 2), (second, 1, 2, scale)], layers=r"model\.layers\.(\d+)")
    want = merged["stack"]
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


# --- invariants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, layers",
    [
        (scanned(), "layers"),
        (named(scanned()), NAMED),
        (named(scanned(), list), r"decoder/layer/(\d+)"),
    ],
    ids=["scanned", "named", "listed"],
)
def test_one_full_slice_is_the_model_itself(model, layers):
    got = stack_layers([(model, 0, DEPTH)], layers=layers)
    assert jax.tree.structure(got) == jax.tree.structure(model)
    assert_same_bits(got, model)


@pytest.mark.parametrize("seed", range(4))
def test_scanned_and_named_layers_are_stacked_alike(seed):
    rng = np.random.default_rng(seed)
    models = [scanned(10), scanned(20), scanned(30)]
    slices = []
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(0, DEPTH))
        stop = int(rng.integers(start + 1, DEPTH + 1))
        slices.append((int(rng.integers(3)), start, stop, {".*down/kernel": float(rng.normal())}))
    one = stack_layers([(models[m], *rest) for m, *rest in slices], layers="layers")
    other = stack_layers([(named(models[m]), *rest) for m, *rest in slices], layers=NAMED)
    depth = sum(stop - start for _, start, stop, _ in slices)
    assert one["layers"]["norm"]["scale"].shape[0] == depth == len(other["decoder"])
    assert_same_bits(named(one), other)


@pytest.mark.parametrize("position", [1, 2, 4])
def test_inserted_layers_whose_output_is_scaled_by_zero_change_nothing(position):
    model, tokens = scanned(), jnp.arange(9)
    inserted = (model, 0, 3, {"layers/down/kernel": 0.0})
    rest = [(model, position, DEPTH)] if position < DEPTH else []
    deeper = stack_layers([(model, 0, position), inserted, *rest], layers="layers")
    assert deeper["layers"]["up"]["kernel"].shape[0] == DEPTH + 3
    np.testing.assert_array_equal(run(deeper, tokens), run(model, tokens))
    plain = stack_layers([(model, 0, position), inserted[:3], *rest], layers="layers")
    assert (
        np.abs(run(plain, tokens) - run(model, tokens)).max() > 0.05
    )  # without it, much: they reach 0.17


def test_a_deeper_decoder_of_the_library_computes_the_same():
    from jaxweights.models import build
    from tests._tiny_models import LLAMA

    tokens = jnp.arange(6)[None]
    params = build(LLAMA).init(jax.random.key(0), tokens)["params"]
    zero = {"layers/attn/o/kernel": 0.0, "layers/mlp/down/kernel": 0.0}
    deeper = stack_layers([(params, 0, 2), (params, 0, 2, zero)], layers="layers")
    model = build(dataclasses.replace(LLAMA, num_layers=4))
    np.testing.assert_allclose(
        model.apply({"params": deeper}, tokens),
        build(LLAMA).apply({"params": params}, tokens),
        rtol=1e-6,
        atol=1e-6,
    )


def test_what_lies_before_is_the_firsts_and_what_lies_behind_the_lasts():
    first, last = scanned(10), scanned(20)
    got = stack_layers([(first, 0, 2), (last, 2, 4)], layers="layers")
    assert got["embed"]["embedding"] is first["embed"]["embedding"]
    assert got["final_norm"]["scale"] is last["final_norm"]["scale"]
    assert got["head"]["kernel"] is last["head"]["kernel"]
    turned = stack_layers([(first, 0, 2), (last, 2, 4)], layers="layers", after="embed/.*")
    assert turned["embed"]["embedding"] is last["embed"]["embedding"]
    assert turned["head"]["kernel"] is first["head"]["kernel"]


@pytest.mark.parametrize(
    "path, behind",
    [
        ("final_norm/scale", True),
        ("model.norm.weight", True),
        ("lm_head/kernel", True),
        ("transformer.ln_f.weight", True),
        ("unembed/kernel", True),
        ("encoder/last_norm/scale", True),
        ("embeddings/norm/scale", False),
        ("embed_tokens/embedding", False),
        ("model.embed_tokens.weight", False),
        ("wpe", False),
    ],
)
def test_usual_names_tell_what_lies_behind_the_layers(path, behind):
    tree = lambda x: {path: jnp.full(2, x), "layers": {"b": jnp.ones((2, 1))}}  # noqa: E731
    got = stack_layers([(tree(1.0), 0, 1), (tree(2.0), 0, 1)], layers="layers")
    assert float(got[path][0]) == (2.0 if behind else 1.0)


def test_slices_may_be_named_and_come_from_models_of_other_depths():
    deep, shallow = scanned(10, 6), scanned(20, 2)
    slices = [LayerSlice(deep, 4, 6), LayerSlice(model=shallow, start=0, stop=1, scale=None)]
    got = stack_layers(slices, layers="layers")["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(got[:2], deep["layers"]["up"]["kernel"][4:6])
    np.testing.assert_array_equal(got[2], shallow["layers"]["up"]["kernel"][0])


def test_the_first_pattern_that_matches_holds_and_scales_in_float32():
    model = scanned(dtype=jnp.bfloat16)
    scale = {".*down/kernel": 1.0, ".*/kernel": 1 / 3}
    got = stack_layers([(model, 0, DEPTH, scale)], layers="layers")["layers"]
    assert got["down"]["kernel"] is not None
    np.testing.assert_array_equal(got["down"]["kernel"], model["layers"]["down"]["kernel"])
    up = np.asarray(model["layers"]["up"]["kernel"], np.float32) * np.float32(1 / 3)
    np.testing.assert_array_equal(got["up"]["kernel"], up.astype(jnp.bfloat16))


def test_named_layers_may_be_represented_and_counters_are_taken_along():
    kernel = LowRank.over(jnp.zeros((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)))
    model = {"layer_0": {"kernel": kernel, "step": jnp.asarray(3)}, "head": jnp.ones(2)}
    got = stack_layers([(model, 0, 1), (model, 0, 1)], layers=r"layer_(\d+)")
    assert got["layer_1"]["kernel"] is kernel
    assert int(got["layer_1"]["step"]) == 3
    with pytest.raises(ValueError, match=r"'layer_0/kernel': is LowRank in slices\[0\] and cannot"):
        stack_layers([(model, 0, 1, {".*/kernel": 0.0})], layers=r"layer_(\d+)")
    with pytest.raises(ValueError, match=r"'layer_0/step': is int32 in slices\[0\] and cannot"):
        stack_layers([(model, 0, 1, {".*/step": 0.0})], layers=r"layer_(\d+)")


def test_layers_keep_their_order_beyond_ten():
    model = {"layers": [{"b": jnp.full(1, float(i))} for i in range(7)], "head": jnp.ones(1)}
    got = stack_layers([(model, 0, 7), (model, 0, 7)], layers=r"layers/(\d+)")
    assert [float(layer["b"][0]) for layer in got["layers"]] == [*range(7), *range(7)]
    keyed = {i: {"b": jnp.full(1, float(i))} for i in range(2)}
    got = stack_layers([(keyed, 0, 2), (keyed, 1, 2)], layers=r"(\d+)")
    assert list(got) == [0, 1, 2]
    assert float(got[2]["b"][0]) == 1


def test_dtypes_must_agree_or_be_stated():
    slices = [(scanned(10), 0, 1), (scanned(20, dtype=jnp.bfloat16), 0, 1)]
    with pytest.raises(ValueError, match=r"'layers/down/kernel': is bfloat16 in slices\[1\] but f"):
        stack_layers(slices, layers="layers")
    got = stack_layers(slices, layers="layers", out_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def test_stacking_works_under_jit_and_on_abstract_trees():
    model = scanned()
    scale = {".*/down/kernel": 0.5}
    stack = lambda m: stack_layers([(m, 0, 3), (m, 1, 4, scale)], layers="layers")  # noqa: E731
    want = stack(model)
    assert_same_bits(jax.jit(stack)(model), want)
    abstract = jax.eval_shape(stack, model)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, want)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0, 5), (-1, 2), (2, 2), (3, 1), (4, 6)])
@pytest.mark.parametrize("make, layers", [(scanned, "layers"), (lambda: named(scanned()), NAMED)])
def test_ranges_out_of_bounds_are_refused(bounds, make, layers):
    words = rf"slices\[1\] takes layers {bounds[0]} to {bounds[1]} .* has 4"
    with pytest.raises(ValueError, match=words):
        stack_layers([(make(), 0, 4), (make(), *bounds)], layers=layers)


@pytest.mark.parametrize(
    "make, layers", [(scanned, "layers"), (lambda *a: named(scanned(*a)), NAMED)]
)
def test_widths_that_differ_are_refused(make, layers):
    with pytest.raises(ValueError) as error:
        stack_layers([(make(0), 0, 2), (make(1, 4, 7), 0, 2)], layers=layers)
    text = str(error.value)
    assert "a layer is (8, 7) in" in text
    assert "but (8, 6) in" in text
    assert "norm/scale': a layer is (7,)" in text  # all of them at once


def test_other_architectures_are_refused():
    model, other = scanned(10), scanned(20)
    other["layers"]["gate"] = {"kernel": draw(1, (DEPTH, 6, 8))}
    with pytest.raises(
        ValueError, match=r"slices\[1\] lacks \[\] and has \['layers/gate/kernel'\]"
    ):
        stack_layers([(model, 0, 2), (other, 0, 2)], layers="layers")
    other = scanned(20)
    del other["head"]
    with pytest.raises(
        ValueError, match=r"outside of the layers slices\[0\] has \['head/kernel'\]"
    ):
        stack_layers([(model, 0, 2), (other, 0, 2)], layers="layers")


def test_lengths_on_axis_0_must_agree():
    model = scanned()
    model["layers"]["norm"]["scale"] = jnp.ones((3, 6))
    with pytest.raises(ValueError, match=r"slices\[0\]: leaves under `layers` have different len"):
        stack_layers([(model, 0, 2)], layers="layers")
    model["layers"]["norm"]["scale"] = jnp.ones(())
    with pytest.raises(ValueError, match=r"'layers/norm/scale': is a scalar in slices\[0\]"):
        stack_layers([(model, 0, 2)], layers="layers")
    kernel = model["layers"]["up"]["kernel"]
    model = {"layers": {"up": LowRank.over(kernel, jnp.ones((4, 6, 1)), jnp.ones((4, 1, 8)))}}
    with pytest.raises(ValueError, match=r"'layers/up': is a LowRank in slices\[0\]"):
        stack_layers([(model, 0, 2)], layers="layers")


def test_numbers_must_run_from_zero():
    model = named(scanned())
    del model["decoder"]["layer_2"]
    with pytest.raises(ValueError, match=r"its layers are numbered \[0, 1, 3\]"):
        stack_layers([(model, 0, 2)], layers=NAMED)
    with pytest.raises(ValueError, match=r"takes 'down', which is no number"):
        stack_layers([(scanned(), 0, 2)], layers=r"layers/(\w+)")


def test_containers_that_cannot_be_rearranged_are_refused():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Holder:
        layer_0: jax.Array

    with pytest.raises(TypeError, match=r"'decoder': is a Holder, whose entries cannot"):
        stack_layers([({"decoder": Holder(jnp.ones(2))}, 0, 1)], layers=NAMED)


@pytest.mark.parametrize(
    "slices, options, error, words",
    [
        ([], {}, ValueError, "slices is empty"),
        ([(scanned(), 0)], {}, TypeError, r"slices\[0\] must be \(model, start, stop\)"),
        ([(scanned(), 0, 1.5)], {}, TypeError, r"slices\[0\]: 1.5 must be an integer"),
        ([(scanned(), 0, 1, {"nothing": 0})], {}, ValueError, "pattern 'nothing' matches no leaf"),
        ([(scanned(), 0, 1, {".*": float("nan")})], {}, ValueError, "scale=nan of '..' must be"),
        ([(scanned(), 0, 1, {"(": 0})], {}, ValueError, "is not a regular expression"),
        ([(scanned(), 0, 1)], {"layers": "blocks"}, ValueError, "layers='blocks' begins no path"),
        ([(scanned(), 0, 1)], {"layers": "layer"}, ValueError, "layers='layer' begins no path"),
        ([(scanned(), 0, 1)], {"layers": r"(l)(\d)"}, ValueError, "has 2 groups"),
        ([(scanned(), 0, 1)], {"out_dtype": jnp.int8}, ValueError, "no floating dtype"),
    ],
)
def test_bad_settings_are_refused(slices, options, error, words):
    with pytest.raises(error, match=f"merge.stack_layers: .*{words}|merge.stack_layers: {words}"):
        stack_layers(slices, **{"layers": "layers"} | options)


def test_mappings_of_other_kinds_are_kept():
    flax = pytest.importorskip("flax")
    model = flax.core.freeze(named(scanned()))
    got = stack_layers([(model, 0, 2), (model, 1, 4)], layers=NAMED)
    assert isinstance(got, flax.core.FrozenDict)
    assert len(got["decoder"]) == 5
    assert "decoder/layer_4/up/kernel" in flatten(got)[0]
