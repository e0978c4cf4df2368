import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.weights import Axes, Quantized, View, Weight
from jaxweights.weights._packed_codes import codes_per_byte, pack_codes, unpack_codes


def random_quantized(
    *, bits=4, stack=(), in_dim=12, out_dim=6, rows=3, cols=6, affine=False, view=None, seed=0
):
    """A random weight, its codes, scales, and zero points (`affine=True`) or offsets ("offset")."""
    rng = np.random.default_rng(seed)
    low, high = (0, 2**bits) if affine else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = rng.integers(low, high, (*stack, in_dim, out_dim))
    scale = rng.uniform(0.5, 2, (*stack, rows, cols)).astype(np.float32)
    zero = offset = None
    if affine == "offset":
        offset = rng.normal(size=scale.shape).astype(np.float32)
    elif affine:
        zero = rng.integers(0, 2**bits, scale.shape).astype(np.uint8)
    weight = Quantized.from_codes(
        jnp.asarray(codes, jnp.int32),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero),
        offset=None if offset is None else jnp.asarray(offset),
        bits=bits,
        view=view,
    )
    return weight, codes, scale, zero if offset is None else offset


def dense_by_loops(codes, scale, zero):
    """The class's equation, entry by entry, of one matrix."""
    in_dim, out_dim = codes.shape
    rows, cols = scale.shape
    dense = np.zeros(codes.shape, np.float32)
    for i in range(in_dim):
        for o in range(out_dim):
            r, c = i // (in_dim // rows), o // (out_dim // cols)
            if zero is not None and zero.dtype == np.float32:
                # The product is rounded once, or not at all where it is fused with the sum.
                dense[i, o] = codes[i, o] * np.float64(scale[r, c]) + np.float64(zero[r, c])
            else:
                shift = 0 if zero is None else int(zero[r, c])
                dense[i, o] = np.float32(int(codes[i, o]) - shift) * scale[r, c]
    return dense


GRANULARITIES = [(1, 1), (1, 6), (3, 6), (12, 6), (3, 1), (4, 3), (1, 2)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed, in_dim", [(True, 5), (True, 8), (False, 6), (False, 8)])
def test_packing_loses_nothing(bits, signed, in_dim):
    low = -(2 ** (bits - 1)) if signed else 0
    every = np.arange(low, low + 2**bits)
    codes = np.resize(every, (2, in_dim, 2**bits))  # every code in every row, hence in every field
    per_byte = codes_per_byte(bits, in_dim)
    packed = pack_codes(jnp.asarray(codes, jnp.int32), per_byte, signed=signed)
    assert packed.dtype == (jnp.int8 if signed and per_byte == 1 else jnp.uint8)
    assert packed.shape == (2, in_dim // per_byte, 2**bits)
    assert np.array_equal(unpack_codes(packed, per_byte, signed=signed), codes)


def test_the_lower_row_lies_in_the_lower_bits():
    nibbles = pack_codes(jnp.array([[0x3], [-2]]), 2, signed=True)
    assert nibbles.tolist() == [[0xE3]]
    crumbs = pack_codes(jnp.array([[0], [1], [2], [3]]), 4, signed=False)
    assert crumbs.tolist() == [[0b11100100]]


@pytest.mark.parametrize("bits, in_dim, expected", [(2, 8, 4), (2, 6, 2), (2, 5, 1), (3, 8, 2)])
def test_narrow_codes_share_bytes_as_the_input_axis_allows(bits, in_dim, expected):
    assert codes_per_byte(bits, in_dim) == expected


@pytest.mark.parametrize("affine", [False, True, "offset"])
@pytest.mark.parametrize("rows, cols", GRANULARITIES)
def test_the_dense_weight_follows_the_equation(rows, cols, affine):
    weight, *parts = random_quantized(rows=rows, cols=cols, affine=affine)
    error = np.abs(weight.materialize() - dense_by_loops(*parts))
    # With offsets a product of at most 15 * 2 is rounded once more, to 2**-24 of it.
    assert np.all(error <= (2**-19 if affine == "offset" else 0))
    assert np.array_equal(weight.codes_matrix(), parts[0])


@pytest.mark.parametrize("bits, affine", [(2, True), (4, False), (8, True), (4, "offset")])
@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 6), (3, 6), (4, 3), (1, 2)])
def test_products_equal_those_of_the_dense_weight(rows, cols, bits, affine):
    weight, *parts = random_quantized(rows=rows, cols=cols, bits=bits, affine=affine)
    dense = dense_by_loops(*parts).astype(np.float64)
    x = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    z = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    # A dozen float32 products of this size round by a few 1e-7 of the sum of their magnitudes.
    for ours, left, right in (
        (weight.multiply(jnp.asarray(x)), x, dense),
        (weight.multiply_transposed(jnp.asarray(z)), z, dense.T),
    ):
        bound = 1e-6 * (np.abs(left) @ np.abs(right)) + 1e-6
        assert np.all(np.abs(ours - left @ right) <= bound)


