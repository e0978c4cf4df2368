"""Products, lookups and rearrangements of represented weights equal those of the dense ones."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxweights.lift import lift
from jaxweights.weights import CONV_HWIO, EMBEDDING, Axes, materialize
from tests.lift._weights import (
    REPRESENTATIONS,
    Opaque,
    assert_same,
    int8,
    low_rank,
    masked,
    normal,
)

LAZY = {"int8": int8, "low_rank": low_rank}


def check(fn, weight, *args, lazy=True, tolerance=2e-5):
    """Compares with the dense weight; where a rule is promised, nothing may be materialised."""
    lifted = lift(fn, on_materialize="error" if lazy else "ok")

    @jax.jit  # both in one program: what these tests cost is compilation
    def both(weight, *args):
        return lifted(weight, *args), fn(materialize(weight), *args)

    actual, expected = both(weight, *args)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert_same(actual, expected, tolerance)


# Shape and axes of weights: plain, stacked, heads on either side, stack in the middle, transposed.
WEIGHTS = [
    ((4, 3), Axes()),
    ((4, 3), Axes(inputs=(-1,), outputs=(-2,))),
    ((2, 4, 3), Axes()),
    ((4, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1))),
    ((2, 3, 4), Axes(inputs=(-3, -2), outputs=(-1,))),
    ((2, 3, 4), Axes(inputs=(-2, -3), outputs=(-1,))),
    ((4, 5, 3), Axes(inputs=(-3,), outputs=(-1,))),
    ((2, 4, 5, 3), Axes(inputs=(-3, -2), outputs=(-1,))),
    ((5, 2, 4, 3), Axes()),
]


def products(seed):
    """Dimension numbers and activations that contract all inputs, or all outputs, of a weight."""
    rng = np.random.default_rng(seed)
    shape, axes = WEIGHTS[seed % len(WEIGHTS)]
    ndim = len(shape)
    side = axes.inputs if seed // len(WEIGHTS) % 2 == 0 else axes.outputs
    contract = list(rng.permutation([a % ndim for a in side]))
    stack = [a for a in range(ndim) if a - ndim not in (*axes.inputs, *axes.outputs)]
    batch = list(rng.permutation(stack))
    free = [int(n) for n in rng.choice([1, 2, 6], size=rng.integers(0, 3))]
    roles = [*(("w", int(a)) for a in (*contract, *batch)), *(("free", n) for n in free)]
    order = rng.permutation(len(roles))
    x_shape = [shape[roles[i][1]] if roles[i][0] == "w" else roles[i][1] for i in order]
    where = {roles[i]: position for position, i in enumerate(order) if roles[i][0] == "w"}
    numbers = (
        (tuple(where["w", int(a)] for a in contract), tuple(map(int, contract))),
        (tuple(where["w", int(a)] for a in batch), tuple(map(int, batch))),
    )
    return shape, axes, tuple(x_shape), numbers


@pytest.mark.parametrize("seed", range(4 * len(WEIGHTS)))
def test_dot_general_takes_any_dimension_numbers_on_either_side(seed):
    weight_first = seed >= 2 * len(WEIGHTS)
    shape, axes, x_shape, numbers = products(seed)
    represent = (int8, low_rank, masked)[seed % 3]
    (x_contract, w_contract), (x_batch, w_batch) = numbers

    def fn(w, x):
        if weight_first:
            flipped = ((w_contract, x_contract), (w_batch, x_batch))
            return jax.lax.dot_general(w, x, flipped)
        return jax.lax.dot_general(x, w, numbers)

    weight = represent(normal(seed, *shape), axes)
    check(fn, weight, normal(seed + 1, *x_shape), lazy=represent is not masked)


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize(
    "numbers",
    [
        (((0,), (0,)), ((), ())),  # cuts the stack
        (((1,), (1,)), ((), ())),  # stack is no batch axis
        (((), ()), ((), ())),  # outer product
        (((0, 1), (0, 1)), ((), ())),
        (((0, 1, 2), (0, 1, 2)), ((), ())),
        (((2,), (2,)), ((0, 1), (0, 1))),  # inputs as batch axes
    ],
)
def test_contractions_that_are_no_matrix_product_still_give_the_dense_answer(numbers, weight_first):
    def fn(w, x):
        return jax.lax.dot_general(*((w, x) if weight_first else (x, w)), numbers)

    for represent in REPRESENTATIONS.values():
        check(fn, represent(normal(0, 2, 4, 3)), normal(1, 2, 4, 3), lazy=False)


@pytest.mark.parametrize(
    "equation, shape, axes, x_shape",
    [
        ("td,dhe->the", (4, 2, 3), Axes((-3,), (-2, -1)), (5, 4)),
        ("the,hed->td", (2, 3, 4), Axes((-3, -2), (-1,)), (5, 2, 3)),
        ("etd,edf->etf", (3, 4, 5), Axes(), (3, 2, 4)),
        ("btd,vd->btv", (7, 4), EMBEDDING, (2, 3, 4)),
        ("ted,edf->tef", (3, 4, 5), Axes(), (2, 3, 4)),
        ("td,edf->etf", (3, 4, 5), Axes(), (2, 4)),  # every expert sees the same input
        ("etd,ledf->letf", (2, 3, 4, 5), Axes(), (3, 2, 4)),
        ("tf,edf->etd", (3, 4, 5), Axes(), (2, 5)),
    ],
)
@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
def test_einsum_reaches_the_lazy_rule(represent, equation, shape, axes, x_shape):
    weight = represent(normal(0, *shape), axes)
    check(lambda w, x: jnp.einsum(equation, x, w), weight, normal(1, *x_shape))


def test_two_weights_may_meet_in_one_product():
    fn = lambda w, v: w @ v  # noqa: E731
    w, v = int8(normal(0, 4, 3)), int8(normal(1, 3, 5))
    assert_same(lift(fn)(w, v), materialize(w) @ materialize(v))
    assert_same(lift(lambda w: w.T @ w)(w), materialize(w).T @ materialize(w))


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16_products_accumulate_and_return_as_the_dense_ones_do(preferred):
    def fn(w, x):
        numbers = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, w, numbers, preferred_element_type=preferred)

    for represent in LAZY.values():
        weight = represent(normal(0, 32, 8, dtype=jnp.bfloat16))
        # The dense weight is rounded to bfloat16 once more, by 2**-9 of each entry.
        check(fn, weight, normal(1, 4, 32, dtype=jnp.bfloat16), tolerance=0.06)


@pytest.mark.parametrize("sizes", [(2, 3, 1), (0, 6, 0), (1, 1, 1)])
def test_ragged_dot_gives_each_group_of_rows_its_expert(sizes):
    fn = lambda w, x, sizes: jax.lax.ragged_dot(x, w, sizes)  # noqa: E731
    args = (normal(1, 6, 4), jnp.array(sizes, jnp.int32))
    check(fn, low_rank(normal(0, 3, 4, 5), base=lambda leaf, axes: leaf), *args)
    check(fn, int8(normal(0, 3, 4, 5)), *args, lazy=False)


@pytest.mark.parametrize("strides, padding", [((1, 1), "SAME"), ((2, 1), "VALID")])
def test_convolution_equals_the_dense_one(strides, padding):
    def fn(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers)

    kernel, x = normal(0, 3, 2, 4, 5), normal(1, 2, 6, 7, 4)
    check(fn, low_rank(kernel, CONV_HWIO, base=lambda leaf, axes: leaf), x)
    check(fn, int8(kernel, CONV_HWIO), x, lazy=False)


IDS = jnp.array([[0, 6, 3], [-1, 7, -8]])  # the last three: from the end, beyond either end


@pytest.mark.parametrize(
    "lookup",
    [
        lambda w, ids: w[ids],
        lambda w, ids: jnp.take(w, ids, axis=0),
        lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"),
        lambda w, ids: jnp.take(w, ids, axis=0, mode="wrap"),
        lambda w, ids: jnp.take(w, ids, axis=0, mode="fill", fill_value=-3),
        lambda w, ids: w.at[ids].get(mode="promise_in_bounds"),
        lambda w, ids: w[ids[0, 1]],
        lambda w, ids: jax.vmap(lambda i: w[i])(ids[0]),
        lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids),
    ],
)
@pytest.mark.parametrize("represent", [int8, low_rank], ids=["int8", "low_rank"])
def test_lookup_of_rows_follows_the_mode_out_of_bounds(represent, lookup):
    check(lookup, represent(normal(0, 7, 4), EMBEDDING), IDS)


@pytest.mark.parametrize("represent", REPRESENTATIONS.values(), ids=REPRESENTATIONS)
def test_lookup_of_rows_of_a_kernel_or_of_columns_gives_the_dense_answer(represent):
    weight = represent(normal(0, 7, 4))
    check(lambda w, ids: w[ids], weight, IDS, lazy=False)
    check(lambda w, ids: w[:, ids], weight, IDS, lazy=False)
    check(lambda w, ids: w[ids, ids], weight, IDS, lazy=False)


def test_expert_choice_by_a_gather_of_matrices_stays_lazy():
    fn = lambda w, x, chosen: jnp.einsum("td,tdf->tf", x, w[chosen])  # noqa: E731
    chosen = jnp.array([2, 0, 2, 1])
    fn_clip = lambda w, x, c: jnp.einsum(  # noqa: E731
        "td,tdf->tf", x, jnp.take(w, c, axis=0, mode="clip")
    )
    for represent in LAZY.values():
        check(fn, represent(normal(0, 3, 4, 5)), normal(1, 4, 4), chosen, lazy=False)
        check(fn_clip, represent(normal(0, 3, 4, 5)), normal(1, 4, 4), chosen)


@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
def test_transpose_squeeze_and_cast_stay_lazy(represent):
    weight = represent(normal(0, 6, 4))
    check(lambda w, x: x @ w.T, weight, normal(1, 5, 4))
    check(lambda w, x: x @ jnp.swapaxes(w, 0, 1), weight, normal(1, 5, 4))
    check(
        lambda w, x: x @ w.astype(jnp.bfloat16),
        weight,
        normal(1, 5, 6, dtype=jnp.bfloat16),
        tolerance=0.1,
    )
    check(lambda w, x: x @ jnp.squeeze(w, 0), represent(normal(0, 1, 6, 4)), normal(1, 5, 6))


@pytest.mark.parametrize(
    "shape, axes, new_shape, equation, x_shape",
    [
        ((4, 6), Axes(), (4, 2, 3), "td,dhe->the", (5, 4)),  # a kernel splits into heads
        ((6, 4), Axes(), (2, 3, 4), "the,hed->td", (5, 2, 3)),
        ((4, 2, 3), Axes((-3,), (-2, -1)), (4, 6), "td,de->te", (5, 4)),
        ((2, 3, 4), Axes((-3, -2), (-1,)), (6, 4), "td,de->te", (5, 6)),
        ((7, 4, 6), Axes(), (7, 4, 2, 3), "ltd,ldhe->lthe", (7, 5, 4)),
    ],
)
@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
def test_reshape_that_keeps_the_matrix_stays_lazy(
    represent, shape, axes, new_shape, equation, x_shape
):
    weight = represent(normal(0, *shape), axes)
    check(lambda w, x: jnp.einsum(equation, x, w.reshape(new_shape)), weight, normal(1, *x_shape))


def test_reshape_that_mixes_inputs_and_outputs_gives_the_dense_answer():
    for represent in REPRESENTATIONS.values():
        check(
            lambda w, x: x @ w.reshape(3, 8),
            represent(normal(0, 6, 4)),
            normal(1, 5, 3),
            lazy=False,
        )


LAYERS = [
    lambda w, i, x: x @ w[1],
    lambda w, i, x: x @ w[-1],
    lambda w, i, x: x @ w[i],
    lambda w, i, x: x @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False),
    lambda w, i, x: x @ w[1:3][i],
    lambda w, i, x: x @ jax.lax.dynamic_slice_in_dim(w, i, 2, 0)[1],
    lambda w, i, x: x @ w[::2][1],
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
def test_layer_slices_stay_lazy_with_static_and_traced_indices(represent, layer):
    check(layer, represent(normal(0, 3, 6, 4)), jnp.int32(1), normal(1, 5, 6))


def test_marks_and_barriers_pass_weights_on():
    def fn(w, x):
        x, w = jax.lax.optimization_barrier((x, checkpoint_name(w, "kernel")))
        return x @ jax.lax.stop_gradient(jnp.copy(w))

    for represent in LAZY.values():
        check(fn, represent(normal(0, 6, 4)), normal(1, 5, 6))
    weight, x = low_rank(normal(0, 6, 4)), normal(1, 5, 6)
    loss = lambda up: jnp.sum(lift(fn)(dataclasses.replace(weight, up=up), x))  # noqa: E731
    assert not np.any(jax.grad(loss)(weight.up))


def test_casts_that_round_to_eight_bits_do_round():
    fn = lambda w: w.astype(jnp.float8_e4m3fn).astype(jnp.float32)  # noqa: E731
    check(fn, int8(normal(0, 6, 4)), lazy=False, tolerance=0)


def test_weights_without_rules_become_dense_in_every_primitive():
    weight, x = Opaque(normal(0, 3, 4)), normal(1, 5, 3)
    for fn in (
        lambda w, x: x @ w,
        lambda w, x: (w.T @ x.T).T,
        lambda w, x: jnp.sin(w).sum() + x,
        lambda w, x: w.reshape(12)[:5, None] + x,
        lambda w, x: w.astype(jnp.bfloat16),
        lambda w, x: w[1:2],
        lambda w, x: w[jnp.array([0, 2])],
    ):
        with jax.numpy_rank_promotion("allow"):
            check(fn, weight, x, lazy=False)


def test_axes_permutations_of_a_stack_are_exact():
    for order in itertools.permutations(range(3)):
        for represent in REPRESENTATIONS.values():
            weight = represent(normal(0, 2, 4, 3))
            check(lambda w, order=order: jnp.transpose(w, order) * 2, weight, lazy=False)
