"""Codebook and NarrowFloat, and what they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.core._plan import describe_leaf, leaf_bytes
from jaxweights.lift import lift
from jaxweights.weights import EMBEDDING, Axes, Codebook, NarrowFloat, View, is_weight

TABLE = np.array([0.0, 3.0, -1.0, 0.3], np.float32)
KINDS = ["codebook", "wide codebook", "narrow float", "double"]


def random_weight(kind, *, stack=(), in_dim=24, out_dim=6, rows=3, cols=6, view=None, offset=False):
    """A weight of a kind, and its dense matrix by NumPy."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 2, (*stack, rows, cols)).astype(np.float32)
    spread = lambda x: np.repeat(  # noqa: E731
        np.repeat(x, in_dim // x.shape[-2], -2), out_dim // x.shape[-1], -1
    )
    shift = rng.normal(size=(*stack, 1, 1)).astype(np.float32) if offset else None
    added = None if shift is None else jnp.asarray(shift)
    given = jnp.asarray(scale)
    if kind == "double":
        inner = Codebook.from_codes(
            jnp.asarray(rng.integers(0, 4, scale.shape)),
            jnp.broadcast_to(jnp.asarray(TABLE), (*stack, 4)),
            jnp.full((*stack, 1, 1), 0.5),
            jnp.full((*stack, 1, 1), 2.0),
            bits=8,
        )
        given, scale = inner, TABLE[np.asarray(inner.codes)] * np.float32(0.5) + np.float32(2)
    if kind == "narrow float":
        values = jnp.asarray(rng.normal(size=(*stack, in_dim, out_dim))).astype(jnp.float8_e4m3fn)
        units = np.asarray(values).astype(np.float32)
        weight = NarrowFloat.from_values(values, given, added, view=view)
    else:
        levels = 40 if kind == "wide codebook" else 4
        table = rng.normal(size=(*stack, levels)).astype(np.float32)
        codes = rng.integers(0, levels, (*stack, in_dim, out_dim))
        units = np.take_along_axis(table, codes.reshape(*stack, -1), -1).reshape(codes.shape)
        bits = 6 if levels == 40 else 2
        weight = Codebook.from_codes(
            jnp.asarray(codes), jnp.asarray(table), given, added, bits=bits, view=view
        )
        assert np.array_equal(weight.codes_matrix(), codes)
    dense = units * spread(scale)
    return weight, dense if shift is None else dense + shift


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 6), (4, 3)])
def test_it_stands_for_the_matrix_of_the_equation(kind, stack, rows, cols):
    weight, dense = random_weight(kind, stack=stack, rows=rows, cols=cols)
    assert weight.shape == (*stack, 24, 6)
    assert weight.stack_shape == stack
    assert np.array_equal(weight.materialize(), dense)
    shifted, dense = random_weight(kind, stack=stack, rows=rows, cols=cols, offset=True)
    # A product and a sum may be rounded once or twice.
    np.testing.assert_allclose(shifted.materialize(), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits, per_byte", [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1), (8, 1)])
def test_narrow_codes_share_bytes(bits, per_byte):
    codes = np.random.default_rng(0).integers(0, 2**bits, (16, 3))
    table = jnp.arange(2.0**bits)
    weight = Codebook.from_codes(jnp.asarray(codes), table, jnp.ones((1, 1)), bits=bits)
    assert weight.codes.shape == (16 // per_byte, 3)
    assert np.array_equal(weight.codes_matrix(), codes)
    assert np.array_equal(weight.materialize(), codes)
    # The lowest row has the lowest bits.
    assert int(weight.codes[0, 0]) % 2 ** (8 // per_byte) == codes[0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 6), (1, 3), (3, 6)])
def test_products_equal_those_of_the_dense_weight(kind, rows, cols):
    weight, dense = random_weight(kind, rows=rows, cols=cols)
    x = np.random.default_rng(1).normal(size=(5, 24)).astype(np.float32)
    z = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    for ours, left, right in (
        (weight.multiply(jnp.asarray(x)), x, dense),
        (weight.multiply_transposed(jnp.asarray(z)), z, dense.T),
    ):
        bound = 2e-6 * (np.abs(left) @ np.abs(right)) + 1e-6
        assert np.all(np.abs(ours - left @ right) <= bound)


def test_eight_bit_floats_with_scales_per_output_are_multiplied_unscaled():
    weight, _ = random_weight("narrow float", rows=1)
    program = str(jax.make_jaxpr(lambda x: weight.multiply(x))(jnp.ones((5, 24), jnp.bfloat16)))
    shapes = [
        line.split("=")[0].split(":")[1].strip() for line in program.splitlines() if " mul " in line
    ]
    assert shapes == ["f32[5,6]"]
    assert weight.multiply(jnp.ones((5, 24), jnp.bfloat16)).dtype == jnp.bfloat16


def test_levels_are_not_rounded_to_the_activations_dtype_before_they_are_scaled():
    table = jnp.array([1 + 2**-9, 0.0])  # bfloat16 rounds it to 1
    codes = jnp.zeros((2, 1), jnp.int32)
    weight = Codebook.from_codes(codes, table, jnp.full((1, 1), 512 / 513), bits=1)
    assert float(weight.multiply(jnp.ones((1, 2), jnp.bfloat16))[0, 0]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_columns_and_an_index_out_of_range_gives_nan(kind):
    weight, dense = random_weight(kind, cols=3)
    found = weight.columns(jnp.array([5, 0, 0, -1, 6, -7]))
    assert np.array_equal(found[:4], dense.T[[5, 0, 0, -1]])
    assert np.isnan(found[4:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_looks_up_its_rows(kind):
    weight, dense = random_weight(kind, view=View.of((6, 24), EMBEDDING))
    assert np.array_equal(weight.materialize(), dense.T)
    indices = jnp.array([[0, 5], [2, 2]])
    assert np.array_equal(weight.take(indices), dense.T[np.asarray(indices)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_a_stack_is_a_weight(kind):
    weight, dense = random_weight(kind, stack=(3,))
    one = jax.tree.map(lambda x: x[1], weight)
    assert is_weight(one)
    assert one.shape == (24, 6)
    assert np.array_equal(one.materialize(), dense[1])
    _, scanned = jax.lax.scan(lambda c, w: (c, w.materialize()), None, weight)
    assert np.array_equal(scanned, dense)
    assert np.array_equal(jax.vmap(lambda w: w.materialize())(weight), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_a_narrower_weight(kind):
    view = View.of((24, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1)))
    weight, dense = random_weight(kind, view=view)
    halve = lambda x: x[..., :3] if x.ndim > 1 and x.shape[-1] > 1 else x  # noqa: E731
    shard = jax.tree.map(halve, weight)
    assert shard.shape == (24, 1, 3)
    assert np.array_equal(shard.materialize(), dense[:, :3].reshape(24, 1, 3))


def test_partition_splits_codes_and_scales_but_no_table(mesh):
    weight, _ = random_weight("double", in_dim=32, out_dim=8, rows=4, cols=8)
    specs = weight.partition(PartitionSpec("data", "model"), mesh)
    assert specs.codes == PartitionSpec("data", "model")
    assert specs.table == PartitionSpec()
    assert specs.scale.codes == PartitionSpec("data", "model")
    assert specs.scale.scale == PartitionSpec(None, None)
    uneven, _ = random_weight("codebook", in_dim=24, out_dim=8, rows=3, cols=8)
    assert uneven.partition(PartitionSpec("data", None), mesh) is None  # 3 rows over 2 devices


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_function_multiplies_under_shard_map(kind, mesh):
    weight, dense = random_weight(kind, in_dim=32, out_dim=8, rows=4, cols=8)
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    split = PartitionSpec(None, "model")
    body = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split
    )
    np.testing.assert_allclose(lift(body)(jnp.asarray(x), weight), x @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_move_without_touching_the_codes(kind):
    view = View.of((24, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1)))
    weight, dense = random_weight(kind, view=view)
    moved = weight.transpose((1, 2, 0))
    assert np.array_equal(moved.materialize(), dense.reshape(24, 2, 3).transpose(1, 2, 0))
    assert np.array_equal(weight.reshape((24, 6)).materialize(), dense)
    x = jax.random.normal(jax.random.key(0), (2, 5, 24))
    y = weight.dot(x, (((2,), (0,)), ((), ())))
    np.testing.assert_allclose(
        y, np.einsum("bti,iho->btho", x, dense.reshape(24, 2, 3)), rtol=1e-5, atol=1e-5
    )
    half = weight.astype(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert np.array_equal(half.materialize(), weight.materialize().astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bits_are_equal(kind, tmp_path):
    weight, _ = random_weight(kind, stack=(2,))
    if kind == "narrow float":
        weight = dataclasses.replace(weight, scale=weight.scale.astype(jnp.float8_e8m0fnu))
    save_tree(tmp_path / "tree", {"w": weight})
    loaded = load_tree(tmp_path / "tree").tree["w"]
    assert jax.tree.structure(loaded) == jax.tree.structure(weight)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(weight), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


def test_sizes_are_true():
    weight, _ = random_weight("codebook", in_dim=128, rows=1, cols=1)
    assert weight.nbytes == 32 * 6 + 4 * 4 + 4 == leaf_bytes(weight)
    assert weight.bits_per_weight == 8 * weight.nbytes / (128 * 6)
    assert weight.group_size is None
    grouped, _ = random_weight("narrow float", rows=3)
    assert grouped.group_size == 8
    assert "group_size=8" in describe_leaf(grouped)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bits": 9}, "Codebook: bits=9 must lie between 1 and 8"),
        ({"bits": 1}, "table has shape (4,), but codes have shape (24, 6) and bits=1"),
        ({"table": jnp.ones((2, 4))}, "Its stack axes must be equal, and it has at most 2**bits"),
        ({"scale": jnp.ones((5, 6))}, "scale has shape (5, 6), but the matrix has shape (24, 6)"),
        ({"offset": jnp.ones((5, 6))}, "offset has shape (5, 6), but the matrix has shape (24, 6)"),
    ],
)
def test_fields_of_a_codebook_that_do_not_fit_are_refused(changes, words):
    fields = {"table": jnp.asarray(TABLE), "scale": jnp.ones((3, 6)), "bits": 2} | changes
    with pytest.raises(ValueError) as error:
        Codebook.from_codes(jnp.zeros((24, 6), jnp.int32), **fields)
    assert words in str(error.value)


def test_fields_of_narrow_floats_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="values are float16, not an 8-bit float"):
        NarrowFloat.from_values(jnp.zeros((4, 2), jnp.float16), jnp.ones((1, 1)))
    values = jnp.zeros((4, 2), jnp.float8_e5m2)
    with pytest.raises(ValueError, match=r"NarrowFloat: scale has shape \(3, 1\)"):
        NarrowFloat.from_values(values, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"NarrowFloat: offset has shape \(3, 1\)"):
        NarrowFloat.from_values(values, jnp.ones((1, 1)), jnp.ones((3, 1)))
