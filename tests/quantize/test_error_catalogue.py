"""Whatever is most often got wrong is refused by its path, the value found and the way out."""

import jax
import jax.numpy as jnp
import pytest

import jaxweights as jw

Q = jw.quantize
_WEIGHT = jax.random.normal(jax.random.key(0), (32, 16))
_X = jax.random.normal(jax.random.key(1), (64, 32))
_ROUNDED, _GPTQ = Q.round_to_nearest(bits=4), Q.gptq(bits=4)
_PATH = "mlp/up/kernel"
_PARAMS = {"mlp": {"up": {"kernel": _WEIGHT}}, "norm": {"scale": jnp.ones(32)}}
_READERS = {"norm": jnp.ones(32), "up": _WEIGHT, "router": _WEIGHT + 1}


def stats(gram, count=64, path=_PATH):
    return jw.Stats({path: {"gram": gram, "count": jnp.asarray(count)}})


def kernel(dtype):
    return {"kernel": jnp.ones((8, 8)).astype(dtype)}


def only(pattern, tx):
    return jw.partition((pattern, tx))


def _readers_stats():
    def model(params, x):
        normed = x * params["norm"][None]
        return normed @ params["up"] + normed @ params["router"]

    needs = Q.smooth(folds=Q.Fold("up", "norm")).needs(_READERS)
    return jw.calibrate(model, _READERS, [_X], needs=needs)


def _smoothed(fold):
    return jw.apply(Q.smooth(folds=fold), _READERS, stats=_readers_stats())


def _experts():
    gram = _X.T @ _X
    found = stats(
        jnp.stack([gram, jnp.zeros_like(gram), gram]), jnp.array([64, 0, 64]), "experts/kernel"
    )
    axes = {"experts/kernel": jw.Axes(inputs=(-2,), outputs=(-1,))}
    params = {"experts": {"kernel": jnp.stack([_WEIGHT] * 3)}}
    return jw.apply(_GPTQ, params, stats=found, layout=axes)


def _tied(first, second):
    tied = {"embed": _WEIGHT, "head": _WEIGHT}
    return jw.apply(jw.partition(("embed", first), ("head", second)), tied)


