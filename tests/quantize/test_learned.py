import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, Stats, apply
from jaxweights.quantize import (
    adaround,
    auto_round,
    learned_clip,
    nupes,
    output_error,
    round_to_nearest,
)
from jaxweights.quantize._learned import clip_through, output_losses
from jaxweights.weights import Axes, Codebook, Masked, Quantized

# Few steps with large rates: what is learned shows, and the tests stay short.
METHODS = {
    "adaround": lambda bits=3, **k: adaround(
        bits=bits, group_size=16, steps=150, learning_rate=0.05, search="absmax", **k
    ),
    "auto_round": lambda bits=3, **k: auto_round(bits=bits, group_size=16, steps=60, **k),
    "learned_clip": lambda bits=3, **k: learned_clip(
        bits=bits, group_size=16, steps=60, learning_rate=0.1, **k
    ),
    "nupes": lambda bits=3, **k: nupes(
        bits=bits, group_size=16, steps=60, learning_rate=0.02, exponent_rate=0.01, **k
    ),
}
# What each starts from and never does worse than.
PLAIN = {
    "adaround": lambda bits=3: round_to_nearest(bits=bits, group_size=16, grid="affine"),
    "auto_round": lambda bits=3: round_to_nearest(bits=bits, group_size=16, grid="affine"),
    "learned_clip": lambda bits=3: round_to_nearest(bits=bits, group_size=16, grid="affine"),
    "nupes": lambda bits=3: round_to_nearest(bits=bits, group_size=16, grid="narrow"),
}
methods = pytest.mark.parametrize("name", list(METHODS))


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(128, 8)) @ rng.normal(size=(8, 32)) + 0.3 * rng.normal(size=(128, 32))
    return jnp.asarray(rng.normal(size=(32, 12)), jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


def stats_of(gram, count=128, **axes):
    return Stats(
        {"kernel": {"gram": gram, "count": jnp.asarray(count)}}, layout=Layout.of(axes or {})
    )


def test_clipping_passes_gradients_up_to_the_ends_and_none_beyond():
    values = jnp.array([-4.0, -3.0, 0.5, 3.0, 3.5])
    gradient = jax.grad(lambda v: jnp.sum(clip_through(v, -3, 3) * 2))(values)
    assert gradient.tolist() == [0, 2, 2, 2, 0]
    assert clip_through(values, -3, 3).tolist() == [-3, -3, 0.5, 3, 3]


def test_losses_and_their_gradient_are_those_of_the_quadratic_form():
    weight, gram = problem()
    losses, pull = jax.vjp(lambda d: output_losses(d, gram), weight)
    expected = np.einsum("io,ij,jo->o", weight, gram, weight, dtype=np.float64)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    shares = jnp.arange(12, dtype=jnp.float32)
    (gradient,) = pull(shares)
    direct = jax.grad(lambda d: jnp.sum(jnp.einsum("io,ij,jo->o", d, gram, d) * shares))(weight)
    np.testing.assert_allclose(gradient, direct, rtol=1e-4, atol=1e-2)


@methods
def test_it_errs_far_less_than_plain_rounding(name):
    weight, gram = problem()
    report = {}
    learned, plain = (
        apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"].materialize()
        for tx in (METHODS[name](report=report.__setitem__), PLAIN[name]())
    )
    errors = [float(output_error(weight, w, gram, relative=True)) for w in (learned, plain)]
    # Between two levels on a fixed grid there is less to choose from, and ranges are all but two
    # numbers a group.
    share = {"adaround": 0.75, "learned_clip": 0.9}.get(name, 0.5)
    assert errors[0] < share * errors[1]
    assert float(report["kernel"].error) == pytest.approx(errors[0], rel=1e-3)
    assert str(report["kernel"].status) == name


@pytest.mark.parametrize("name", ["adaround", "auto_round", "learned_clip"])
def test_no_output_does_worse_than_plain_rounding(name):
    weight, gram = problem()
    # A rate so large that learning only does harm.
    wild = {
        "adaround": adaround(bits=4, steps=3, learning_rate=1e3, search="absmax"),
        "auto_round": auto_round(bits=4, steps=3, learning_rate=1.0),
        "learned_clip": learned_clip(bits=4, steps=3, learning_rate=10.0),
    }[name]
    plain = round_to_nearest(bits=4, grid="affine")
    losses = [
        np.asarray(
            output_losses(
                weight - apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"].matrix(),
                gram,
            )
        )
        for tx in (wild, plain)
    ]
    assert np.all(losses[0] <= losses[1] * (1 + 1e-5))


def test_no_exponent_and_no_code_makes_nupes_worse_than_its_start():
    weight, gram = problem()
    tx = nupes(bits=4, steps=3, learning_rate=1e3, exponent_rate=1e3)
    learned, plain = (
        apply(t, {"kernel": weight}, stats=stats_of(gram))["kernel"].materialize()
        for t in (tx, round_to_nearest(bits=4, grid="narrow"))
    )
    assert output_error(weight, learned, gram) <= output_error(weight, plain, gram) * (1 + 1e-5)


def test_adaround_rounds_every_entry_up_or_down():
    weight, gram = problem()
    params, stats = {"kernel": weight}, stats_of(gram)
    learned = apply(METHODS["adaround"](), params, stats=stats)["kernel"]
    plain = apply(PLAIN["adaround"](), params, stats=stats)["kernel"]
    assert np.array_equal(learned.scale, plain.scale)
    steps = np.repeat(np.asarray(plain.scale), 16, axis=0)
    assert np.all(np.abs(weight - learned.materialize()) < steps * (1 + 1e-5))
    assert np.mean(learned.codes_matrix() != plain.codes_matrix()) > 0.02


def test_auto_round_moves_entries_by_half_a_step_and_ends_of_ranges_inwards():
    weight, gram = problem()
    params, stats = {"kernel": weight}, stats_of(gram)
    learned = apply(METHODS["auto_round"](), params, stats=stats)["kernel"]
    plain = apply(PLAIN["auto_round"](), params, stats=stats)["kernel"]
    assert np.all(np.asarray(learned.scale) <= np.asarray(plain.scale) * (1 + 1e-6))
    assert np.any(np.asarray(learned.scale) < np.asarray(plain.scale) * 0.99)


@pytest.mark.parametrize("grid", ["narrow", "half", "signed_max", "gptq_sym"])
def test_auto_round_works_on_every_grid(grid):
    weight, gram = problem()
    params, stats = {"kernel": weight}, stats_of(gram)
    learned = apply(auto_round(bits=4, grid=grid, steps=20), params, stats=stats)["kernel"]
    plain = apply(round_to_nearest(bits=4, grid=grid), params)["kernel"]
    errors = [output_error(weight, w.materialize(), gram) for w in (learned, plain)]
    assert errors[0] < errors[1]


def test_nupes_learns_levels_and_codes_beyond_the_neighbours():
    weight, gram = problem()
    params, stats = {"kernel": weight}, stats_of(gram)
    tx = nupes(bits=4, steps=300, learning_rate=0.2, exponent_rate=0.1)
    learned = apply(tx, params, stats=stats)["kernel"]
    assert isinstance(learned, Codebook)
    table = np.asarray(learned.table)
    assert table.shape == (15,)
    assert np.all(np.diff(table) > 0)
    assert np.array_equal(table, -table[::-1])
    assert (table[7], table[14]) == (0, 1)
    codes = np.asarray(learned.codes_matrix(), np.int32)
    above = np.searchsorted(table, np.asarray(weight / learned.scale))
    assert np.any((codes < above - 1) | (codes > above))  # as adaround never does


def test_nupes_ends_the_levels_of_a_block_where_its_squared_error_is_least():
    weight, gram = problem()
    tx = nupes(bits=3, group_size=16, steps=1, search="mse", learning_rate=1e-9, exponent_rate=1e-9)
    learned = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"]
    blocks, table = np.asarray(weight).reshape(2, 16, 12), np.asarray(learned.table)
    exponent = np.log(1 / 3) / np.log(table[4])
    amax = np.abs(blocks).max(axis=1, keepdims=True)

    def error(share):
        units = blocks / (share * amax)
        codes = np.round(np.clip(3 * np.sign(units) * np.abs(units) ** exponent, -3, 3))
        return np.square(blocks - table[codes.astype(int) + 3] * share * amax).sum(axis=1)

    shares = np.arange(10, 3, -1) / 10
    least = shares[np.argmin([error(share) for share in shares], axis=0)]
    assert np.any(least < 1)
    np.testing.assert_allclose(learned.scale, least * amax[:, 0], rtol=1e-6)


def test_at_two_bits_nupes_is_better_for_the_search():
    weight, gram = problem()
    params, stats = {"kernel": weight}, stats_of(gram)
    whole, searched = (
        apply(nupes(bits=2, group_size=16, steps=9, search=search), params, stats=stats)["kernel"]
        for search in ("absmax", "mse")
    )
    errors = [output_error(weight, w.materialize(), gram) for w in (searched, whole)]
    assert errors[0] < 0.8 * errors[1]


@methods
def test_a_stack_equals_its_matrices_one_by_one(name):
    pairs = [problem(seed) for seed in range(2)]
    weights, grams = (jnp.stack(x) for x in zip(*pairs, strict=True))
    tx = METHODS[name]()
    stats = stats_of(grams, jnp.full(2, 128), kernel=Axes())
    stacked = apply(tx, {"kernel": weights}, stats=stats)["kernel"].materialize()
    for i, (weight, gram) in enumerate(pairs):
        alone = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"].materialize()
        # Signs of gradients near zero may turn with the last bit of a product.
        assert np.mean(np.abs(stacked[i] - alone) < 1e-5) > 0.95


@methods
def test_pruned_weights_stay_zero(name):
    weight, gram = problem()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape)
    new = apply(METHODS[name](), {"kernel": Masked(weight, mask)}, stats=stats_of(gram))["kernel"]
    assert isinstance(new, Masked)
    assert isinstance(new.base, Quantized | Codebook)
    assert np.all(np.asarray(new.base.materialize())[~np.asarray(mask)] == 0)


