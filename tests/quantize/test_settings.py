"""Every setting of every method refuses the wrong kind by our own words, which name it."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

Q = jw.quantize
_ROUNDED = Q.round_to_nearest(bits=4)
_FOLD = Q.Fold("kernel", "norm")
_SPEC = jw.align.PermutationSpec({"kernel": ("units", None)}, sizes={"units": 32})
_WEIGHT = jnp.ones((32, 4))

# What each public function with settings cannot do without.
REQUIRED = {
    "activation_steps": {"low": jnp.zeros(4), "high": jnp.ones(4)},
    "adadim": {"bits": 4},
    "adaround": {"bits": 4},
    "auto_round": {"bits": 4},
    "awq": {},
    "awq_matrix": {
        "weight": _WEIGHT,
        "moments": jnp.ones(32),
        "input_mean": jnp.ones(32),
        "bits": 4,
        "group_size": None,
    },
    "binary": {},
    "confidence_annealing": {"quantizer": _ROUNDED},
    "four_bit_matrix": {"weight": _WEIGHT, "levels": Q.NF4_LEVELS, "group_size": 32},
    "fp4": {},
    "fp8": {},
    "fp8_dynamic": {},
    "fp8_matrix": {"weight": _WEIGHT},
    "fp8_static": {},
    "fp8_kv": {"keys": _WEIGHT, "values": _WEIGHT},
    "fuse_norms": {"folds": _FOLD},
    "gptq": {"bits": 4},
    "gptq_matrix": {"weight": _WEIGHT, "gram": jnp.eye(32), "bits": 4},
    "hqq": {"bits": 4},
    "hqq_matrix": {"weight": _WEIGHT, "bits": 4, "group_size": 32},
    "int8_dynamic": {},
    "int8_static": {},
    "joint": {"quantizer": _ROUNDED, "rank": 2},
    "learned_clip": {"bits": 4},
    "loftq": {"quantizer": _ROUNDED, "rank": 2},
    "low_rank_of": {"residual": _WEIGHT, "gram": None, "rank": 2},
    "low_rank_residual": {"quantizer": _ROUNDED, "rank": 2},
    "lsq": {"bits": 4},
    "lsq_round": {"x": jnp.ones(4), "step": jnp.ones(()), "bits": 4},
    "lsq_step": {"x": jnp.ones(4), "bits": 4},
    "mx": {"element": "e4m3"},
    "mx_matrix": {"weight": _WEIGHT, "element": "e4m3"},
    "nf4": {},
    "nupes": {"bits": 4},
    "nvfp4": {},
    "oscillation_monitor": {"quantizer": _ROUNDED},
    "outlier_tune": {"folds": _FOLD},
    "pact": {"x": jnp.ones(4), "bound": jnp.ones(()), "bits": 4},
    "power": {"bits": 4},
    "power_errors": {"weight": _WEIGHT, "bits": 4},
    "power_matrix": {"weight": _WEIGHT, "bits": 4},
    "quantize_kv": {"keys": _WEIGHT, "values": _WEIGHT, "group_size": 4},
    "refine": {"quantizer": _ROUNDED},
    "rotate": {"spec": _SPEC, "widths": ["units"]},
    "round_inputs": {"form": "mxfp4"},
    "round_to_nearest": {"bits": 4},
    "shrink_embedding_gradients": {},
    "smooth": {},
    "smooth_scale": {"input_max": jnp.ones(4), "weight_max": jnp.ones(4)},
    "statsq": {"bits": 2},
    "statsq_matrix": {"weight": _WEIGHT, "bits": 2},
    "stochastic_rounding": {"bits": 4},
    "ternary": {},
}

_ARRAY = np.ones(3, np.float32)
_ODD = (_ARRAY, b"x", 3 + 0j, object())
_INTEGERS = ("4", 4.0, 0.5, True, -1, math.nan, math.inf, [], {}, *_ODD)
_FLAGS = (None, "yes", 0, 1, 0.5, math.nan, [], *_ODD)
_SHARES = (None, "x", True, -0.1, 1.1, math.nan, math.inf, [], *_ODD)
_POSITIVE = ("x", True, 0, -1, math.nan, math.inf, [], *_ODD)
_NAMES = ("bogus", 1, 0.5, True, math.nan, [], *_ODD)
_FLOATS = (None, "x", 0.5, True, jnp.int8, jnp.float8_e4m3fn, np.float64, *_ODD)
_CALLED = ("x", 1, 0.5, True, [], *_ODD)

# By the name that a setting has wherever it stands: values that it is never given.
WRONG = {
    "act_order": (None, 1, "x", 0.5, *_ODD),
    "alpha": _SHARES,
    "asymmetric_calibration": _SHARES,
    "bits": (None, 0, 9, *_INTEGERS),
    "block": (None, 0, *_INTEGERS),
    "block_size": (None, 0, *_INTEGERS),
    "boundary": (None, "x", True, -0.1, math.nan, [], *_ODD),
    "clip": _FLAGS,
    "compat": _FLAGS,
    "damping": _SHARES,
    "double_quantization": _FLAGS,
    "dtype": _FLOATS,
    "duo": (None, 1, "x", 0.5, *_ODD),
    "element": (None, *_NAMES),
    "error_propagation": _SHARES,
    "exponent_rate": (None, *_POSITIVE),
    "exponents": (None, 0.5, "x", True, [], [0.0], [1.5], ["x"], [True], [math.nan], *_ODD[1:]),
    "folds": (None, 3, 0.5, "x", [1], True, *_ODD),
    "form": (None, *_NAMES),
    "grid": _NAMES,
    "group_axis": (None, *_NAMES),
    "group_size": (0, "x", 4.5, True, -1, math.nan, [], {}, *_ODD),
    "input_bits": (None, 0, 9, *_INTEGERS),
    "input_group_size": (0, *_INTEGERS),
    "inverse": _FLAGS,
    "iterations": (None, 0, *_INTEGERS),
    "kind": (None, *_NAMES),
    "learning_rate": _POSITIVE,
    "method": (None, *_NAMES),
    "metric": (None, *_CALLED),
    "moments": (None, *_NAMES),
    "momentum": (None, "x", True, 0, 1.5, math.nan, [], *_ODD),
    "on_failure": (None, *_NAMES),
    "online": (None, "units", 1, 0.5, True, [1], b"x", object()),
    "outliers": (None, "x", True, -0.1, 1.0, math.nan, [], *_ODD),
    "pad": _NAMES,
    "per_byte": (None, 3, 6, *_INTEGERS),
    "quantizer": (None, "x", 1, 0.5, True, [], {}, *_ODD),
    "rank": (None, *_INTEGERS),
    "regularization": (None, *_POSITIVE),
    "report": _CALLED,
    "rotations": ("x", 1, 0.5, True, [1], {"units": 1}, *_ODD),
    "scale": (None, *_NAMES),
    "scale_dtype": _FLOATS,
    "scale_rule": (None, *_NAMES),
    "scope": (None, *_NAMES),
    "search": (None, "x", True, 40, 101, math.nan, [], {}, (), ("rms",), ("x", 2.0), *_ODD),
    "share": (None, *_NAMES),
    "shrinkage": (None, "x", 1, 0.5, True, Q.Shrinkage(norm=0), Q.Shrinkage(beta="x"), *_ODD),  # type: ignore[arg-type]
    "signed": _FLAGS,
    "spec": (None, "x", 1, [], {}, *_ODD),
    "static_groups": _FLAGS,
    "steps": (None, *_INTEGERS),
    "sweeps": (None, 0, *_INTEGERS),
    "symmetrize": _FLAGS,
    "unclipped": (1, 0.5, True, "(", [], *_ODD),
    "embeddings": (1, 0.5, True, "(", [], *_ODD),
    "unfolded": (None, *_NAMES),
    "weight_bits": (None, 0, 9, *_INTEGERS),
    "widths": (None, "units", 1, 0.5, True, [1], b"x", object()),
}
# Data, and what is looked at only together with a tree.
DATA = {"axis", "gram", "input_max", "keys", "layout", "levels", "low", "high", "mask", "residual"}
DATA |= {"key_scale", "value_scale"}
DATA |= {"input_mean", "bound", "step", "values", "weight", "weight_max", "x"}
# What a setting may be here that it may not be elsewhere.
ALLOWED = {
    ("awq_matrix", "moments"): "data",
    ("quantize_kv", "scale_dtype"): (None,),
    ("lsq_step", "axis"): "data",
    ("loftq", "alpha"): (None, 1.1),
}


def _cases():
    for name, required in REQUIRED.items():
        for argument in inspect.signature(getattr(Q, name)).parameters:
            if argument not in DATA and ALLOWED.get((name, argument)) != "data":
                yield pytest.param(name, required, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize("name, required, argument", list(_cases()))
def test_a_wrong_setting_is_refused_by_its_name(name, required, argument):
    function = getattr(Q, name)
    for value in WRONG[argument]:
        if any(value is one for one in ALLOWED.get((name, argument), ())):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^quantize\.{name}: ") as refusal:
            function(**(required | {argument: value}))
        assert argument.rstrip("s") in str(refusal.value), f"{argument}={value!r}"


@pytest.mark.parametrize("name, required", REQUIRED.items())
def test_what_the_table_requires_suffices(name, required):
    getattr(Q, name)(**required)


def test_every_transform_stands_in_the_table():
    made = {
        name
        for name in dir(Q)
        if inspect.isfunction(getattr(Q, name))
        and inspect.signature(getattr(Q, name)).return_annotation
        in ("Transform", "optax.GradientTransformation")
    }
    assert made <= set(REQUIRED)


@pytest.mark.parametrize("kind", ["float32", np.float32, np.dtype("float16"), jnp.bfloat16])
def test_dtypes_of_scales_may_be_named_as_numpy_names_them(kind):
    Q.round_to_nearest(bits=4, scale_dtype=kind)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.int32(1), 1, np.array(0.5), jnp.float32(0.5)]
)
def test_numbers_of_numpy_and_jax_are_numbers(number):
    Q.gptq(bits=4, damping=number)
    Q.round_to_nearest(bits=4, search=50 + 50 * number)
    Q.smooth(alpha=number)
    Q.loftq(_ROUNDED, rank=2, alpha=number)


def test_integers_of_numpy_give_what_those_of_python_give():
    weight = jax.random.normal(jax.random.key(0), (32, 4))
    makers = [
        lambda whole: Q.round_to_nearest(bits=whole(4), group_size=whole(16)),
        lambda whole: Q.hqq(bits=whole(4), group_size=whole(16)),
        lambda whole: Q.power(bits=whole(4), group_size=whole(16)),
        lambda whole: Q.statsq(bits=whole(2)),
        lambda whole: Q.int8_dynamic(input_bits=whole(8)),
        lambda whole: Q.lsq(bits=whole(4)),
    ]
    for make in makers:
        found, expected = (jw.apply(make(whole), {"kernel": weight}) for whole in (np.int64, int))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    stats = jw.core.Stats({"kernel": {"gram": jnp.eye(32), "count": jnp.asarray(64)}})
    for method in ("adaround", "auto_round", "nupes", "learned_clip"):
        tx = getattr(Q, method)(bits=np.int64(4), steps=np.int64(2))
        assert jw.apply(tx, {"kernel": weight}, stats=stats)["kernel"].shape == (32, 4)
    assert Q.random_rotation(jax.random.key(0), np.int64(8)).signs.shape == (8,)


def test_what_scales_smoothly_may_be_traced():
    largest, alphas = jnp.array([16.0, 1.0]), jnp.array([0.25, 0.5])
    found = jax.vmap(lambda alpha: Q.smooth_scale(largest, largest, alpha=alpha))(alphas)
    expected = [Q.smooth_scale(largest, largest, alpha=float(alpha)) for alpha in alphas]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-6)
    params, deltas = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.eye(2)}
    added = jax.jit(lambda c: Q.add_deltas(params, deltas, coefficient=c)[0])(0.5)
    assert added["kernel"].tolist() == [[1.5, 1.0], [1.0, 1.5]]


def test_exponents_may_be_an_array_of_jax():
    found, expected = (
        jw.apply(Q.power(bits=4, exponents=exponents), {"kernel": _WEIGHT})["kernel"]
        for exponents in (jnp.array([0.5, 0.75]), [0.5, 0.75])
    )
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
