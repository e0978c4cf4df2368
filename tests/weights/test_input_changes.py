import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxweights as jw
from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.weights import CONV_HWIO, Axes, Rescaled, Rotated, View, hadamard_matrix

HEADS = Axes(inputs=(-3,), outputs=(-2, -1))
OUT_HEADS = Axes(inputs=(-3, -2), outputs=(-1,))
TABLE = Axes(inputs=(-1,), outputs=(-2,), kind="embedding")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def rescaled(shape, axes=Axes(), dtype=jnp.float32):
    view = View.of(shape, axes)
    stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
    scale = jnp.exp(normal(*stack, view.in_dim, seed=1))
    return Rescaled.of(normal(*shape, dtype=dtype), scale, view)


def rotated(shape, axes=Axes(), dtype=jnp.float32):
    return Rotated.of(normal(*shape, dtype=dtype), View.of(shape, axes))


MAKERS = pytest.mark.parametrize("make", [rescaled, rotated])


def oracle(weight):
    """The dense weight by explicit matrices in float64."""
    base = np.asarray(weight.view.to_matrix(jw.materialize(weight.base)), np.float64)
    if isinstance(weight, Rescaled):
        matrix = np.asarray(weight.scale, np.float64) * base
    else:
        h = hadamard_matrix(weight.order) / np.sqrt(weight.order)
        matrix = np.kron(np.eye(base.shape[-2] // weight.order), h.T) @ base
    return np.asarray(weight.view.from_matrix(jnp.asarray(matrix, jnp.float32)))


@MAKERS
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((8, 3), Axes()),
        ((2, 8, 3), Axes()),
        ((8, 2, 4), HEADS),
        ((2, 4, 3), OUT_HEADS),
        ((5, 8), TABLE),
        ((2, 2, 3, 4), CONV_HWIO),
        ((1, 1), Axes()),
    ],
)
def test_the_dense_weight_is_the_map_times_the_base(make, shape, axes):
    weight = make(shape, axes)
    assert (weight.shape, weight.dtype, weight.size) == (shape, jnp.float32, np.prod(shape))
    np.testing.assert_allclose(weight.materialize(), oracle(weight), rtol=1e-6, atol=1e-6)


def test_a_scale_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"scale has shape \(3,\), but .* needs \(2, 8\)"):
        Rescaled.of(jnp.ones((2, 8, 3)), jnp.ones(3))


def test_a_rotated_weight_stands_for_the_weight_that_it_was_made_of():
    for length in (8, 12, 6):
        dense = normal(length, 3)
        np.testing.assert_allclose(Rotated.of(dense).materialize(), dense, atol=1e-6)


@MAKERS
@pytest.mark.parametrize(
    "shape, axes, equation, x_shape",
    [
        ((8, 3), Axes(), "ti,io->to", (4, 8)),
        ((8, 3), Axes(), "ib,io->bo", (8, 4)),
        ((8, 3), Axes(), "to,io->ti", (4, 3)),
        ((3, 8, 5), Axes(), "eti,eio->eto", (3, 2, 8)),
        ((3, 8, 5), Axes(), "eto,eio->eti", (3, 2, 5)),
        ((3, 8, 5), Axes(), "ti,eio->teo", (2, 8)),
        ((8, 2, 4), HEADS, "bti,ihd->bthd", (2, 3, 8)),
        ((2, 4, 3), OUT_HEADS, "bthd,hdo->bto", (2, 3, 2, 4)),
        ((2, 4, 3), OUT_HEADS, "to,hdo->thd", (2, 3)),
        ((5, 8), TABLE, "td,vd->tv", (2, 8)),
    ],
)
def test_products_under_lift_equal_those_with_the_dense_weight(
    make, shape, axes, equation, x_shape
):
    weight, x = make(shape, axes), normal(*x_shape, seed=3)
    product = lambda w, x: jnp.einsum(equation, x, w, precision="highest")  # noqa: E731
    expected = product(weight.materialize(), x)
    np.testing.assert_allclose(jw.lift(product)(weight, x), expected, rtol=1e-5, atol=2e-5)
    if "e" not in equation or "eti" in equation or "eto," in equation:
        strict = jw.lift(product, on_materialize="error")
        np.testing.assert_allclose(jax.jit(strict)(weight, x), expected, rtol=1e-5, atol=2e-5)


