"""Runs transforms of the contract, and calibrates, on a tree that two processes hold together.

Started twice: `python -m tests.contract._one_of_two_processes INDEX ADDRESS NAMES...`. Prints the
names of those that failed, with their errors, as JSON; all transforms where none is named.
"""

import functools
import json
import sys
import traceback

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if __name__ == "__main__":  # before the modules below make their first array
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))

import jaxweights as jw
from jaxweights.core._host import on_host
from tests.contract._trees import context_of, make_params, run
from tests.contract.registry import CASES

SPLIT = ("attention", "dense", "steps")


def spread(tree, mesh):
    """The same tree as global arrays, outputs of kernels split over all devices."""

    def place(leaf):
        spec = PartitionSpec(None, "model") if leaf.ndim > 1 else PartitionSpec()
        whole = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def compare(case, mesh):
    """Refuses a result of the two processes that is not that of one."""
    params, context = make_params(parts=SPLIT), context_of(case, parts=SPLIT)
    alone = jax.tree.leaves(jw.materialize(run(case, params, **context)))
    models = [spread(model, mesh) for model in context["models"] or ()] or None
    together = jw.materialize(run(case, spread(params, mesh), **(context | {"models": models})))
    for one, both in zip(alone, jax.tree.leaves(together), strict=True):
        one = np.asarray(one)
        for part in both.addressable_shards:
            np.testing.assert_allclose(
                part.data, one[part.index], rtol=case.noise * 1e-5, atol=case.noise * 1e-6
            )


def calibrate(mesh):
    """Refuses statistics of a batch that the processes share which are not those of one."""
    params, x = make_params(parts=("dense",)), np.ones((8, 32), np.float32).cumsum(0)
    x[:, ::3] *= -1
    needs = {"dense/kernel": frozenset({"gram", "abs_sum", "count", "max"})}

    def forward(params, x):
        return x @ params["dense"]["kernel"] + params["dense"]["bias"]

    alone = jw.calibrate(forward, params, [x], needs=needs).values["dense/kernel"]
    split = NamedSharding(mesh, PartitionSpec("model"))
    batch = jax.make_array_from_callback(x.shape, split, lambda index: x[index])
    stats = jw.calibrate(forward, spread(params, mesh), [batch], needs=needs)
    for name, value in alone.items():
        both = on_host(stats.values["dense/kernel"][name])
        np.testing.assert_allclose(both, value, rtol=1e-6, err_msg=name)
    quantized = jw.apply(jw.quantize.gptq(bits=4), spread(params, mesh), stats=stats)
    y = jax.jit(jw.lift(forward))(quantized, batch)
    assert y.shape == (8, 16) and not y.is_fully_addressable


def refuse(mesh):
    """Refuses NaN that this process or the other holds by the same words."""
    params = make_params(parts=("dense",))
    bad = {"kernel": params["dense"]["kernel"].at[3, 1].set(np.nan)}
    for tx in (
        jw.quantize.round_to_nearest(bits=4, group_size=8),
        jw.sparsify.magnitude(sparsity=0.5),
    ):
        try:
            jw.apply(tx, spread(bad, mesh))
        except ValueError as error:
            assert "'kernel': 1 of " in str(error)
        else:
            raise AssertionError(tx.name)


def main():
    """Compares one after another, in the order that both processes share."""
    only = sys.argv[3:]
    mesh = Mesh(np.array(jax.devices()), ("model",))
    assert jax.process_count() == 2
    failed = {}
    work = {case.name: functools.partial(compare, case) for case in CASES}
    work |= {"calibrate": calibrate, "refuse": refuse}
    for name in only or work:
        try:
            work[name](mesh)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:600]
            traceback.print_exc(limit=-4)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
