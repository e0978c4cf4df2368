"""leafwise maps the maths of one matrix over stacks and layouts, and refuses by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import Layout, Stats, apply, leafwise, partition
from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes, Masked, Quantized
from tests.core._transforms import add, add_noise, matrix, scale_by_rms

LAYOUTS = [
    ((4, 3), Axes()),
    ((3, 4), Axes((-1,), (-2,))),
    ((2, 4, 3), Axes()),
    ((5, 2, 4, 3), Axes()),
    ((4, 2, 3), Axes((-3,), (-2, -1))),
    ((2, 3, 4), Axes((-3, -2), (-1,))),
    ((4, 5, 3), Axes((-3,), (-1,))),
    ((2, 3, 4, 5), CONV_HWIO),
    ((6, 4), EMBEDDING),
]


def matrices(leaf, axes):
    """Every matrix of a leaf by plain NumPy indexing."""
    leaf = np.asarray(leaf)
    named = [a % leaf.ndim for a in (*axes.inputs, *axes.outputs)]
    stack = [a for a in range(leaf.ndim) if a not in named]
    ins = int(np.prod([leaf.shape[a] for a in axes.inputs]))
    moved = np.transpose(leaf, (*stack, *named))
    return moved.reshape(-1, ins, leaf.size // ins // int(np.prod([leaf.shape[a] for a in stack])))


@pytest.mark.parametrize("mapping", ["vmap", "map"])
@pytest.mark.parametrize("shape, axes", LAYOUTS)
def test_the_function_sees_every_matrix_as_in_by_out(shape, axes, mapping):
    """Cumulative sums over inputs, weighted by the output's number, know which axis is which."""

    def fn(weight):
        assert weight.ndim == 2
        outputs = jnp.arange(weight.shape[1], dtype=jnp.float32)[None]
        return jnp.cumsum(weight, axis=0) * outputs

    leaf = matrix(0, *shape)
    tx = partition(("w", leafwise(fn, name="t", mapping=mapping)))
    new = apply(tx, {"w": leaf}, layout={"w": axes})["w"]
    assert new.shape == shape
    for before, after in zip(matrices(leaf, axes), matrices(new, axes), strict=True):
        expected = np.cumsum(before, axis=0) * np.arange(before.shape[1])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)


def test_each_matrix_gets_its_own_statistics():
    stack = matrix(0, 3, 4, 2)
    moments = jnp.abs(matrix(1, 3, 4)) + 1
    stats = Stats({"w": {"count": jnp.array([1, 2, 4]), "second_moment": moments}})
    new = apply(scale_by_rms(), {"w": stack}, stats=stats, layout={"w": Axes()})["w"]
    rms = np.sqrt(np.asarray(moments) / np.array([[1], [2], [4]]))
    np.testing.assert_allclose(new, stack / rms[:, :, None], rtol=1e-6)


def test_gradient_statistics_are_rearranged_like_the_weight():
    tx = leafwise(lambda weight, *, grad_sq: weight * grad_sq, name="t", needs=("grad_sq",))
    leaf, squares = matrix(0, 4, 2, 3), matrix(1, 4, 2, 3)
    stats = Stats({"w": {"grad_sq": squares}})
    new = apply(tx, {"w": leaf}, stats=stats, layout={"w": Axes((-3,), (-2, -1))})["w"]
    np.testing.assert_allclose(new, leaf * squares, rtol=1e-6)


def test_each_matrix_and_each_path_draws_its_own_numbers():
    zeros = {"a": jnp.zeros((3, 4, 4)), "b": jnp.zeros((4, 4))}
    run = lambda params: apply(  # noqa: E731
        add_noise(), params, key=jax.random.key(0), layout=dict.fromkeys(params, Axes())
    )
    new = run(zeros)
    drawn = [*new["a"], new["b"]]
    assert len({np.asarray(x).tobytes() for x in drawn}) == 4
    np.testing.assert_array_equal(run({"b": zeros["b"]})["b"], new["b"])


def test_the_mask_of_a_weight_reaches_the_function():
    tx = leafwise(
        lambda weight, *, mask: jnp.where(mask, weight, 7), name="t", masked=True, accepts=(Masked,)
    )
    leaf = Masked(jnp.ones((3, 4)), jnp.eye(3, 4, dtype=bool))
    new = apply(tx, {"w": leaf}, layout={"w": Axes((-1,), (-2,))})["w"]
    np.testing.assert_array_equal(new, np.where(np.eye(3, 4), 1, 7))


def test_wrap_builds_the_new_leaf_from_stacked_results():
    tx = leafwise(
        lambda weight: {"sign": jnp.sign(weight), "size": jnp.max(jnp.abs(weight))},
        name="t",
        wrap=lambda leaf, result, view: (leaf.shape, result, view.axes),
    )
    shape, result, axes = apply(tx, {"w": matrix(0, 3, 4, 2)}, layout={"w": Axes()})["w"]
    assert shape == (3, 4, 2) and axes == Axes()
    assert result["sign"].shape == (3, 4, 2) and result["size"].shape == (3,)


