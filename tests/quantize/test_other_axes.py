"""Statistics of a square kernel fit it by their shapes whatever the layout says of its inputs."""

import jax
import jax.numpy as jnp
import pytest

import jaxweights as jw

Q = jw.quantize
_PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}
_X = jax.random.normal(jax.random.key(1), (64, 16))
_TURNED = {"kernel": jw.weights.Axes(inputs=(-1,), outputs=(-2,))}
_NEEDS = dict.fromkeys(_PARAMS, frozenset({"gram", "count", "sum", "abs_sum", "min", "max"}))
_ROUNDED = Q.round_to_nearest(bits=4)
METHODS = {
    "gptq": Q.gptq(bits=4),
    "awq": Q.awq(bits=4, group_size=None),
    "smooth": Q.smooth(),
    "refine": Q.refine(_ROUNDED),
    "joint": Q.joint(_ROUNDED, rank=1),
    "int8_static": Q.int8_static(),
}


@pytest.fixture(scope="module")
def stats():
    return jw.calibrate(lambda p, x: x @ p["kernel"], _PARAMS, [_X], needs=_NEEDS)


@pytest.mark.parametrize("method", METHODS)
def test_a_layout_that_contradicts_the_statistics_is_refused(stats, method):
    with pytest.raises(ValueError, match=r"'kernel': its statistics are .*\(-2,\).*\(-1,\)"):
        jw.apply(METHODS[method], _PARAMS, stats=stats, layout=_TURNED)


def test_allocate_refuses_it_only_where_its_measure_reads_inputs(stats):
    share = lambda measure: Q.allocate(  # noqa: E731
        _PARAMS, {"int4": _ROUNDED}, bits_per_weight=8, measure=measure, stats=stats, layout=_TURNED
    )
    with pytest.raises(ValueError, match=r"'kernel': its statistics are .*Leave layout out"):
        share("relative")
    assert share("weight").choices == {"kernel": "int4"}


def test_what_reads_no_statistics_follows_the_layout(stats):
    new = jw.apply(_ROUNDED, _PARAMS, stats=stats, layout=_TURNED)["kernel"]
    turned = jw.apply(_ROUNDED, {"kernel": _PARAMS["kernel"].T})["kernel"].materialize()
    assert jnp.array_equal(new.materialize(), turned.T)
