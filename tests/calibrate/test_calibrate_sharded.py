"""Statistics of batches and weights that are split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxweights.calibrate import calibrate
from tests.calibrate._calibrate import (
    ALL,
    assert_statistics,
    needs_of,
    oracle,
    stacked,
)
from tests.calibrate._models import MODELS, draw


def test_an_inner_jit_with_shardings_is_looked_into(mesh):
    inner = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("data")))
    x = draw(1, 8, 4)
    stats = calibrate(lambda p, x: inner(x, p["w"]), {"w": draw(0, 4, 2)}, [x], needs={"w": ALL})
    assert_statistics(stats, {"w": stacked(x)})


@pytest.mark.parametrize("name", ["scan", "attention"])
def test_a_batch_split_over_devices_gives_the_statistics_of_one(mesh, name):
    model = MODELS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4) if name == "scan" else (8, 3, 4)).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, P(("data", "model"))))
    stats = calibrate(model.fn, model.params, [spread], needs=needs_of(model))
    assert_statistics(stats, oracle(model, [x]))


SHARD_MAP_SPECS = {
    "outputs split": (P(None, "model"), P("data"), P("data", "model")),
    "replicated": (P(), P(("data", "model")), P(("data", "model"))),
}


@pytest.mark.parametrize("case", SHARD_MAP_SPECS)
def test_inside_shard_map_every_token_counts_once(mesh, case):
    w_spec, x_spec, y_spec = SHARD_MAP_SPECS[case]
    inner = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    split = jax.shard_map(inner, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=y_spec)
    x = draw(1, 8, 4)
    stats = calibrate(lambda p, x: split(p["w"], x), {"w": draw(0, 4, 8)}, [x], needs={"w": ALL})
    assert_statistics(stats, {"w": stacked(x)})


def test_loops_inside_shard_map_sum_up_what_differs_between_devices(mesh):
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    for name in ("scan", "shared by fori_loop", "fori over a stack", "cond"):
        model = MODELS[name]
        split = jax.shard_map(model.fn, mesh=mesh, **specs)
        x = np.random.default_rng(3).standard_normal((8, 4)).astype(np.float32)
        x[:, 0] = 1  # every device takes the same branch
        stats = calibrate(split, model.params, [x], needs=needs_of(model))
        assert_statistics(stats, oracle(model, [x]))


def test_inside_shard_map_split_inputs_are_refused_and_split_experts_stay_apart(mesh):
    fn = lambda w, x: jax.lax.psum(x @ w, "model")  # noqa: E731
    specs = {"in_specs": (P("model"), P("data", "model")), "out_specs": P("data")}
    split = jax.shard_map(fn, mesh=mesh, **specs)
    with pytest.raises(ValueError, match=r"has its input axis split by shard_map"):
        calibrate(
            lambda p, x: split(p["w"], x), {"w": draw(0, 8, 4)}, [draw(1, 4, 8)], needs={"w": ALL}
        )
    experts = jax.shard_map(
        lambda w, x: jnp.einsum("etd,edf->etf", x, w),
        mesh=mesh,
        in_specs=(P("model"), P("model", "data")),
        out_specs=P("model", "data"),
    )
    x = draw(1, 4, 6, 5)
    stats = calibrate(
        lambda p, x: experts(p["w"], x), {"w": draw(0, 4, 5, 2)}, [x], needs={"w": ALL}
    )
    assert_statistics(stats, {"w": stacked(list(x))})
