"""LoRA gives what peft gives: outputs, merged weights, draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import lora, merge_adapters, rslora
from jaxweights.core import apply, identity, partition
from jaxweights.lift import lift
from tests._fixtures import fixture
from tests.adapt._lora import adapters, mlp_apply, with_factors


def peft_model(arrays, prefix):
    return {
        name: {
            "kernel": jnp.asarray(arrays[f"{prefix}/{name}.weight"].T),
            "bias": jnp.asarray(arrays[f"{prefix}/{name}.bias"]),
        }
        for name in ("fc1", "fc2")
    }


def peft_factors(arrays, prefix):
    found = {}
    for name in ("fc1", "fc2"):
        key = f"{prefix}/base_model.model.{name}.lora_A.weight"
        if key in arrays:
            up = arrays[key.replace("lora_A", "lora_B")]
            found[f"{name}/kernel"] = (jnp.asarray(arrays[key].T), jnp.asarray(up.T))
    return found


PEFT_CASES = {
    "lora": lora(rank=4, alpha=8),
    "rslora": rslora(rank=4, alpha=8),
    "one_target": partition(("fc1/kernel", lora(rank=4, alpha=4)), (..., identity())),
    "rank_pattern": partition(
        ("fc1/kernel", lora(rank=4, alpha=16)), ("fc2/kernel", lora(rank=2, alpha=8))
    ),
    "bias_all": lora(rank=2, alpha=8),
}


PEFT_INITS = {
    "pissa": lora(rank=4, alpha=4),
    "olora": lora(rank=4, alpha=4),
    "pissa_rslora": rslora(rank=4, alpha=4),
    "orthogonal": lora(rank=4, alpha=8),
    "mica": lora(rank=4, alpha=8),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_outputs_and_merged_weights_are_those_of_peft(case):
    arrays = fixture("adapt/lora.npz")
    base = peft_model(arrays, "base")
    if case == "bias_all":  # peft trained the biases, too
        for name in base:
            key = f"bias_all/adapter/base_model.model.{name}.base_layer.bias"
            base[name]["bias"] = jnp.asarray(arrays[key])
    compare_with_peft(arrays, case, base, PEFT_CASES[case])


@pytest.mark.parametrize("case", PEFT_INITS)
def test_factors_that_peft_initialised_from_the_weights_give_its_outputs(case):
    arrays = fixture("adapt/lora_init.npz")
    changed = f"{case}/base_after_init"  # what peft leaves in the layer, where it is not the base
    prefix = changed if f"{changed}/fc1.weight" in arrays else "base"
    compare_with_peft(arrays, case, peft_model(arrays, prefix), PEFT_INITS[case])


def compare_with_peft(arrays, case, base, tx):
    x = jnp.asarray(arrays["x"])
    start = apply(tx, base)
    given = peft_factors(arrays, f"{case}/init_adapter")
    assert set(adapters(start)) == set(given)
    for path, weight in adapters(start).items():
        assert (weight.down.shape, weight.up.shape) == tuple(f.shape for f in given[path])
    tuned = with_factors(start, peft_factors(arrays, f"{case}/adapter"))
    # The tolerance of the fixture: 1e-5 absolute, sums of 40 float32 terms of order 1.
    np.testing.assert_allclose(
        jax.jit(lift(mlp_apply, on_materialize="error"))(tuned, x),
        arrays[f"{case}/y"],
        atol=1e-5,
        rtol=1e-5,
    )
    merged, _ = merge_adapters(tuned)
    for name in ("fc1", "fc2"):
        np.testing.assert_allclose(
            merged[name]["kernel"].T, arrays[f"{case}/merged/{name}.weight"], atol=1e-6, rtol=1e-6
        )


def test_the_default_draw_is_uniform_within_one_over_root_in_as_in_peft():
    down = apply(lora(rank=64), {"w": {"kernel": jnp.ones((400, 64))}})["w"]["kernel"].down
    bound = 1 / 20
    assert float(jnp.abs(down).max()) < bound
    # Uniform: deviation bound/√3; 25600 draws determine it to 0.5 %.
    np.testing.assert_allclose(down.std(), bound / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(down.mean(), 0, atol=bound / 50)
