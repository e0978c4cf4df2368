"""What transforms compute is exact to the dtype that is stated, on accelerators too.

GPUs and TPUs multiply float32 with 10 or 7 bits of mantissa unless told otherwise, and GPUs drop a
cast to a narrow dtype that is followed by one back. A CPU shows neither; so the traced programs are
read instead of run.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal, jaxprs_in_params

import jaxweights as jw
from tests.contract._trees import cases, context_of, make_params, run
from tests.contract.registry import Case

EXACT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr):
    """Every equation of a program, those of the programs inside it included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def imprecise(fn, *args):
    """Float products whose precision is left to the device."""
    found = []
    for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if equation.primitive.name not in PRODUCTS:
            continue
        floats = [jnp.issubdtype(x.aval.dtype, jnp.floating) for x in equation.invars]
        if all(floats) and equation.params["precision"] != EXACT:
            found.append(f"{equation} at {equation.source_info.name_stack}")
    return found


def test_a_product_that_leaves_its_precision_open_is_found():
    x = jnp.ones((2, 2))
    assert len(imprecise(jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x @ x, x)), x)) == 1
    assert not imprecise(lambda x: jnp.matmul(x, x, precision="highest"), x)


@cases(lambda case: case.traceable)
def test_no_transform_leaves_the_precision_of_a_product_open(case):
    params, context = make_params(parts=("dense",)), context_of(case, parts=("dense",))
    assert not imprecise(lambda p, c: jw.materialize(run(case, p, **c)), params, context)


# Primitives whose results hold values of their operands, no new ones.
MOVES = frozenset(
    "select_n broadcast_in_dim reshape transpose squeeze expand_dims concatenate slice "
    "dynamic_slice gather pad rev copy".split()
)


def width(variable):
    """Bits of a float; 0 of anything else."""
    dtype = variable.aval.dtype
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


def widened_again(fn, *args):
    """Casts of floats that were cast to the narrow dtype in the same program."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _widened_again(jaxpr, [False] * len(jaxpr.invars))[1]


def _widened_again(jaxpr, are_narrowed):
    narrowed = {x for x, y in zip(jaxpr.invars, are_narrowed, strict=True) if y}
    known = lambda xs: [not isinstance(x, Literal) and x in narrowed for x in xs]  # noqa: E731
    found = []
    for equation in jaxpr.eqns:
        name, operands, results = equation.primitive.name, equation.invars, equation.outvars
        inner = list(jaxprs_in_params(equation.params))
        if inner:
            # A loop's body is read as if nothing came in narrowed; a call's or branch's as it is.
            given = known(operands[1:] if name == "cond" else operands)
            for one in inner:
                fits = len(one.invars) == len(given)
                out, more = _widened_again(one, given if fits else [False] * len(one.invars))
                found += more
                if len(out) == len(results):
                    narrowed |= {
                        x for x, is_narrowed in zip(results, out, strict=True) if is_narrowed
                    }
        elif name == "convert_element_type" and width(operands[0]) and width(results[0]):
            if width(results[0]) < width(operands[0]):
                narrowed |= set(results)
            elif any(known(operands)):
                found.append(f"{equation} at {equation.source_info.name_stack}")
        elif name in MOVES and any(known(operands)):
            narrowed |= set(results)
    return known(jaxpr.outvars), found


def test_a_cast_that_a_device_may_drop_is_found():
    x = jnp.ones((2, 2))
    there_and_back = lambda x: x.astype(jnp.bfloat16).T.astype(jnp.float32)  # noqa: E731
    assert len(widened_again(jax.jit(there_and_back), x)) == 1
    assert (
        len(
            widened_again(
                lambda x: jax.jit(lambda y: y.astype(jnp.float32))(x.astype(jnp.float16)), x
            )
        )
        == 1
    )
    barrier = jax.lax.optimization_barrier
    assert not widened_again(lambda x: barrier(x.astype(jnp.float16)).astype(jnp.float32), x)


def _with_half_scales():
    settings = {"bits": 4, "group_size": 16, "scale_dtype": jnp.float16}
    q = jw.quantize
    methods = (q.gptq, q.hqq, q.awq, q.adaround, q.auto_round, q.learned_clip)
    yield from (Case(f.__name__, lambda f=f: f(**settings)) for f in methods)
    rounding = q.round_to_nearest
    yield Case("affine", lambda: rounding(grid="affine", **settings))
    yield Case("mse", lambda: rounding(search="mse", **settings))
    yield Case("refine", lambda: q.refine(rounding(**settings)))
    yield Case("nf4", lambda: q.nf4(group_size=16, scale_dtype=jnp.float16))
    yield Case("fp8", lambda: q.fp8(scale_dtype=jnp.float16))
    yield Case("gptq of nf4", lambda: q.gptq(bits=4, grid="nf4", group_size=16))


@cases(lambda case: case.traceable)
def test_no_transform_leaves_a_cast_of_what_it_stores_to_be_dropped(case):
    params, context = make_params(parts=("dense",)), context_of(case, parts=("dense",))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for tree in (params, narrow):
        assert not widened_again(lambda p, c: run(case, p, **c), tree, context)


@pytest.mark.parametrize("case", list(_with_half_scales()), ids=lambda case: case.name)
def test_codes_are_chosen_for_the_half_scales_that_are_stored(case):
    params, context = make_params(parts=("dense",)), context_of(case, parts=("dense",))
    assert not widened_again(lambda p, c: run(case, p, **c), params, context)
