"""Permutations read off a trace leave the function as it is, and are those that a reader finds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align, quantize
from jaxweights.core import apply, flatten
from tests.align._models import assert_preserved, library_model, mlp, mlp_params, random_like

X = jax.random.normal(jax.random.key(3), (4, 6))
IMAGES = jax.random.normal(jax.random.key(4), (2, 8, 8, 3))


def shapes(**sizes):
    return random_like({name: jnp.ones(shape) for name, shape in sizes.items()})


def groups(spec):
    """The axes that each permutation is on, whatever it is called."""
    found = {}
    for path, entry in spec.axes.items():
        for i, axis in enumerate(entry):
            for j, part in enumerate(axis if isinstance(axis, tuple) else (axis,)):
                if part in spec.sizes:
                    place = (path, i, j) if isinstance(axis, tuple) else (path, i)
                    found.setdefault(part, set()).add(place)
    return sorted(map(sorted, found.values()))


def check(fn, params, *inputs):
    spec = align.infer_permutations(fn, params, *inputs)
    assert_preserved(fn, spec, params, *inputs)
    return spec


def same(first, second):
    """Whether two specs have the same permutations under other names."""
    above = [
        sorted(
            sorted(groups_of(spec, name) for name in (key, *spec.over.get(key, ())))
            for key in spec.sizes
        )
        for spec in (first, second)
    ]
    return groups(first) == groups(second) and above[0] == above[1]


def groups_of(spec, name):
    return sorted(
        (path, i)
        for path, entry in spec.axes.items()
        for i, axis in enumerate(entry)
        if name in (axis if isinstance(axis, tuple) else (axis,))
    )


def test_an_mlp_has_one_permutation_a_hidden_layer():
    params = mlp_params(6, 9, 7, 3)
    assert same(check(mlp, params, X), align.mlp_permutations(params))


@pytest.mark.promotion(dtypes="standard", ranks="allow")
@pytest.mark.parametrize("case", ["llama3", "smollm2", "olmo2", "qwen2", "qwen3", "bert"])
def test_the_trace_of_a_transformer_gives_the_spec_written_by_hand(case):
    config, model, params = library_model(case)
    tokens = jnp.array([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])
    spec = check(lambda params, x: model.apply({"params": params}, x), params, tokens)
    by_hand = (align.bert_permutations if case == "bert" else align.llama_permutations)(config)
    assert same(spec, by_hand)


def test_a_residual_stream_is_one_permutation():
    params = shapes(
        into=(6, 8), up0=(8, 10), down0=(10, 8), up1=(8, 10), down1=(10, 8), out=(8, 2), scale=(8,)
    )

    def model(p, x):
        x = x @ p["into"]
        for i in range(2):
            y = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * p["scale"][None]
            x = x + jax.nn.gelu(y @ p[f"up{i}"]) @ p[f"down{i}"]
        return jax.nn.softmax(x @ p["out"])

    assert groups(check(model, params, X)) == [
        [("down0", 0), ("up0", 1)],
        [("down0", 1), ("down1", 1), ("into", 1), ("out", 0), ("scale", 0), ("up0", 0), ("up1", 0)],
        [("down1", 0), ("up1", 1)],
    ]


class ConvNet(nn.Module):
    """Convolutions of every kind, norms, pooling and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = nn.BatchNorm(use_running_average=True, name="batch_norm")(x)
        y = nn.relu(nn.Conv(12, (1, 1), name="wide")(x))
        y = nn.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(y)
        x = x + nn.Conv(8, (1, 1), name="narrow")(y)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.GroupNorm(num_groups=4, name="group_norm")(nn.Conv(16, (3, 3), name="second")(x))
        return nn.Dense(5, name="head")(nn.relu(x).mean(axis=(1, 2)))


