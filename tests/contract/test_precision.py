"""Products inside transforms are exact to float32 on accelerators too.

GPUs and TPUs multiply float32 with 10 or 7 bits of mantissa unless told otherwise, which a CPU
never shows; so the traced programs are read instead of run.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

import jaxweights as jw
from tests.contract._trees import cases, context_of, make_params, run

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