@methods
def test_experts_that_no_token_reached_are_refused_or_rounded_and_told(name):
    weight, gram = problem()
    params = {"kernel": jnp.stack([weight, weight])}
    stats = stats_of(jnp.stack([gram, 0 * gram]), jnp.array([128, 0]), kernel=Axes())
    with pytest.raises(
        ValueError, match=rf"quantize\.{name}: 'kernel': no calibration token.*\[1\]"
    ):
        apply(METHODS[name](), params, stats=stats)
    report = {}
    tx = METHODS[name](on_failure="round_to_nearest", report=report.__setitem__)
    new = apply(tx, params, stats=stats)["kernel"].materialize()
    assert report["kernel"].status.tolist() == [name, "round_to_nearest:no_tokens"]
    plain = apply(PLAIN[name](), {"kernel": weight}, stats=stats)["kernel"].materialize()
    np.testing.assert_allclose(new[1], plain, atol=1e-6)
    with pytest.warns(UserWarning, match=r"'kernel': was rounded to nearest \(no_tokens\)"):
        apply(METHODS[name](on_failure="round_to_nearest"), params, stats=stats)


@methods
def test_a_gram_matrix_that_is_not_finite_is_refused(name):
    weight, gram = problem()
    with pytest.raises(ValueError, match="'kernel': its Gram matrix is not positive definite"):
        apply(METHODS[name](), {"kernel": weight}, stats=stats_of(gram.at[0, 0].set(jnp.nan)))