@pytest.mark.promotion(dtypes="standard", ranks="allow")
def test_channels_of_a_convolutional_network_are_found():
    model = ConvNet()
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    params = random_like(variables)
    params["batch_stats"] = jax.tree.map(jnp.square, params["batch_stats"])
    spec = check(lambda v, x: model.apply(v, x), params, IMAGES)
    found = groups(spec)
    assert [
        (f"params/{name}", i)
        for name, i in (
            ("depthwise/bias", 0),
            ("depthwise/kernel", 3),
            ("narrow/kernel", 2),
            ("wide/bias", 0),
            ("wide/kernel", 3),
        )
    ] in found
    stream = next(group for group in found if ("params/first/kernel", 3) in group)
    assert ("batch_stats/batch_norm/mean", 0) in stream and ("params/narrow/kernel", 3) in stream
    # Whole groups, and channels inside each group, may change places; channels across may not.
    assert spec.axes["params/second/bias"] == spec.axes["params/head/kernel"][:1]
    (outer, inner) = spec.axes["params/second/bias"][0]
    assert (spec.sizes[outer], spec.sizes[inner]) == (4, 4)
    assert spec.over == {inner: (outer,)}
    assert spec.axes["params/head/bias"] == (None,)


def test_gates_in_one_kernel_share_the_permutation_of_their_units():
    params = shapes(kernel=(6, 20), recurrent=(5, 20), bias=(20,), out=(5, 3))

    def lstm(p, x):
        def step(carry, x):
            h, c = carry
            gates = x @ p["kernel"] + h @ p["recurrent"] + p["bias"]
            i, f, g, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        _, hs = jax.lax.scan(step, (jnp.zeros(5), jnp.zeros(5)), x)
        return hs @ p["out"]

    with pytest.raises(ValueError, match=r"axis 0 of 'recurrent'.*on two axes of one leaf") as e:
        align.infer_permutations(lstm, params, X)
    assert "unproven='fix'" in str(e.value)
    # As a permutation it is right; only matching cannot take it.
    p = np.array([3, 0, 4, 2, 1])
    wide = (np.arange(4)[:, None] * 5 + p[None]).ravel()
    moved = {
        "kernel": params["kernel"][:, wide],
        "recurrent": params["recurrent"][p][:, wide],
        "bias": params["bias"][wide],
        "out": params["out"][p],
    }
    np.testing.assert_allclose(lstm(moved, X), lstm(params, X), atol=1e-6)
    with pytest.raises(ValueError, match="no hidden units may be renumbered"):
        align.infer_permutations(lstm, params, X, unproven="fix")


def test_layers_of_a_scan_have_permutations_of_their_own_and_share_the_stream():
    params = shapes(into=(6, 8), up=(3, 8, 10), down=(3, 10, 8), bias=(3, 10), out=(8, 2))

    def model(p, x):
        def layer(x, p):
            return x + jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"], None

        layers = {name: p[name] for name in ("up", "down", "bias")}
        x, _ = jax.lax.scan(layer, x @ p["into"], layers)
        return x @ p["out"]

    spec = check(model, params, X)
    (mlp_name,) = spec.over
    assert spec.shape_of(mlp_name) == (3, 10)
    assert sorted(spec.leaves_of(mlp_name)) == ["bias", "down", "up"]
    assert groups(spec) == [
        [("bias", 1), ("down", 1), ("up", 2)],
        [("down", 2), ("into", 1), ("out", 0), ("up", 1)],
    ]


def test_a_permutation_is_shared_by_layers_that_hand_its_units_on():
    params = shapes(into=(6, 8), scale=(3, 8), out=(8, 2))

    def model(p, x):
        x, _ = jax.lax.scan(lambda x, s: (jnp.tanh(x * s[None]), None), x @ p["into"], p["scale"])
        return x @ p["out"]

    spec = check(model, params, X)
    assert not spec.over and groups(spec) == [[("into", 1), ("out", 0), ("scale", 1)]]


@pytest.mark.parametrize("mix", [jnp.cumsum, jnp.sort, lambda x, axis: jnp.flip(x, axis)])
def test_what_mixes_rows_forbids_rows_of_their_own_permutations(mix):
    """Each of the 3 rows may be permuted like the others, not differently."""
    params = shapes(up=(3, 6, 8), out=(3, 8, 2))

    def model(p, x):
        h = mix(jnp.einsum("bi,rih->brh", x, p["up"]), axis=1)
        return jnp.einsum("brh,rho->bo", jnp.tanh(h), p["out"])

    spec = check(model, params, X)
    assert not spec.over and groups(spec) == [[("out", 1), ("up", 2)]]
    apart = check(lambda p, x: model_apart(p, x), params, X)
    assert len(apart.over) == 1