@MAKERS
def test_layers_of_a_scan_rows_of_a_table_and_sorted_experts(make):
    stack = make((3, 8, 8))
    run = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]  # noqa: E731
    x = normal(2, 8, seed=3)
    found = jw.lift(run, on_materialize="error")(stack, x)
    np.testing.assert_allclose(found, run(stack.materialize(), x), atol=1e-5)
    table = make((5, 8), TABLE)
    look = jw.lift(lambda t, i: jnp.take(t, i, axis=0), on_materialize="error")
    rows = look(table, jnp.array([[4, 0], [2, 2]]))
    np.testing.assert_allclose(rows, table.materialize()[jnp.array([[4, 0], [2, 2]])], atol=1e-6)
    sizes = jnp.array([2, 0, 3])
    ragged = jw.lift(jax.lax.ragged_dot, on_materialize="error")
    x = normal(5, 8, seed=4)
    expected = jax.lax.ragged_dot(x, stack.materialize(), sizes)
    np.testing.assert_allclose(ragged(x, stack, sizes), expected, rtol=1e-5, atol=1e-5)


@MAKERS
def test_quantized_and_masked_bases_are_behind_the_map(make):
    weight = make((2, 8, 4))
    for tx in (
        jw.quantize.round_to_nearest(bits=4, group_size=4),
        jw.sparsify.magnitude(keep=2, of=4),
    ):
        new = jw.apply(tx, {"kernel": weight}, layout={"kernel": Axes()})["kernel"]
        alone = jw.apply(tx, {"kernel": weight.base}, layout={"kernel": Axes()})["kernel"]
        assert type(new) is type(weight)
        assert type(new.base) is type(alone)
        np.testing.assert_array_equal(jw.materialize(new.base), jw.materialize(alone))
        x = normal(2, 3, 8, seed=5)
        found = jw.lift(jnp.matmul)(x, new)
        np.testing.assert_allclose(found, x @ new.materialize(), rtol=1e-5, atol=1e-5)
        again = jw.quantize.round_to_nearest(bits=4, group_size=4)
        if not isinstance(new.base, jw.Masked):
            with pytest.raises(ValueError, match="'kernel': is already a Quantized"):
                jw.apply(again, {"kernel": new}, layout={"kernel": Axes()})


@MAKERS
def test_statistics_are_those_of_what_the_base_is_multiplied_with(make):
    weight, x = make((8, 3)), normal(5, 8, seed=6)
    params = {"a": {"kernel": weight}, "b": {"kernel": weight.base}, "c": {"kernel": weight.base}}
    model = lambda p, x: sum(x @ p[k]["kernel"] for k in "abc")  # noqa: E731
    names = frozenset({"gram", "abs_sum", "max"})
    needs = {f"{k}/kernel": names for k in "abc"}
    stats = jw.calibrate(model, params, [x], needs=needs)
    seen = weight.change(x)
    np.testing.assert_allclose(stats.get("a/kernel", "gram"), seen.T @ seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.get("a/kernel", "abs_sum"), jnp.abs(seen).sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats.get("c/kernel", "max"), x.max(0), rtol=1e-6)
    assert dict(stats.owners) == {"c/kernel": "b/kernel"}


def test_statistics_behind_two_maps_are_those_of_the_inner_base():
    inner, x = rotated((8, 3)), normal(5, 8, seed=6)
    weight = Rescaled.of(inner, jnp.exp(normal(8, seed=1)))
    model = lambda p, x: x @ p["kernel"]  # noqa: E731
    stats = jw.calibrate(model, {"kernel": weight}, [x], needs={"kernel": frozenset({"gram"})})
    seen = inner.change(weight.change(x))
    np.testing.assert_allclose(stats.get("kernel", "gram"), seen.T @ seen, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen @ inner.base, x @ weight.materialize(), rtol=1e-4, atol=1e-4)


