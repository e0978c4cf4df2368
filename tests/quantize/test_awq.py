import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import Fold, Grid, awq, awq_matrix, check_same_function, output_error
from jaxweights.quantize._awq_search import (
    candidate_scales,
    rounded,
    search_limits,
    search_scale,
)
from jaxweights.weights import Rescaled
from tests._fixtures import fixture
from tests.quantize._fold_models import TOKENS, model, stats_of

GRID = Grid("affine", 3, 32)
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
find = jax.jit(search_scale, static_argnames=("grid", "duo", "fold"))


def authors(key):
    """Weights of a group, its inputs, and the scale that the authors found."""
    arrays = fixture("quantize/awq.npz")
    x = arrays[f"feat/{key}"].reshape(-1, arrays[f"feat/{key}"].shape[-1])
    weights = [jnp.asarray(arrays[f"before/{name}.weight"].T) for name in GROUPS[key]]
    return weights, jnp.asarray(x), arrays[f"scales/{key}"]


@pytest.mark.parametrize("key", GROUPS)
def test_the_authors_scale_is_a_candidate_and_the_winner_where_they_judge_as_we_do(key):
    weights, x, wanted = authors(key)
    choice = find(weights, x.T @ x, jnp.abs(x).mean(0), GRID)
    candidates = candidate_scales(jnp.abs(x).mean(0), None)
    off = np.abs(np.asarray(candidates) / wanted - 1).max(axis=1)
    assert off.min() < 1e-5
    if key != "mlp.gate_proj":  # judged by the whole MLP
        np.testing.assert_allclose(choice.scale, wanted, rtol=1e-5)
        return
    down = jnp.asarray(fixture("quantize/awq.npz")["before/mlp.down_proj.weight"].T)
    block = lambda gate, up: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731

    @jax.jit
    def loss(scale):
        quantized = (rounded(w * scale[:, None], GRID) / scale[:, None] for w in weights)
        return jnp.mean(jnp.square(block(*quantized) - block(*weights)))

    assert int(jax.lax.map(loss, candidates).argmin()) == off.argmin()