def model_apart(p, x):
    h = jnp.einsum("bi,rih->brh", x, p["up"])
    return jnp.einsum("brh,rho->bo", jnp.tanh(h), p["out"])


def test_experts_are_permuted_with_their_router_columns_and_each_has_its_own_units():
    params = shapes(router=(6, 4), up=(4, 6, 8), down=(4, 8, 2))

    def model(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        h = jax.nn.relu(jnp.einsum("bi,eih->beh", x, p["up"]))
        return jnp.einsum("be,beh,eho->bo", gates, h, p["down"])

    spec = check(model, params, X)
    assert groups(spec) == [[("down", 0), ("router", 1), ("up", 0)], [("down", 1), ("up", 2)]]
    ((inner, (outer,)),) = spec.over.items()
    assert (spec.sizes[inner], spec.sizes[outer]) == (8, 4)


def test_units_that_positions_or_constants_tell_apart_stay():
    params = shapes(up=(6, 8), down=(8, 2))
    weights = np.linspace(1, 2, 8).astype(np.float32)
    for tell in (
        lambda h: h * weights[None],
        lambda h: h * jnp.arange(8.0)[None],
        lambda h: jnp.cumsum(h, axis=1),
        lambda h: h[:, ::-1],
        lambda h: jnp.concatenate([h[:, 3:], h[:, :3]], axis=1),
        lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :8],
        lambda h: h.at[:, 2].set(0.0),
    ):
        refusal = r"infer_permutations: (no hidden units|axis 1 of 'up': what 'scatter')"
        with pytest.raises(ValueError, match=refusal):
            align.infer_permutations(lambda p, x, f=tell: f(x @ p["up"]) @ p["down"], params, X)
    uniform = np.full(8, 2.0, np.float32)[None]
    assert len(check(lambda p, x: (x @ p["up"] * uniform) @ p["down"], params, X).sizes) == 1


def test_branches_and_loops_bind_what_they_hand_on():
    params = shapes(a=(6, 8), b=(6, 8), scale=(8,), out=(8, 2))

    def model(p, x):
        h = jax.lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x @ p["b"])
        h = jax.lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] * p["scale"][None])), (0, h)
        )[1]
        return jax.checkpoint(jax.jit(lambda h: h @ p["out"]))(h)

    assert groups(check(model, params, X)) == [[("a", 1), ("b", 1), ("out", 0), ("scale", 0)]]


def test_leaves_that_the_model_does_not_read_stay():
    params = shapes(up=(6, 8), down=(8, 2), unused=(7, 7))
    spec = check(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, X)
    assert spec.axes["unused"] == (None, None)


def test_operations_that_are_not_understood_are_named():
    params = shapes(up=(6, 8), down=(8, 2), more=(2, 5), last=(5, 3))

    def model(p, x):
        h = jnp.fft.fft(x @ p["up"]).real @ p["down"]
        return jnp.tanh(h @ p["more"]) @ p["last"]

    with pytest.raises(ValueError, match="axis 1 of 'up': what 'fft' does with it is not"):
        align.infer_permutations(model, params, X)
    spec = align.infer_permutations(model, params, X, unproven="fix")
    assert groups(spec) == [[("down", 1), ("more", 0)], [("last", 0), ("more", 1)]]
    assert_preserved(model, spec, params, X)


def test_wrong_arguments_are_refused():
    params = mlp_params(6, 9, 3)
    with pytest.raises(ValueError, match="unproven='ignore' is neither"):
        align.infer_permutations(mlp, params, X, unproven="ignore")  # type: ignore[arg-type]
    params = apply(quantize.round_to_nearest(bits=8), params)
    with pytest.raises(TypeError, match="'Dense_0/kernel': is a Quantized"):
        align.infer_permutations(mlp, params, X)


def test_abstract_arrays_suffice():
    params = mlp_params(6, 9, 3)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    spec = align.infer_permutations(mlp, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert spec == align.infer_permutations(mlp, params, X)
    assert set(spec.axes) == set(flatten(params)[0])
