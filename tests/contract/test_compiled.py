"""Every public transform gives the same under jit and vmap."""

import jax
import jax.numpy as jnp

import jaxweights as jw
from tests.contract._trees import assert_same, cases, eager, make_params, run


@cases(lambda case: case.traceable)
def test_jit_equals_eager(case):
    params, context, result = eager(case, ("attention", "stack"))
    compiled = jax.jit(lambda p, c: run(case, p, **c))(params, context)
    # Another fusion may round a scale's or a delta's last bit differently, never a code or a mask.
    assert_same(compiled, result, rtol=case.noise * 2e-6, atol=case.noise * 1e-7)


@cases(lambda case: case.traceable)
def test_vmap_over_whole_trees_equals_a_loop(case):
    first, context, alone_first = eager(case, ("dense",))
    second = make_params(seed=1, parts=("dense",))
    together = jax.jit(jax.vmap(lambda p: jw.materialize(run(case, p, **context))))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    )
    for i, alone in enumerate((alone_first, run(case, second, **context))):
        alone = jw.materialize(alone)
        one = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        assert_same(one, alone, rtol=case.noise * 1e-5, atol=case.noise * 1e-6)
