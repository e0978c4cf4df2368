"""On several devices every public transform gives the same and keeps the sharding."""

import re

import jax

import jaxweights as jw
from tests.contract._trees import (
    assert_same,
    cases,
    context_of,
    eager,
    make_params,
    run,
    shard,
    shard_context,
)

SPLIT = ("attention", "dense")
COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")


@cases()
def test_sharded_equals_single_device_and_keeps_the_sharding(case, mesh):
    params, context, result = eager(case, SPLIT)
    given = shard(params, mesh)
    got = jw.materialize(run(case, given, **shard_context(context, mesh)))
    assert_same(got, jw.materialize(result), rtol=case.noise * 1e-5, atol=case.noise * 1e-6)
    for part in SPLIT:
        old, new = given[part]["kernel"], got[part]["kernel"]
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim), part


@cases(lambda case: case.elementwise)
def test_elementwise_methods_compile_to_no_collective(case, mesh):
    params, context = shard(make_params(), mesh), shard_context(context_of(case), mesh)
    program = jax.jit(lambda p, c: run(case, p, **c)).lower(params, context).compile()
    assert COLLECTIVES.findall(program.as_text()) == []


def test_the_search_for_collectives_can_fail(mesh):
    sharded = shard(make_params(), mesh)["dense"]["kernel"]
    program = jax.jit(lambda x: x / x.sum()).lower(sharded).compile()
    assert "all-reduce" in COLLECTIVES.findall(program.as_text())