@MAKERS
def test_float64_weights_keep_their_digits(make):
    with jax.enable_x64(True):
        weight = make((8, 3), dtype=jnp.float64)
        found = np.asarray(weight.materialize())
        x = np.eye(8)
        want = np.asarray(weight.change(jnp.asarray(x)) @ weight.base)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-14)


@MAKERS
def test_bfloat16_activations_are_changed_in_float32_and_rounded_once(make):
    weight = make((8, 3), dtype=jnp.bfloat16)
    x = normal(4, 8, seed=7, dtype=jnp.bfloat16)
    changed = weight.change(x)
    assert changed.dtype == jnp.bfloat16
    wide = weight.change(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (changed, wide)))
    assert jw.lift(jnp.matmul)(x, weight).dtype == weight.materialize().dtype == jnp.bfloat16


@MAKERS
def test_axes_move_and_dtypes_change_with_the_base(make):
    weight = make((2, 8, 6))
    dense = weight.materialize()
    for lazy, expected in (
        (weight.transpose((0, 2, 1)), dense.transpose(0, 2, 1)),
        (weight.reshape((2, 8, 3, 2)), dense.reshape(2, 8, 3, 2)),
        (weight.astype(jnp.bfloat16), dense),
        (weight.slice_stack(1, 1), dense[1:2]),
    ):
        tolerance = 0.1 if lazy.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            lazy.materialize().astype(jnp.float32), expected, atol=tolerance, rtol=tolerance
        )
    assert weight.transpose((1, 0, 2)) is None or weight.transpose((1, 0, 2)).shape == (8, 2, 6)
    assert jax.eval_shape(lambda w: w.materialize(), weight).shape == (2, 8, 6)


def test_gradients_reach_the_scale_and_the_base():
    weight, x = rescaled((8, 3)), normal(4, 8, seed=8)
    loss = lambda w: (jw.lift(jnp.matmul)(x, w) ** 2).sum()  # noqa: E731
    found = jax.grad(loss)(weight)
    dense = jax.grad(lambda w: ((x @ w) ** 2).sum())(weight.materialize())
    np.testing.assert_allclose(found.base, weight.scale * dense, rtol=1e-4)
    np.testing.assert_allclose(
        found.scale[:, 0], (weight.base * dense).sum(1), rtol=1e-4, atol=1e-3
    )


@MAKERS
def test_saving_and_loading_gives_the_same_bits(make, tmp_path):
    tx = jw.quantize.round_to_nearest(bits=4)
    tree = jw.apply(tx, {"kernel": make((8, 4))}) | {"plain": make((8, 4))}
    save_tree(tmp_path / "tree", tree)
    loaded = load_tree(tmp_path / "tree").tree
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_on_devices_are_split_as_the_weight(mesh):
    weight = rescaled((8, 4))
    specs = weight.partition(PartitionSpec("data", "model"), mesh)
    assert specs.base == PartitionSpec("data", "model")
    assert specs.scale == PartitionSpec("data", None)
    turned = rotated((8, 4))
    assert turned.partition(PartitionSpec("data", "model"), mesh) is None  # inputs are mixed
    assert turned.partition(PartitionSpec(None, "model"), mesh).base == PartitionSpec(None, "model")
    x, rows = normal(4, 8, seed=9), PartitionSpec("data", "model")
    product = jax.shard_map(
        lambda x, w: jax.lax.psum(jw.lift(jnp.matmul)(x, w), "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(None, "data"), rows),
        out_specs=PartitionSpec(None, "model"),
    )
    found = jw.lift(product)(x, weight)
    np.testing.assert_allclose(found, x @ weight.materialize(), atol=1e-5)