@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj", "self_attn.o_proj"])
def test_clipped_ranges_and_rounded_weights_equal_the_authors(name):
    arrays = fixture("quantize/awq.npz")
    inputs = arrays[f"scaled_feat/{'mlp.gate_proj' if name == 'mlp.up_proj' else name}"]
    x = inputs.reshape(-1, inputs.shape[-1])
    x = jnp.asarray(x[:: len(x) // 36])  # their sample of tokens
    weight = jnp.asarray(arrays[f"scaled/{name}.weight"].T)
    limits = search_limits(weight, x.T @ x, GRID)
    wanted = arrays[f"clip_max/{name}"][..., 0].T
    assert np.mean(np.abs(np.asarray(limits) / wanted - 1) < 1e-5) >= 0.95
    whole = awq_matrix(weight, x.T @ x, jnp.ones(len(weight)), bits=3, group_size=32)
    np.testing.assert_array_equal(whole.scale, 1)
    dense = jw.quantize.decode(
        whole.codes.codes,
        *(jnp.repeat(part, 32, axis=0) for part in (whole.codes.scale, whole.codes.zero_point)),
    )
    same = np.abs(np.asarray(dense) - arrays[f"quant/{name}/dq"].T) < 1e-5
    assert same.mean() >= 0.95


def problem(shape=(64, 24), seed=0):
    """Correlated inputs, a few of them large."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (200, 8)) @ jax.random.normal(keys[1], (8, shape[0]))
    x = (0.3 * x + jax.random.normal(keys[2], x.shape)).at[:, ::16].mul(15.0)
    return jax.random.normal(keys[1], shape), x


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_losses_are_the_squared_change_of_the_outputs_by_a_slow_search(duo):
    weight, x = problem()
    mean = np.abs(np.asarray(x)).mean(0)
    choice = find([weight[:, :10], weight[:, 10:]], x.T @ x, jnp.asarray(mean), GRID, duo=duo)
    groups = np.abs(np.asarray(weight)).reshape(2, 32, 24)
    size = (groups / groups.max(1, keepdims=True)).reshape(64, 24).mean(1)
    scales = [mean ** (r / 20) for r in range(20)] if duo is not True else []
    if duo:
        scales += [mean ** (r / 20) / (size ** (1 - r / 20) + 1e-4) for r in range(20)]
    slow = []
    for scale in scales:
        scale = scale / np.sqrt(scale.max() * scale.min())
        assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)
        slow.append(0.0)
        for start, end in ((0, 10), (10, 24)):
            part = np.asarray(weight[:, start:end]) * scale[:, None]
            part = np.asarray(rounded(jnp.asarray(part), GRID)) / scale[:, None]
            slow[-1] += float(np.square(np.asarray(x) @ (part - weight[:, start:end])).sum())
    np.testing.assert_allclose(choice.losses, slow, rtol=2e-3)
    best = scales[int(np.argmin(slow))]
    np.testing.assert_allclose(choice.scale, best / np.sqrt(best.max() * best.min()), rtol=1e-4)


def test_salient_inputs_are_protected_and_the_loss_is_never_above_plain_rounding():
    for seed in range(3):
        weight, x = problem(seed=seed)
        gram = x.T @ x
        found = awq_matrix(weight, gram, jnp.abs(x).mean(0), bits=3, group_size=32)
        plain = rounded(weight, GRID)
        assert found.losses.min() <= found.losses[0]
        np.testing.assert_allclose(found.losses[0], output_error(weight, plain, gram), rtol=1e-4)
        spread = lambda part: jnp.repeat(part, 32, axis=0)  # noqa: E731
        codes = found.codes
        dense = jw.quantize.decode(codes.codes, spread(codes.scale), spread(codes.zero_point))
        error = output_error(weight, dense / found.scale[:, None], gram)
        assert error < 0.7 * found.losses[0]
        assert error <= found.losses.min() * 1.001  # clipping tries the whole range too
        top = np.argsort(np.asarray(found.scale))[-4:]
        assert set(top) == {0, 16, 32, 48}


def test_inputs_of_one_size_have_the_scale_one():
    np.testing.assert_allclose(candidate_scales(jnp.full(8, 3.0), None), 1, rtol=1e-6)
    np.testing.assert_allclose(candidate_scales(jnp.zeros(8), None), 1, rtol=1e-6)
    assert bool(
        jnp.isfinite(candidate_scales(jnp.array([0.0, 1.0]), jnp.zeros(2), duo="both")).all()
    )


def test_the_diagonal_is_the_gram_matrix_of_uncorrelated_inputs():
    weight, x = problem()
    moments = jnp.square(x).sum(0)
    mean = jnp.abs(x).mean(0)
    both = [
        awq_matrix(weight, m, mean, bits=3, group_size=32, grid="signed_max")
        for m in (moments, jnp.diag(moments))
    ]
    np.testing.assert_allclose(both[0].losses, both[1].losses, rtol=1e-5)
    np.testing.assert_array_equal(both[0].codes.codes, both[1].codes.codes)


STATS = ("abs_sum", "count", "gram")
SETTINGS = {"bits": 4, "group_size": 16}


@pytest.mark.parametrize("name", ["gqa", "bert"])
def test_models_err_less_than_with_plain_rounding(name):
    fn, params, folds = model(name)
    stats = stats_of(name, *STATS)
    run = jax.jit(jw.lift(fn))
    truth = run(params, TOKENS)
    loss = lambda p: float(jnp.square(run(p, TOKENS) - truth).mean())  # noqa: E731
    plain = loss(
        jw.apply(
            jw.quantize.round_to_nearest(grid="affine", **SETTINGS), params, layout=stats.layout
        )
    )
    for chosen in (folds, ()):
        new = jw.apply(awq(folds=chosen, **SETTINGS), params, stats=stats)
        assert loss(new) < plain
        kept = sum(isinstance(leaf, Rescaled) for leaf in jw.core.flatten(new)[0].values())
        assert kept == ((5 if name == "bert" else 0) if chosen else (6 if name == "bert" else 7))


def test_without_rounding_error_the_folded_model_is_the_same_function():
    # At 8 bits, what is left of the rounding is far below what a wrong fold does.
    fn, params, folds = model("gqa")
    new = jw.apply(awq(bits=8, group_size=16, folds=folds), params, stats=stats_of("gqa", *STATS))
    assert check_same_function(fn, params, new, [TOKENS], tolerance=0.03) > 0
    assert not np.array_equal(
        new["layers"]["mlp_norm"]["scale"], params["layers"]["mlp_norm"]["scale"]
    )
    assert jw.core.flatten(new)[0]["head/kernel"] is params["head"]["kernel"]


def test_queries_and_keys_are_not_clipped_unless_asked():
    weight, x = problem((32, 8))
    params = {"q": {"kernel": weight}, "up": {"kernel": weight + 0}}  # not tied
    fn = lambda p, x: (x @ p["q"]["kernel"], x @ p["up"]["kernel"])  # noqa: E731
    tx = awq(bits=3, group_size=16)
    stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))

    def scale(tx):
        new = jw.apply(tx, params, stats=stats)
        return jax.tree.map(lambda w: w.base.scale, new, is_leaf=jw.is_weight)

    default, everything = scale(tx), scale(awq(bits=3, group_size=16, unclipped=None))
    none = scale(awq(bits=3, group_size=16, clip=False))
    np.testing.assert_array_equal(default["q"]["kernel"], none["q"]["kernel"])
    np.testing.assert_array_equal(default["up"]["kernel"], everything["up"]["kernel"])
    assert float(everything["q"]["kernel"].sum()) < float(none["q"]["kernel"].sum())


def test_masks_and_bfloat16_are_kept():
    weight, x = problem((32, 8))
    pruned = jw.apply(jw.sparsify.magnitude(sparsity=0.5), {"kernel": weight.astype(jnp.bfloat16)})
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    stats = jw.calibrate(fn, pruned, [x.astype(jnp.bfloat16)], needs={"kernel": frozenset(STATS)})
    new = jw.apply(awq(bits=4, group_size=16), pruned, stats=stats)["kernel"]
    assert isinstance(new, Rescaled) and isinstance(new.base, jw.Masked)
    assert isinstance(new.base.base, jw.Quantized) and new.dtype == jnp.bfloat16
    assert not np.asarray(new.materialize(), np.float32)[~np.asarray(pruned["kernel"].mask)].any()


def test_a_matrix_without_tokens_is_refused_or_rounded_to_nearest():
    params = {"experts": jax.random.normal(jax.random.key(0), (2, 16, 4))}
    x = jax.random.normal(jax.random.key(1), (8, 16))
    stats = jw.Stats(
        {
            "experts": {
                "gram": jnp.stack([x.T @ x, jnp.zeros((16, 16))]),
                "abs_sum": jnp.stack([jnp.abs(x).sum(0), jnp.zeros(16)]),
                "count": jnp.array([8, 0], jnp.int32),
            }
        }
    )
    run = functools.partial(jw.apply, params=params, stats=stats, layout={"experts": jw.Axes()})
    with pytest.raises(ValueError, match=r"quantize.awq: 'experts': no calibration token reached"):
        run(awq(bits=4, group_size=8))
    new = run(awq(bits=4, group_size=8, clip=False, on_failure="round_to_nearest"))["experts"]
    np.testing.assert_array_equal(new.scale[1], 1)
    plain = jw.apply(
        jw.quantize.round_to_nearest(bits=4, group_size=8, grid="affine"),
        {"kernel": params["experts"][1]},
    )["kernel"]
    np.testing.assert_array_equal(new.base.codes[1], plain.codes)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"group_size": "tensor"}, "group_size='tensor': ranges are searched for groups of one"),
        ({"duo": 1}, r"duo=1 is unknown"),
        ({"duo": "none"}, r"duo='none' is unknown. Choose one of \(True, False, 'both'\)"),
        ({"moments": "max"}, "moments='max' is unknown"),
        ({"on_failure": "skip"}, "on_failure='skip' is unknown"),
        ({"unclipped": "("}, r"quantize.awq: unclipped: pattern '\(' is not a regular expression"),
        ({"bits": 1}, "bits=1 must lie between 2 and 8"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        awq(**settings)


def test_a_group_that_does_not_divide_the_inputs_is_refused_by_path():
    x = jnp.ones((4, 6))
    stats = jw.calibrate(
        lambda p, x: x @ p["kernel"],
        {"kernel": jnp.ones((6, 2))},
        [x],
        needs={"kernel": set(STATS)},
    )
    with pytest.raises(ValueError, match=r"quantize.awq: 'kernel': group_size=4 does not divide"):
        jw.apply(awq(group_size=4), {"kernel": jnp.ones((6, 2))}, stats=stats)
    with pytest.raises(ValueError, match=r"quantize.awq_matrix: group_size=128 does not divide"):
        awq_matrix(jnp.ones((6, 2)), jnp.eye(6), jnp.ones(6), bits=4)
    with pytest.raises(TypeError, match=r"quantize.awq: folds\[0\] is a int"):
        awq(folds=[3])
    assert Fold("a", "b") == Fold("a", "b")


def test_one_float32_copy_of_a_leaf_is_held_at_a_time():
    """Of bfloat16 weights, all of which have their rows multiplied before the first is rounded."""
    shape = (48, 40)
    params = {f"w{i}": jnp.ones(shape, jnp.bfloat16) * (i + 1) for i in range(5)}
    one = {"second_moment": jnp.ones(48), "abs_sum": jnp.ones(48), "count": jnp.int32(1)}
    stats = jw.Stats(dict.fromkeys(params, one))
    held = []

    def look(*_):
        wide = [x for x in jax.live_arrays() if x.shape == shape and x.dtype == jnp.float32]
        held.append(len(wide))

    tx = awq(bits=4, group_size=16, moments="second_moment")
    jw.apply(tx, params, stats=stats, progress=look)
    assert len(held) == 5 and max(held) <= 1
