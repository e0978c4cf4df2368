import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import flatten, unflatten
from jaxweights.core._layout import Layout, conventional_layout
from jaxweights.quantize import Fold, check_same_function
from jaxweights.quantize._folds import find_sites, fold_scale
from tests.quantize._fold_models import LLAMAS, TOKENS, model, stats_of


def fold_all(params, folds, layout, seed=0):
    """Folds a random scale at every site."""
    flat, structure = flatten(params)
    scales = []
    for i, site in enumerate(find_sites("test", folds, flat, layout)):
        reader = flat[site.readers[0]]
        rows = reader.shape[:-1]
        times = 1 if site.fold.repeat is None else site.fold.repeat[0]
        key = jax.random.fold_in(jax.random.key(seed), i)
        scale = jnp.exp(jax.random.normal(key, (*rows[:-1], rows[-1] // times)))
        scales.append((site, scale))
        flat = fold_scale(flat, site, scale, layout)
    return unflatten(structure, flat), scales


@pytest.mark.parametrize(
    "name, sites", [("gqa", 5), ("biases", 5), ("tied", 4), ("post", 3), ("bert", 1)]
)
def test_any_scale_folded_at_every_site_leaves_the_function_as_it_is(name, sites):
    fn, params, folds = model(name)
    layout = jw.infer_layout(fn, params, TOKENS)
    folded, scales = fold_all(params, folds, layout)
    assert len(scales) == sites
    assert check_same_function(fn, params, folded, [TOKENS]) < 1e-5
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, folded)))]
    assert sum(changed) >= 2 * sites
    # The inverse scales bring the weights back.
    flat, structure = flatten(folded)
    for site, scale in reversed(scales):
        flat = fold_scale(flat, site, 1 / scale, layout)
    back = unflatten(structure, flat)
    for a, b in zip(*map(jax.tree.leaves, (params, back)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_wrong_fold_changes_the_function_and_is_refused_by_the_check():
    fn, params, _ = model("bert")
    wrong = [Fold("layers/mlp/down/kernel", "layers/mlp/up/kernel", shifts="layers/mlp/up/bias")]
    folded, _ = fold_all(params, wrong, jw.infer_layout(fn, params, TOKENS))  # through a GELU
    with pytest.raises(ValueError, match=r"output 0: differs by .* is not .*tolerance=1e-05"):
        check_same_function(fn, params, folded, [TOKENS])
    with pytest.raises(ValueError, match=r"output 0: has shape \(1,\), but had \(2,\)"):
        check_same_function(lambda p: p, jnp.ones(2), jnp.ones(1), [])
    with pytest.raises(ValueError, match="differs by nan"):
        check_same_function(lambda p: p, jnp.ones(2), jnp.array([1.0, jnp.nan]), [])


def unstacked(key=0):
    """Two layers apart, attention kernels with heads, norms stored less one."""
    draw = lambda i, *s: jax.random.normal(jax.random.fold_in(jax.random.key(key), i), s)  # noqa: E731
    layer = lambda i: {  # noqa: E731
        "norm": {"scale": 0.3 * draw(i, 6)},
        "v": {"kernel": draw(i + 1, 6, 2, 4), "bias": draw(i + 2, 2, 4)},
        "o": {"kernel": draw(i + 3, 2, 4, 6)},
    }
    return {"layer_0": layer(0), "layer_1": layer(10)}


def unstacked_fn(params, x):
    for layer in params.values():
        n = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * (1 + layer["norm"]["scale"][None])
        v = jnp.einsum("td,dhe->the", n, layer["v"]["kernel"]) + layer["v"]["bias"][None]
        x = x + jnp.einsum("the,hed->td", v, layer["o"]["kernel"])
    return x


HEADS = [
    Fold(r"(layer_\d)/v/kernel", r"(layer_\d)/norm/scale", one_plus=True),
    Fold(r"(layer_\d)/o/kernel", r"(layer_\d)/v/kernel", shifts=r"(layer_\d)/v/bias"),
]


def test_groups_in_patterns_pair_layers_and_gains_may_be_stored_less_one():
    params, x = unstacked(), jax.random.normal(jax.random.key(5), (3, 6))
    layout = jw.infer_layout(unstacked_fn, params, x)
    flat, structure = flatten(params)
    sites = find_sites("test", HEADS, flat, layout)
    assert [(s.readers, s.writers, s.shifts) for s in sites] == [
        (("layer_0/v/kernel",), ("layer_0/norm/scale",), ()),
        (("layer_1/v/kernel",), ("layer_1/norm/scale",), ()),
        (("layer_0/o/kernel",), ("layer_0/v/kernel",), ("layer_0/v/bias",)),
        (("layer_1/o/kernel",), ("layer_1/v/kernel",), ("layer_1/v/bias",)),
    ]
    for i, site in enumerate(sites):
        width = 6 if i < 2 else 8
        flat = fold_scale(
            flat, site, jnp.exp(jax.random.normal(jax.random.key(i), (width,))), layout
        )
    folded = unflatten(structure, flat)
    assert check_same_function(unstacked_fn, params, folded, [x]) < 1e-5
    plain = [dataclasses.replace(HEADS[0], one_plus=False)]
    wrong = dict(flatten(params)[0])
    for site in find_sites("test", plain, wrong, layout):
        wrong = fold_scale(wrong, site, jnp.full(6, 2.0), layout)
    with pytest.raises(ValueError, match="differs by"):
        check_same_function(unstacked_fn, params, unflatten(structure, wrong), [x])


def test_repeated_entries_are_spread_and_gathered_as_query_heads_share_values():
    fold = Fold("o", "v", repeat=(2, 3))
    vector = jnp.arange(6.0)
    assert fold.spread(vector).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert fold.gather(jnp.arange(12.0), jnp.max).tolist() == [3, 4, 5, 9, 10, 11]
    assert fold.spread(jnp.stack([vector, vector])).shape == (2, 12)


def refused(folds, message, params=None, stats=None, layout=None):
    params = unstacked() if params is None else params
    flat = flatten(params)[0]
    if layout is None:
        layout = Layout.of(
            {p: jw.Axes((-3,), (-2, -1)) for p in flat if "v/k" in p}
            | {p: jw.Axes((-3, -2), (-1,)) for p in flat if "o/k" in p}
        )
    with pytest.raises(ValueError, match=message):
        find_sites("quantize.smooth", folds, flat, layout, stats)


def test_folds_that_do_not_fit_the_tree_are_refused_by_name():
    refused(
        [Fold("layer_0/v/kernel", "layer_0/nrom/scale")],
        r"quantize.smooth: pattern 'layer_0/nrom/scale' of a fold's writers matches no leaf. The "
        r"nearest paths: \['layer_0/norm/scale'",
    )
    refused(
        [Fold(r"(layer_\d)/v/kernel", r"(layer_0)/norm/scale")],
        r"cannot fold the scale of 'layer_1/v/kernel': no leaf '\(layer_0\)/norm/scale' goes with",
    )
    refused(
        [Fold("layer_0/o/kernel", "layer_0/norm/scale")],
        r"cannot fold the scale of 'layer_0/o/kernel' into 'layer_0/norm/scale': it writes \(6,\), "
        r"but they read \(8,\).*repeat=\(times, run\)",
    )
    refused(
        [Fold("layer_0/v/kernel", "layer_0/norm/scale")] * 2,
        r"'layer_0/v/kernel': is among the readers of two folds",
    )
    refused(
        [HEADS[0]],
        "the layout does not say which axes of 'layer_0/v/kernel' are its inputs",
        layout=conventional_layout(unstacked()),
    )
    quantized = unstacked()
    quantized["layer_0"]["v"] = jw.apply(
        jw.quantize.round_to_nearest(bits=4),
        {"kernel": jnp.ones((6, 8))},
    )
    refused(
        [HEADS[0]],
        r"'layer_0/v/kernel' is Quantized, no dense floating array. Fold before",
        params=quantized,
    )

    with pytest.raises(TypeError, match=r"folds\[0\] is a str. Pass `Fold`s"):
        jw.quantize.smooth(folds=["layers"])
    with pytest.raises(ValueError, match=r"quantize.Fold: writers: pattern '\(' is not a regular"):
        Fold("a", "(")
    with pytest.raises(ValueError, match=r"repeat=\(0, 3\) must be \(times, run\)"):
        Fold("a", "b", repeat=(0, 3))


def test_another_reader_of_the_activation_is_refused_by_name():
    _fn, params, folds = model("gqa")
    short = [dataclasses.replace(folds[1], readers="layers/mlp/gate/kernel")]
    stats = stats_of("gqa", "min", "max", "count")
    with pytest.raises(
        ValueError,
        match=r"quantize.smooth: cannot fold the scale of 'layers/mlp/gate/kernel' into "
        r"'layers/mlp_norm/scale': also read by 'layers/mlp/up/kernel'",
    ):
        jw.apply(jw.quantize.smooth(folds=short), params, stats=stats)


def test_a_router_that_is_no_target_is_seen_to_read_and_is_rescaled_where_the_fold_names_it():
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    params = {
        "norm": {"scale": draw(0, 8)},
        "up": {"kernel": draw(1, 8, 6)},
        "router": {"kernel": draw(2, 8, 3)},
    }

    def fn(p, x):
        h = x * p["norm"]["scale"][None]
        return h @ p["up"]["kernel"], jax.nn.softmax(h @ p["router"]["kernel"])

    x = draw(3, 16, 8).at[:, 2].mul(30.0)
    short = jw.quantize.smooth(folds=[Fold("up/kernel", "norm/scale")])
    stats = jw.calibrate(fn, params, [x], needs=short.needs(params))
    with pytest.raises(ValueError, match=r"into 'norm/scale': also read by 'router/kernel'"):
        jw.apply(short, params, stats=stats)
    both = jw.quantize.smooth(folds=[Fold("(?:up|router)/kernel", "norm/scale")])
    new = jw.apply(both, params, stats=stats)
    assert check_same_function(fn, params, new, [x]) < 1e-5
    assert not np.array_equal(new["router"]["kernel"], params["router"]["kernel"])


def test_llama_folds_follow_the_options():
    names = {name: len(jw.quantize.llama_folds(config)) for name, config in LLAMAS.items()}
    assert names == {"gqa": 5, "biases": 5, "tied": 4, "post": 3}
    assert all(f.one_plus for f in jw.quantize.llama_folds(LLAMAS["tied"], one_plus=True)[:2])


@pytest.mark.parametrize("method", ["smooth", "awq", "fuse_norms"])
def test_folds_into_an_array_that_is_used_elsewhere_too_are_refused(method):
    shared = jax.random.normal(jax.random.key(0), (8, 8))
    x = jax.random.normal(jax.random.key(1), (16, 8))
    params = {"norm_1": 2 * jnp.ones(8), "norm_2": 3 * jnp.ones(8), "up": shared, "down": shared}

    def model(p, x):
        return jnp.tanh((x * p["norm_1"][None]) @ p["up"]) * p["norm_2"][None] @ p["down"]

    folds = [jw.quantize.Fold("down", "norm_2")]
    tx = {
        "smooth": lambda: jw.quantize.smooth(folds=folds),
        "awq": lambda: jw.quantize.awq(group_size=None, folds=folds),
        "fuse_norms": lambda: jw.quantize.fuse_norms(folds),
    }[method]()
    words = rf"quantize.{method}: cannot fold: '.*' is one array with '.*jnp.copy\(leaf\)"
    for tied in (True, False):
        tree = params if tied else params | {"down": jnp.copy(shared)}
        needs = tx.needs(tree)
        stats = jw.calibrate(model, tree, [x], needs=needs) if needs else None
        layout = jw.infer_layout(model, tree, x)
        if tied:
            with pytest.raises(ValueError, match=words):
                jw.apply(tx, tree, stats=stats, layout=layout)
        elif method != "awq":  # which rounds
            new = jw.apply(tx, tree, stats=stats, layout=layout)
            assert jw.quantize.check_same_function(model, tree, new, [x]) < 1e-5