def test_leaves_of_one_shape_compile_once():
    traces = []

    def fn(weight):
        traces.append(weight.shape)
        return weight

    params = {str(i): matrix(i, 4, 3) for i in range(5)} | {"other": matrix(9, 3, 4)}
    apply(leafwise(fn, name="t"), params)
    assert len(traces) == 2


def test_integers_text_and_vectors_are_left_alone_unless_named():
    params = {"ids": jnp.ones((2, 2), jnp.int32), "bias": jnp.ones(2), "norm": jnp.ones((3, 2))}
    new = apply(add(1), params)
    assert all(new[name] is params[name] for name in params)


REFUSALS = {
    "integer": ({"w": jnp.ones((2, 2), jnp.int32)}, {}, r"'w': is int32, not a floating array"),
    "vector": ({"w": jnp.ones(3)}, {}, r"'w': has shape \(3,\), which is no matrix"),
    "ambiguous": (
        {"w": jnp.ones((2, 2, 2))},
        {},
        r"'w': has shape \(2, 2, 2\); which of its axes.*ambiguous.*layout=infer_layout",
    ),
    "not in the trace": (
        {"w": jnp.ones((2, 2))},
        {"layout": Layout((), traced=True)},
        r"'w': the traced model never multiplies this leaf \(2, 2\)",
    ),
    "contradictory": (
        {"w": jnp.ones((2, 2))},
        {"layout": Layout((), traced=True, unclear=(("w", "used both ways"),))},
        r"'w': used both ways. State which axes are inputs",
    ),
    "represented": (
        {"w": Quantized.from_codes(jnp.ones((2, 2), jnp.int8), jnp.ones((1, 2)), bits=8)},
        {},
        r"'w': is already a Quantized. Apply it to the dense weight",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_named_leaf_that_does_not_suit_is_refused_by_its_words(case):
    params, settings, words = REFUSALS[case]
    with pytest.raises(ValueError, match="add: " + words):
        apply(partition(("w", add(1))), params, **settings)


def test_an_ambiguous_leaf_is_refused_even_when_no_rule_names_it():
    with pytest.raises(ValueError, match=r"add: 'mlp/kernel': .* ambiguous"):
        apply(add(1), {"mlp": {"kernel": jnp.ones((2, 2, 2))}})


def test_every_bad_leaf_is_in_one_message():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.int32), "good": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"(?s)add: 'a': .*\nadd: 'b': "):
        apply(partition((".*", add(1))), params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [2, 64])
def test_values_that_are_not_finite_are_refused_with_their_place(value, size):
    leaf = np.ones((size, size), np.float32)
    leaf[1, 0] = leaf[-1, -1] = value
    count = 2
    words = rf"add: 'w': {count} of {size * size} values are not finite, the first at \[1, 0\]"
    with pytest.raises(ValueError, match=words):
        apply(add(1), {"w": jnp.asarray(leaf), "v": matrix(0, 2, 2)})


def test_under_jit_values_are_not_looked_at():
    out = jax.jit(lambda p: apply(add(1), p))({"w": jnp.full((2, 2), jnp.nan)})
    assert bool(jnp.isnan(out["w"]).all())


def test_check_and_verify_say_what_is_wrong():
    check = lambda path, leaf, view: f"{path!r}: {view.in_dim} inputs are too many"  # noqa: E731
    with pytest.raises(ValueError, match=r"add: 'w': 4 inputs are too many"):
        apply(add(1, check=check), {"w": matrix(0, 4, 3)})
    verify = lambda path, result: f"{path!r}: went wrong"  # noqa: E731
    with pytest.raises(ValueError, match=r"add: 'w': went wrong"):
        apply(add(1, verify=verify), {"w": matrix(0, 4, 3)})


def test_randomness_without_a_key_is_refused():
    with pytest.raises(ValueError, match=r"add_noise: 'key' is missing: pass key=jax.random.key"):
        apply(add_noise(), {"w": matrix(0, 2, 2)})


def test_needs_list_what_may_be_a_target_and_by_name_everything():
    params = {"w": matrix(0, 2, 2), "head": matrix(1, 2, 2), "bias": jnp.ones(2)}
    tx = scale_by_rms()
    assert set(tx.needs(params)) == {"w"}
    assert set(tx.needs(params, named=True)) == {"w", "head"}
    abstract = jax.eval_shape(lambda: params)
    assert tx.needs(abstract) == tx.needs(params)
    assert add(1).needs(params) == {}


def test_empty_leaves_stay_empty():
    assert apply(add(1), {"w": jnp.zeros((0, 3))})["w"].shape == (0, 3)


def test_a_sharded_leaf_keeps_its_sharding(mesh):
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    leaf = jax.device_put(matrix(0, 4, 8), sharding)
    new = jw.apply(add(1), {"w": leaf})["w"]
    assert new.sharding.is_equivalent_to(sharding, 2)