def test_bfloat16_products_accumulate_in_float32():
    codes = jnp.ones((4096, 1), jnp.int32)
    weight = Quantized.from_codes(codes, jnp.ones((1, 1)), bits=8, dtype=jnp.bfloat16)
    y = weight.multiply(jnp.ones((1, 4096), jnp.bfloat16), preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == 4096  # a bfloat16 sum stops growing at 256
    assert weight.multiply(jnp.ones((1, 4096), jnp.bfloat16)).dtype == jnp.bfloat16


def test_scales_per_output_multiply_the_product_and_not_the_weight():
    weight, *_ = random_quantized(rows=1, cols=6)
    program = str(jax.make_jaxpr(lambda x: weight.multiply(x))(jnp.ones((5, 12))))
    # The only multiplication has the result's shape: the integers meet activations unscaled.
    assert [
        line.split("=")[0].split(":")[1].strip() for line in program.splitlines() if " mul " in line
    ] == ["f32[5,6]"]


@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 6), (4, 3)])
@pytest.mark.parametrize("affine", [False, True, "offset"])
def test_columns_are_columns_and_an_index_out_of_range_gives_nan(rows, cols, affine):
    weight, *parts = random_quantized(rows=rows, cols=cols, affine=affine)
    found = weight.columns(jnp.array([5, 0, 0, -1, 6, -7]))
    dense = dense_by_loops(*parts)
    np.testing.assert_allclose(found[:4], dense.T[[5, 0, 0, -1]], rtol=0, atol=2**-19)
    assert np.isnan(found[4:]).all()


def test_an_embedding_looks_up_its_rows():
    view = View.of((6, 12), Axes(inputs=(-1,), outputs=(-2,), kind="embedding"))
    weight, *parts = random_quantized(view=view)
    table = dense_by_loops(*parts).T
    assert weight.shape == (6, 12)
    assert np.array_equal(weight.materialize(), table)
    indices = jnp.array([[0, 5], [2, 2]])
    assert np.array_equal(weight.take(indices), table[np.asarray(indices)])


def test_group_index_says_which_scales_a_row_reads():
    weight, codes, scale, _ = random_quantized(rows=3, cols=6)
    index = np.array([2, 0, 1, 1, 2, 0, 0, 2, 1, 0, 1, 2], np.int32)
    scattered = dataclasses.replace(weight, group_index=jnp.asarray(index))
    expected = codes.astype(np.float32) * scale[index]
    assert np.array_equal(scattered.materialize(), expected)
    assert np.array_equal(scattered.columns(jnp.array([3])), expected[:, 3:4].T)
    x = jax.random.normal(jax.random.key(0), (2, 12))
    np.testing.assert_allclose(scattered.multiply(x), x @ expected, rtol=1e-5, atol=1e-5)