@methods
def test_groups_of_zeros_and_dead_inputs_keep_their_plain_rounding(name):
    weight, gram = problem()
    weight = weight.at[:16, 2].set(0)
    gram = gram.at[5].set(0).at[:, 5].set(0)
    new = apply(METHODS[name](), {"kernel": weight}, stats=stats_of(gram))["kernel"].materialize()
    assert np.all(np.asarray(new)[:16, 2] == 0)
    assert np.all(np.isfinite(new))


@pytest.mark.parametrize(
    "factory, settings, words",
    [
        (auto_round, {"steps": 0}, r"quantize\.auto_round: steps=0 must be a positive integer"),
        (auto_round, {"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        (adaround, {"regularization": 0.0}, "regularization=0.0 must be positive"),
        (adaround, {"bits": 1}, r"quantize\.adaround: bits=1 must lie between 2 and 8"),
        (nupes, {"bits": 9}, r"quantize\.nupes: bits=9 must lie between 2 and 8"),
        (nupes, {"search": "rms"}, r"search='rms' is unknown\. Choose 'absmax' or 'mse'"),
        (nupes, {"on_failure": "skip"}, "on_failure='skip' is unknown"),
    ],
)
def test_settings_are_checked_when_built(factory, settings, words):
    with pytest.raises(ValueError, match=words):
        factory(**({"bits": 4} | settings))


def test_it_asks_for_statistics_and_refuses_quantized_leaves():
    weight, gram = problem()
    for make in METHODS.values():
        assert make().needs({"kernel": weight}) == {"kernel": frozenset({"gram", "count"})}
        quantized = apply(round_to_nearest(bits=4), {"kernel": weight})
        with pytest.raises(ValueError, match=r"is already a Quantized\. Quantizing it again"):
            apply(make(), quantized, stats=stats_of(gram))


def clip_oracle(weight, gram, bits, steps, rate):
    """Learned ends of "narrow" ranges, one a column: gradients by hand, Adam by hand, float64."""
    top = 2 ** (bits - 1) - 1
    w, gram = np.asarray(weight, np.float64), np.asarray(gram, np.float64)
    gram = gram / np.mean(np.diag(gram))
    reach = np.abs(w).max(0)
    least, best = np.full(w.shape[1], np.inf), np.ones(w.shape[1])
    logit, first, second = np.full(w.shape[1], 4.0), 0.0, 0.0
    for i in range(-1, steps + 1):  # the whole range first
        factor = np.ones(w.shape[1]) if i < 0 else 1 / (1 + np.exp(-logit))
        step = reach * factor / top
        codes = np.clip(np.round(w / step), -top, top)
        change = w - codes * step
        loss = np.sum(change * (gram @ change), 0)
        best, least = np.where(loss < least, factor, best), np.minimum(loss, least)
        if i < 0:
            continue
        inside = np.abs(np.round(w / step)) <= top
        of_step = codes - np.where(inside, w / step, 0)  # of the value, as learned steps have it
        slope = np.sum(-2 * (gram @ change) * of_step, 0) * reach / top * factor * (1 - factor)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        root = np.sqrt(1 - 0.999 ** (i + 1)) / (1 - 0.9 ** (i + 1))
        logit = logit - rate * root * first / (np.sqrt(second) + 1e-8)
    return best, least


def test_learned_clips_are_those_of_the_definition():
    weight, gram = problem(3)
    weight = weight.at[4].mul(3.0)
    tx = learned_clip(bits=3, grid="narrow", steps=12, learning_rate=0.3)
    leaf = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"]
    factor, least = clip_oracle(weight, gram, bits=3, steps=12, rate=0.3)
    assert len(set(factor.round(3))) > 4 and factor.min() < 0.9  # columns differ, and some clip
    np.testing.assert_allclose(leaf.scale[0], np.abs(weight).max(0) * factor / 3, rtol=1e-4)
    unit = np.asarray(gram) / np.mean(np.diag(gram))
    left = np.asarray(weight - leaf.materialize(), np.float64)
    np.testing.assert_allclose(np.sum(left * (unit @ left), 0), least, rtol=1e-3)


def test_learned_clips_come_near_the_best_of_all_pairs_of_ends():
    """Of one group, by trying every pair on a fine lattice."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_t(3, size=(64, 4)), jnp.float32)
    gram = jnp.eye(64)
    tx = learned_clip(bits=2, steps=300, learning_rate=0.1)
    leaf = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"]
    w = np.asarray(weight, np.float64)
    ends = np.linspace(0.1, 1, 91)
    low, high = np.minimum(w.min(0), 0) * ends[:, None, None], w.max(0) * ends[None, :, None]
    step = (high - low) / 3
    zero = np.clip(np.round(-low / step), 0, 3)
    codes = np.clip(np.round(w[:, None, None] / step) + zero, 0, 3)
    best = np.square((codes - zero) * step - w[:, None, None]).sum(0).min((0, 1))
    found = np.square(np.asarray(leaf.materialize()) - w).sum(0)
    plain = apply(round_to_nearest(bits=2, grid="affine"), {"kernel": weight})["kernel"]
    start = np.square(np.asarray(plain.materialize()) - w).sum(0)
    assert (found < best + 0.25 * (start - best)).all() and (found < 0.8 * start).all()


@pytest.mark.parametrize("grid", ["signed_max", "half", "gptq_sym"])
def test_learned_clips_work_on_every_grid_and_for_whole_matrices(grid):
    weight, gram = problem()
    for size in (None, "tensor"):
        settings = {"bits": 3, "grid": grid, "group_size": size}
        tx = learned_clip(steps=40, learning_rate=0.1, **settings)
        learned = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"]
        plain = apply(round_to_nearest(**settings), {"kernel": weight})["kernel"]
        assert learned.scale.shape == plain.scale.shape
        errors = [float(output_error(weight, w.materialize(), gram)) for w in (learned, plain)]
        assert errors[0] < errors[1]
