import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.sparsify import n_of_m_mask
from jaxweights.weights import (
    Axes,
    BitmaskSparse,
    Masked,
    PackedNM,
    Quantized,
    materialize,
    pack_sparse,
)


def random_masked(shape, dtype=jnp.float32, *, density=0.5):
    key_w, key_m = jax.random.split(jax.random.key(0))
    mask = jax.random.bernoulli(key_m, density, shape)
    return Masked(jax.random.normal(key_w, shape, dtype), mask)


def random_runs(in_dim, out_dim, keep, of, dtype=jnp.float32):
    weight = jax.random.normal(jax.random.key(0), (in_dim, out_dim), dtype)
    return Masked(weight, n_of_m_mask(weight, keep=keep, of=of))


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.asarray(actual).view(np.uint8), np.asarray(expected).view(np.uint8)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 1), (1, 2), (4, 20)])
def test_runs_are_given_back_bit_for_bit(keep, of, dtype):
    weight = random_runs(3 * of, 6, keep, of, dtype)
    packed = pack_sparse(weight, form="n_of_m", keep=keep, of=of)
    assert (packed.shape, packed.dtype) == (weight.shape, weight.dtype)
    assert packed.values.shape == (3 * keep, 6)
    assert_same_bits(packed.materialize(), weight.materialize())


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(16, 8), (13, 5), (1, 1), (3, 12, 7), (2, 3, 10, 4)], ids=str)
def test_any_mask_is_given_back_bit_for_bit_as_bitmask(shape, density):
    weight = random_masked(shape, density=density)
    packed = pack_sparse(weight, form="bitmask")
    fullest = int(weight.mask.sum(axis=(-2, -1)).max())
    assert packed.values.shape == (*shape[:-2], fullest)
    assert_same_bits(packed.materialize(), weight.materialize())


def test_kept_zeros_negative_zeros_and_infinities_survive():
    base = jnp.array([[-0.0, 0.0, jnp.inf, 1.0]]).T
    mask = jnp.array([[True, False, True, False]]).T
    for options in ({"form": "bitmask"}, {"form": "n_of_m", "keep": 2, "of": 4}):
        packed = pack_sparse(Masked(base, mask), **options)
        assert_same_bits(packed.materialize(), Masked(base, mask).materialize())


def test_runs_that_keep_fewer_fill_up_with_zeros():
    mask = jnp.zeros((8, 2), bool).at[3, 0].set(True)
    weight = Masked(jnp.full((8, 2), jnp.nan).at[3, 0].set(5.0), mask)
    packed = pack_sparse(weight, form="n_of_m", keep=2, of=4)
    assert packed.values.sum() == 5.0
    np.testing.assert_array_equal(packed.materialize(), weight.materialize())
    positions = packed.position_rows().reshape(2, 2, 2)
    assert (positions[:, 0] < positions[:, 1]).all()


def test_half_of_a_bfloat16_matrix_takes_nine_bits_a_weight():
    weight = random_runs(64, 16, 2, 4, jnp.bfloat16)
    runs = pack_sparse(weight, form="n_of_m", keep=2, of=4)
    bitmask = pack_sparse(weight, form="bitmask")
    assert runs.bits_per_weight == bitmask.bits_per_weight == 9.0
    arrays = jax.tree.leaves(runs)
    assert runs.nbytes == sum(np.asarray(x).nbytes for x in arrays) == 64 * 16 * 9 // 8


@pytest.mark.parametrize("form", ["n_of_m", "bitmask"])
def test_layouts_stacks_and_slices_go_through(form):
    shape, axes = (3, 8, 2, 5), Axes(inputs=(-3,), outputs=(-2, -1))
    base = jax.random.normal(jax.random.key(0), shape)
    matrix_mask = jax.vmap(lambda w: n_of_m_mask(w, keep=2, of=4))(base.reshape(3, 8, 10))
    weight = Masked(base, matrix_mask.reshape(shape))
    options = {"keep": 2, "of": 4} if form == "n_of_m" else {}
    packed = pack_sparse(weight, form=form, axes=axes, **options)
    dense = weight.materialize()
    assert packed.stack_shape == (3,)
    assert_same_bits(packed.materialize(), dense)
    _, slices = jax.lax.scan(lambda c, w: (c, w.unstacked().materialize()), None, packed)
    assert_same_bits(slices, dense)
    assert_same_bits(jax.vmap(lambda w: w.materialize())(packed), dense)
    assert_same_bits(packed.transpose((0, 3, 2, 1)).materialize(), dense.transpose(0, 3, 2, 1))
    assert_same_bits(packed.astype(jnp.bfloat16).materialize(), dense.astype(jnp.bfloat16))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    one = jax.tree.map(lambda field: field[0], packed)
    y = one.dot(x, (((1,), (0,)), ((), ())))
    # One product of 8 terms in float32.
    np.testing.assert_allclose(y, jnp.einsum("td,dhk->thk", x, dense[0]), rtol=1e-5, atol=1e-6)


def test_packing_and_unpacking_work_under_jit_and_on_abstract_values():
    weight = random_runs(8, 4, 2, 4)
    for options in ({"form": "n_of_m", "keep": 2, "of": 4}, {"form": "bitmask", "capacity": 20}):
        pack = functools.partial(pack_sparse, **options)
        packed = jax.jit(pack)(weight)
        assert_same_bits(jax.jit(materialize)(packed), weight.materialize())
        abstract = jax.eval_shape(pack, weight)
        assert isinstance(abstract, PackedNM | BitmaskSparse)
        assert jax.eval_shape(materialize, abstract).shape == weight.shape


def test_gradients_reach_the_kept_values_only():
    weight = random_masked((6, 5))
    packed = pack_sparse(weight, form="bitmask")
    loss = lambda values: (BitmaskSparse(values, packed.bits, packed.view).materialize() ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(packed.values), 2 * packed.values)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"form": "csr"}, "form='csr' must be 'n_of_m' or 'bitmask'"),
        ({"form": "n_of_m"}, "keep=None, of=None: form='n_of_m' needs 1 <= keep <= of"),
        ({"form": "n_of_m", "keep": 3, "of": 2}, "keep counts the weights that stay"),
        ({"form": "n_of_m", "keep": 1, "of": 5}, "input axis 8 is not divisible by of=5"),
        ({"form": "n_of_m", "keep": 1, "of": 4}, "keeps 2 weights, more than keep=1"),
        ({"form": "bitmask", "keep": 1, "of": 4}, "keep and of belong to form='n_of_m'"),
        ({"form": "bitmask", "capacity": 3}, "keeps 16 weights, more than capacity=3"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        pack_sparse(random_runs(8, 4, 2, 4), **options)


def test_a_quantized_base_and_a_traced_bitmask_are_refused():
    codes = Quantized.from_codes(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)), bits=4)
    with pytest.raises(TypeError, match="got a Quantized"):
        pack_sparse(Masked(codes, jnp.ones((4, 2), bool)), form="bitmask")
    with pytest.raises(ValueError, match="mask is traced"):
        jax.jit(lambda w: pack_sparse(w, form="bitmask"))(random_masked((4, 2)))