def short(affine=False, stack=()):
    """A weight of 13 inputs in groups of 5, 5 and 3, and its dense matrices by the equation."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (*stack, 13, 6)) - (0 if affine else 8)
    scale = rng.uniform(0.5, 2, (*stack, 3, 6)).astype(np.float32)
    fields, shift = {}, np.zeros_like(scale)
    if affine == "offset":
        shift = rng.normal(size=scale.shape).astype(np.float32)
        fields["offset"] = jnp.asarray(shift)
    elif affine:
        zero = rng.integers(0, 16, scale.shape)
        fields["zero_point"], shift = jnp.asarray(zero, jnp.uint8), -zero * scale
    codes_of = jnp.asarray(codes, jnp.int32)
    weight = Quantized.from_codes(codes_of, jnp.asarray(scale), bits=4, full_group=5, **fields)
    of_row = np.arange(13) // 5
    return weight, codes * scale[..., of_row, :].astype(np.float64) + shift[..., of_row, :]


@pytest.mark.parametrize("affine", [False, True, "offset"])
def test_the_last_group_may_be_shorter(affine):
    weight, dense = short(affine)
    np.testing.assert_allclose(weight.materialize(), dense, rtol=0, atol=2**-17)
    np.testing.assert_allclose(weight.columns(jnp.array([3])), dense[:, 3:4].T, atol=2**-17)
    x = jax.random.normal(jax.random.key(0), (2, 13))
    z = jax.random.normal(jax.random.key(1), (2, 6))
    np.testing.assert_allclose(weight.multiply(x), x @ dense, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(weight.multiply_transposed(z), z @ dense.T, rtol=1e-5, atol=1e-4)
    assert weight.group_size == 5
    assert "group_size=5, codes" in repr(weight)


def test_a_stack_of_weights_whose_last_group_is_shorter_is_sliced_and_mapped():
    weight, dense = short(True, stack=(2,))
    np.testing.assert_allclose(weight.materialize(), dense, rtol=0, atol=2**-17)
    one = jax.tree.map(lambda field: field[1], weight)
    np.testing.assert_allclose(one.materialize(), dense[1], rtol=0, atol=2**-17)
    mapped = jax.vmap(lambda weight: weight.materialize())(weight)
    np.testing.assert_array_equal(mapped, weight.materialize())


def test_a_weight_whose_last_group_is_shorter_is_split_by_outputs_only():
    weight, _ = short()
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    assert weight.partition(spec("x", None), mesh) is None
    assert weight.partition(spec(None, "x"), mesh).scale == spec(None, "x")


def test_scales_that_fit_no_shorter_last_group_are_refused():
    codes, scale = jnp.zeros((12, 6), jnp.int32), jnp.ones((3, 6))
    words = "full_group=5 makes no 2 groups of 12 inputs of which the last is shorter. Pass 0"
    with pytest.raises(ValueError, match=words):
        Quantized.from_codes(codes, scale[:2], bits=4, full_group=5)
    with pytest.raises(ValueError, match="full_group=4 makes no 3 groups of 12 inputs"):
        Quantized.from_codes(codes, scale, bits=4, full_group=4)
    with pytest.raises(ValueError, match=r"scale has shape \(5, 6\), but the matrix has shape"):
        Quantized.from_codes(codes, jnp.ones((5, 6)), bits=4)


def test_an_offset_is_the_value_of_code_zero_in_any_order_of_groups():
    weight, codes, scale, offset = random_quantized(rows=3, cols=6, affine="offset", in_dim=12)
    assert weight.codes_matrix().dtype == jnp.uint8
    zeros = Quantized.from_codes(
        jnp.zeros((12, 6), jnp.int32), weight.scale, bits=4, offset=weight.offset
    )
    assert np.array_equal(zeros.materialize(), np.repeat(offset, 4, axis=0))
    index = np.array([2, 0, 1, 1, 2, 0, 0, 2, 1, 0, 1, 2], np.int32)
    scattered = dataclasses.replace(weight, group_index=jnp.asarray(index))
    expected = codes.astype(np.float32) * scale[index] + offset[index]
    np.testing.assert_allclose(scattered.materialize(), expected, rtol=0, atol=2**-19)


def test_a_zero_point_and_the_offset_that_it_stands_for_give_one_weight():
    _, codes, scale, zero = random_quantized(affine=True)
    scale = np.exp2(np.round(np.log2(scale)))  # so that no product is rounded
    shared = {"bits": 4, "codes": jnp.asarray(codes, jnp.int32), "scale": jnp.asarray(scale)}
    integer = Quantized.from_codes(zero_point=jnp.asarray(zero), **shared)
    floating = Quantized.from_codes(offset=jnp.asarray(-zero.astype(np.float32) * scale), **shared)
    assert np.array_equal(integer.materialize(), floating.materialize())
    assert np.array_equal(integer.codes, floating.codes)


def test_a_weight_with_offsets_is_split_over_devices_as_its_groups_are():
    weight, *_ = random_quantized(in_dim=16, rows=4, affine="offset")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    specs = weight.partition(jax.sharding.PartitionSpec("x"), mesh)
    assert specs.offset == specs.scale == jax.sharding.PartitionSpec("x", None)


def test_astype_changes_the_dtype_and_keeps_the_integers():
    weight, *_ = random_quantized()
    half = weight.astype(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert half.codes is weight.codes
    assert np.array_equal(half.materialize(), weight.materialize().astype(jnp.bfloat16))


@pytest.mark.parametrize("affine", [False, True, "offset"])
def test_a_slice_of_a_stack_is_a_weight(affine):
    weight, codes, scale, zero = random_quantized(stack=(3,), affine=affine)
    assert weight.shape == (3, 12, 6)
    assert weight.stack_shape == (3,)
    one = jax.tree.map(lambda x: x[1], weight)
    expected = dense_by_loops(codes[1], scale[1], None if zero is None else zero[1])
    assert isinstance(one, Weight)
    assert one.shape == (12, 6)
    np.testing.assert_allclose(one.materialize(), expected, rtol=0, atol=2**-19)
    mapped = jax.vmap(lambda w: w.materialize())(weight)
    assert np.array_equal(mapped, weight.materialize())
    _, scanned = jax.lax.scan(lambda c, w: (c, w.materialize()), None, weight)
    assert np.array_equal(scanned, weight.materialize())
    x = jax.random.normal(jax.random.key(0), (3, 5, 12))
    np.testing.assert_allclose(
        weight.multiply(x), jnp.matmul(x, weight.materialize()), rtol=1e-5, atol=1e-5
    )


def test_a_shard_is_a_narrower_weight():
    # What shard_map hands to its body: the same metadata, a part of every array.
    view = View.of((12, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1)))
    weight, *_ = random_quantized(view=view)
    half = lambda x: x[:, :3]  # noqa: E731
    shard = jax.tree.map(half, weight)
    assert shard.shape == (12, 1, 3)
    assert np.array_equal(shard.materialize(), weight.materialize()[:, :1])
    x = jax.random.normal(jax.random.key(0), (4, 12))
    y = shard.dot(x, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(
        y, jnp.einsum("ti,iho->tho", x, weight.materialize()[:, :1]), rtol=1e-5, atol=1e-5
    )
    rows = jax.tree.map(lambda x: x[: x.shape[0] // 3], weight)
    assert rows.shape == (4, 2, 3)
    assert np.array_equal(rows.materialize(), weight.materialize()[:4])


def test_dot_follows_the_leafs_own_axes():
    view = View.of((12, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1)))
    weight, *_ = random_quantized(view=view)
    dense = weight.materialize()
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    y = weight.dot(x, (((2,), (0,)), ((), ())))
    np.testing.assert_allclose(y, jnp.einsum("bti,iho->btho", x, dense), rtol=1e-5, atol=1e-5)
    z = jax.random.normal(jax.random.key(1), (5, 2, 3))
    back = weight.dot(z, (((1, 2), (1, 2)), ((), ())))
    np.testing.assert_allclose(back, jnp.einsum("tho,iho->ti", z, dense), rtol=1e-5, atol=1e-5)
    moved = weight.transpose((1, 2, 0))
    assert moved is not None
    assert np.array_equal(moved.materialize(), dense.transpose(1, 2, 0))
    flat = weight.reshape((12, 6))
    assert flat is not None
    assert np.array_equal(flat.materialize(), dense.reshape(12, 6))


def test_sizes_are_true():
    weight, *_ = random_quantized(in_dim=128, out_dim=8, rows=1, cols=8)
    assert weight.nbytes == 64 * 8 + 4 * 8
    assert weight.bits_per_weight == 4.25
    assert weight.group_size is None
    assert random_quantized(rows=3)[0].group_size == 4
    offset, *_ = random_quantized(in_dim=128, out_dim=8, rows=1, cols=8, affine="offset")
    assert offset.nbytes == 64 * 8 + 2 * 4 * 8


def test_abstract_evaluation_and_jit_go_through():
    weight, *_ = random_quantized(affine=True)
    shape = jax.eval_shape(lambda w: w.materialize(), weight)
    assert (shape.shape, shape.dtype) == ((12, 6), jnp.float32)
    again = jax.jit(lambda w: w)(weight)
    assert np.array_equal(again.materialize(), weight.materialize())
    assert again.view == weight.view


@pytest.mark.parametrize(
    "scale, zero, bits, words",
    [
        ((5, 6), None, 4, "scale has shape (5, 6), but the matrix has shape (12, 6)"),
        ((2, 3, 6), None, 4, "stack axes must be equal"),
        ((3, 6), (1, 6), 4, "zero_point has shape (1, 6), but scale has (3, 6)"),
        ((3, 6), None, 9, "bits=9 must lie between 2 and 8"),
    ],
)
def test_fields_that_do_not_fit_are_refused(scale, zero, bits, words):
    codes = jnp.zeros((12, 6), jnp.int32)
    zero = None if zero is None else jnp.zeros(zero, jnp.uint8)
    with pytest.raises(ValueError) as error:
        Quantized.from_codes(codes, jnp.ones(scale), zero, bits=bits)
    assert words in str(error.value)


def test_an_offset_is_refused_beside_a_zero_point_or_in_another_shape():
    codes, scale = jnp.zeros((12, 6), jnp.int32), jnp.ones((3, 6))
    with pytest.raises(ValueError, match=r"offset has shape \(1, 6\), but scale has \(3, 6\)"):
        Quantized.from_codes(codes, scale, bits=4, offset=jnp.ones((1, 6)))
    zero = jnp.zeros((3, 6), jnp.uint8)
    with pytest.raises(ValueError, match=r"zero_point and offset are both given.*give one of the"):
        Quantized.from_codes(codes, scale, zero, bits=4, offset=scale)


@pytest.mark.parametrize("group_size", [None, 8])
def test_a_weight_whose_mesh_axes_are_explicit_is_multiplied_as_on_one_device(group_size):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    tx = jw.quantize.round_to_nearest(bits=4, group_size=group_size)
    weight = jax.random.normal(jax.random.key(0), (32, 16))
    x = jax.random.normal(jax.random.key(1), (4, 32))
    product = jax.jit(jw.lift(lambda params, x: x @ params["w"]))
    expected = product(jw.apply(tx, {"w": weight}), x)
    sharded = jw.apply(tx, {"w": place(weight, None, "m")})
    with jax.set_mesh(mesh):
        assert jnp.allclose(product(sharded, place(x)), expected, atol=1e-5)