# Situation: what is called, and what the refusal says, in order.
CATALOGUE = {
    "a rule matches nothing": (
        lambda: jw.apply(only("mlp/upp/.*", _ROUNDED), _PARAMS),
        "partition: pattern 'mlp/upp/.*' matches no leaf.",
        "nearest paths: ['mlp/up/kernel']",
    ),
    "no statistics": (
        lambda: jw.apply(_GPTQ, _PARAMS),
        "quantize.gptq: 'stats' is missing: pass stats=calibrate(",
    ),
    "statistics of another leaf": (
        lambda: jw.apply(_GPTQ, _PARAMS, stats=stats(_X.T @ _X, path="mlp/down/kernel")),
        f"quantize.gptq: '{_PATH}': the statistic",
        "is missing; no statistics of this weight were collected.",
        "have some: ['mlp/down/kernel']",
    ),
    "another statistic": (
        lambda: jw.apply(_GPTQ, _PARAMS, stats=jw.Stats({_PATH: {"count": jnp.int32(3)}})),
        f"'{_PATH}': the statistic 'gram' is missing; collected were ['count'].",
    ),
    "statistics of another shape": (
        lambda: jw.apply(_GPTQ, _PARAMS, stats=stats(jnp.eye(16))),
        f"'{_PATH}': the statistic 'gram' has shape (16, 16), but a weight of shape (32, 16) needs "
        "(32, 32).",
        "another model or layout; calibrate this one",
    ),
    "fewer tokens than inputs": (
        lambda: jw.apply(_GPTQ, _PARAMS, stats=stats(_X[:8].T @ _X[:8], 8)),
        f"quantize.gptq: '{_PATH}': 8 tokens were seen, fewer than its 32 inputs: only the damping "
        "(0.01 of",
        "Calibrate on more data.",
    ),
    "no positive definite Gram matrix": (
        lambda: jw.apply(_GPTQ, _PARAMS, stats=stats(6 * jnp.eye(32) - 5)),
        f"'{_PATH}': its Gram matrix is not positive definite even with damping=1",
        "on_failure='round_to_nearest'",
    ),
    "an expert without tokens": (
        _experts,
        "'experts/kernel': no calibration token reached it (matrices [1] of its stack).",
        "on_failure='round_to_nearest'",
    ),
    "quantized already": (
        lambda: jw.apply(_ROUNDED, jw.apply(_ROUNDED, _PARAMS)),
        f"'{_PATH}': is already a Quantized.",
        "Dequantize it first with `materialize`",
    ),
    "bits that a table has not": (
        lambda: Q.gptq(bits=3, grid="nf4"),
        "quantize.gptq: grid='nf4' has 16 levels",
        "Pass bits=4.",
    ),
    "a block that does not fit": (
        lambda: jw.apply(Q.mx(element="e2m1"), {"kernel": jnp.ones((40, 8))}),
        "quantize.mx: 'kernel': the block of 32 rows that MX formats have does not divide the "
        "input axis, which has length 40.",
    ),
    "zero points where none can be": (
        lambda: Q.int8_dynamic(grid="affine"),
        "quantize.int8_dynamic: grid='affine' has zero points",
        "Choose 'narrow'",
    ),
    "integers": (
        lambda: jw.apply(only("kernel", _ROUNDED), kernel(jnp.int32)),
        "quantize.round_to_nearest: 'kernel': is int32, not a floating array.",
    ),
    "complex numbers": (
        lambda: jw.apply(only("kernel", _ROUNDED), kernel(jnp.complex64)),
        "'kernel': is complex64, not a floating array.",
    ),
    "truth values": (
        lambda: jw.apply(only("kernel", _ROUNDED), kernel(jnp.bool_)),
        "'kernel': is bool, not a floating array.",
    ),
    "8-bit floats": (
        lambda: jw.apply(only("kernel", _ROUNDED), kernel(jnp.float8_e4m3fn)),
        "'kernel': is float8_e4m3fn, codes of a quantized weight.",
        "dequantize that with `materialize`",
    ),
    "a vector": (
        lambda: jw.apply(only("norm/scale", _ROUNDED), _PARAMS),
        "'norm/scale': has shape (32,), which is no matrix. Leave it out with `partition`.",
    ),
    "tied leaves and two rules": (
        lambda: _tied(_ROUNDED, Q.round_to_nearest(bits=8)),
        "'head': is the same array as 'embed', but rule 'head' takes the one and rule 'embed'",
        "jnp.copy(leaf)",
    ),
    "a tied leaf that is to stay": (
        lambda: _tied(_ROUNDED, jw.identity()),
        "'head': is the same array as 'embed'",
    ),
    "a fold without a writer": (
        lambda: _smoothed(Q.Fold("up", "norms")),
        "quantize.smooth: pattern 'norms' of a fold's writers matches no leaf.",
        "nearest paths: ['norm']",
    ),
    "a fold whose writer has other readers": (
        lambda: _smoothed(Q.Fold("up", "norm")),
        "cannot fold the scale of 'up' into 'norm': also read by 'router'.",
        "Add it to the fold's readers",
    ),
    "groups that do not divide": (
        lambda: jw.apply(Q.round_to_nearest(bits=4, group_size=12), _PARAMS),
        f"'{_PATH}': group_size=12 does not divide the input axis, which has length 32. Choose "
        "one of 1, 2, 4, 8, 16, 32,",
    ),
    "values that are not finite": (
        lambda: jw.apply(_ROUNDED, {"kernel": _WEIGHT.at[17, 5].set(jnp.nan)}),
        "'kernel': 1 of 16 groups hold values that are not finite",
        "group 0 of output 5",
    ),
    "random numbers without a key": (
        lambda: jw.apply(Q.stochastic_rounding(bits=4), _PARAMS),
        "quantize.stochastic_rounding: 'key' is missing: pass key=jax.random.key(...)",
        "this transform draws random numbers",
    ),
}


@pytest.mark.parametrize("situation", CATALOGUE)
def test_what_is_wrong_is_said_with_the_path_and_the_way_out(situation):
    run, *words = CATALOGUE[situation]
    with pytest.raises((ValueError, TypeError, UserWarning)) as refusal:
        run()
    said, at = str(refusal.value), 0
    for part in words:
        assert part in said[at:], f"{part!r} is not in {said[at:]!r}"
        at = said.index(part, at) + len(part)


def test_all_bad_leaves_are_in_one_message():
    params = {name: jnp.ones((length, 4)) for name, length in {"a": 10, "b": 12, "c": 14}.items()}
    with pytest.raises(ValueError) as refusal:
        jw.apply(Q.round_to_nearest(bits=4, group_size=4), params)
    lines = str(refusal.value).splitlines()
    assert ["'a'" in line or "'c'" in line for line in lines] == [True, True]
