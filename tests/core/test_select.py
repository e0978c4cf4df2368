import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import kth_smallest, largest, smallest, smallest_of_leaves
from jaxweights.core._counting import Count


def oracle(scores, k, *, descending=False):
    """Marks the k smallest magnitudes by a stable sort, along axis 0 of a vector."""
    keys = np.abs(np.asarray(scores, np.float64))
    order = np.argsort(-keys if descending else keys, kind="stable")
    mask = np.zeros(len(keys), bool)
    mask[order[:k]] = True
    return mask


# From 1920 entries on, CPUs count by slices; 7091 (a prime) leaves tails on every level.
SHAPES = [(1,), (13, 5), (7091,), (50, 100), (40, 4, 40), (6000, 1)]


def scores_of(shape, kind, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal(shape),
        "ties": rng.integers(-3, 4, shape) / 4,
        "equal": np.full(shape, 0.3),
        "zero": np.where(rng.random(shape) < 0.5, -0.0, 0.0),
        "tiny": rng.standard_normal(shape) * 1e-40,
        "mixed": np.exp(40 * rng.standard_normal(shape)).clip(0, 1e38),
    }[kind]
    return jnp.asarray(values, dtype)


KINDS = ["normal", "ties", "equal", "zero", "tiny", "mixed"]


# One compilation serves all kinds of values of one shape.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pick", [smallest, largest])
def test_marks_what_a_stable_sort_puts_first(shape, pick):
    compiled = jax.jit(pick)
    for kind in KINDS:
        scores = scores_of(shape, kind)
        flat = np.asarray(scores).reshape(-1)
        for k in {0, 1, scores.size // 3, scores.size - 1, scores.size}:
            mask = np.asarray(compiled(scores, jnp.int32(k))).reshape(-1)
            expected = oracle(flat, k, descending=pick is largest)
            np.testing.assert_array_equal(mask, expected, err_msg=f"{kind}, k={k}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_kth_smallest_is_the_kth_entry_of_the_sorted_magnitudes(dtype):
    scores = scores_of((61, 97), "normal", dtype)
    ordered = np.sort(np.abs(np.asarray(scores).astype(np.float32)).reshape(-1))
    pick = jax.jit(kth_smallest)
    for k in (1, 2, 1000, 5916, 5917):
        found = pick(scores, jnp.int32(k))
        assert found.dtype == dtype
        assert float(found) == ordered[k - 1]


@pytest.mark.parametrize("shape, axis", [((9, 6), 0), ((2003, 5), 0), ((6, 2000), -1)], ids=str)
def test_along_an_axis_every_slice_is_ranked_for_itself(shape, axis):
    k = shape[axis] // 3
    pick = jax.jit(lambda scores: smallest(scores, k, axis=axis))
    for kind in KINDS:
        scores = scores_of(shape, kind)
        mask = np.moveaxis(np.asarray(pick(scores)), axis, 0)
        columns = np.moveaxis(np.asarray(scores), axis, 0)
        for column, marked in zip(columns.T, mask.T, strict=True):
            np.testing.assert_array_equal(marked, oracle(column, k))


def test_every_column_may_have_a_count_of_its_own():
    scores = scores_of((50, 4), "ties")
    k = jnp.array([0, 7, 49, 50])
    mask = smallest(scores, k, axis=0)
    np.testing.assert_array_equal(mask.sum(axis=0), k)


@pytest.mark.parametrize("traced", [False, True])
def test_leaves_ranked_together_equal_their_concatenation(traced):
    pick = jax.jit(smallest_of_leaves) if traced else smallest_of_leaves
    for kind in ("normal", "ties", "equal"):
        leaves = [scores_of(shape, kind) for shape in [(4, 3), (50, 60), (5,), (0,), (4, 3)]]
        total = sum(leaf.size for leaf in leaves)
        flat = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])
        for k in (0, total // 2, total):
            masks = pick(leaves, k)
            assert [m.shape for m in masks] == [leaf.shape for leaf in leaves]
            joined = np.concatenate([np.asarray(m).reshape(-1) for m in masks])
            np.testing.assert_array_equal(joined, oracle(flat, k))


def test_leaves_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"\['bfloat16', 'float32'\] cannot be ranked together"):
        smallest_of_leaves([jnp.ones(2), jnp.ones(2, jnp.bfloat16)], 1)


def test_jit_equals_eager_equals_vmap():
    mapped, compiled = jax.jit(jax.vmap(smallest)), jax.jit(smallest)
    k = jnp.array([0, 700, 2399])
    for kind in ("normal", "ties"):
        stacked = scores_of((3, 40, 60), kind)
        for scores, count, mask in zip(stacked, k, mapped(stacked, k), strict=True):
            np.testing.assert_array_equal(compiled(scores, count), mask)
        np.testing.assert_array_equal(smallest(stacked[1], 700), mapped(stacked, k)[1])


def test_nan_and_infinity_count_as_largest():
    scores = jnp.array([jnp.nan, 1.0, jnp.inf, -2.0])
    assert smallest(scores, 3).tolist() == [False, True, True, True]
    assert largest(scores, 1).tolist() == [True, False, False, False]


def test_an_empty_array_gives_an_empty_mask():
    assert smallest(jnp.zeros((0, 3)), 0).shape == (0, 3)


@pytest.mark.parametrize("a", [0, 65535, 65536, 2**24 + 1, 2**31 - 1, 2**32 + 3, 2**40 + 7])
@pytest.mark.parametrize("b", [0, 1, 65535, 2**24, 2**32 - 1, 2**33])
def test_counts_are_exact_beyond_32_bits(a, b):
    first, second = Count.of(a), Count.of(b)
    value = lambda c: int(c.high) * 65536 + int(c.low)  # noqa: E731
    assert value(first.plus(second)) == a + b
    assert bool(first.less(second)) == (a < b)
    if a >= b:
        assert int(first.minus(second)) == min(a - b, 2**32 - 1)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_a_sharded_leaf_gets_the_same_mask_and_keeps_its_sharding(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
    scores = scores_of((16, 16), "ties")
    placed = jax.device_put(scores, sharding)
    for axis, k in ((None, 123), (0, 7)):
        mask = smallest(placed, k, axis=axis)
        assert mask.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(mask, smallest(scores, k, axis=axis))
    assert kth_smallest(placed, 50) == kth_smallest(scores, 50)
    masks = smallest_of_leaves([placed, placed], 300)
    np.testing.assert_array_equal(masks, smallest_of_leaves([scores, scores], 300))


def test_a_sharded_leaf_that_is_counted_by_slices_gives_the_same_threshold(mesh):
    scores = scores_of((48, 48), "ties")
    placed = jax.device_put(scores, jax.NamedSharding(mesh, jax.P("data", "model")))
    assert kth_smallest(placed, 1234) == kth_smallest(scores, 1234)
