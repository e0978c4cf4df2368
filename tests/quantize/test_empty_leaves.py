"""Leaves without entries, which pruned or sliced models hold, go through every quantizer."""

import jax.numpy as jnp
import pytest

import jaxweights as jw

Q = jw.quantize
TRANSFORMS = {
    "round_to_nearest": lambda: Q.round_to_nearest(bits=4, grid="affine", group_size=4),
    "nf4": lambda: Q.nf4(group_size=4, double_quantization=True),
    "fp8": lambda: Q.fp8(group_size=None),
    "fp8_dynamic": Q.fp8_dynamic,
    "hqq": lambda: Q.hqq(bits=4, group_size=None, steps=1),
    "power": lambda: Q.power(bits=3, exponents=[0.5]),
    "int8_dynamic": Q.int8_dynamic,
    "gptq": lambda: Q.gptq(bits=4),
    "refine": lambda: Q.refine(Q.gptq(bits=4, group_size=4), sweeps=1),
    "adadim": lambda: Q.adadim(bits=4),
    "adaround": lambda: Q.adaround(bits=4, steps=1),
    "auto_round": lambda: Q.auto_round(bits=4, steps=1),
    "learned_clip": lambda: Q.learned_clip(bits=4, steps=1),
    "nupes": lambda: Q.nupes(bits=4, steps=1),
    "awq": lambda: Q.awq(bits=4, group_size=None),
    "lsq": lambda: Q.lsq(bits=4, group_size=4),
    "lsq of outputs": lambda: Q.lsq(bits=4, group_size=None),
    "ternary": lambda: Q.ternary(share="output"),
    "statsq": lambda: Q.statsq(bits=2),
    "joint": lambda: Q.joint(Q.round_to_nearest(bits=4), outliers=0.01),
}


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2, 8, 0), (0, 8, 8)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_empty_leaf_is_represented_and_materializes_to_itself(name, shape):
    *stack, inputs, _ = shape
    one = {
        "gram": jnp.broadcast_to(jnp.eye(inputs), (*stack, inputs, inputs)),
        "abs_sum": jnp.ones((*stack, inputs)),
        "count": jnp.full(stack, 99, jnp.int32),
    }
    tx, params = TRANSFORMS[name](), {"kernel": jnp.zeros(shape, jnp.bfloat16)}
    stats = jw.Stats({"kernel": one}) if tx.reads_statistics else None
    leaf = jw.apply(tx, params, stats=stats, layout={"kernel": jw.Axes()})["kernel"]
    assert leaf is not params["kernel"]
    dense = jw.materialize(leaf)
    assert (dense.shape, dense.dtype) == (shape, jnp.bfloat16)
