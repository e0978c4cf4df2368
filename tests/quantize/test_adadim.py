import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, Stats, apply
from jaxweights.quantize import Grid, adadim, gptq, gptq_matrix, quantize_matrix, round_to_nearest
from jaxweights.weights import Axes, Quantized
from tests._fixtures import fixture


def dense(codes, bits):
    return np.asarray(Quantized.from_codes(*codes, bits=bits).matrix())


def problem(seed=0, loud_row=True):
    """A weight, one of whose rows is large as its input is small, and correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(128, 8)) @ rng.normal(size=(8, 32)) + 0.3 * rng.normal(size=(128, 32))
    weight = rng.normal(size=(32, 16))
    if loud_row:  # its rounding hurts nobody, but the scale that others share with it does
        weight[5] *= 30
        x[:, 5] /= 30
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


def stats_of(gram, count=128):
    return Stats({"kernel": {"gram": gram, "count": jnp.asarray(count)}})


@pytest.mark.parametrize("bits, group", [(2, -1), (3, 16), (4, 32)])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_the_authors_rounding_along_either_axis_is_reproduced(bits, group, axis):
    stored = fixture("quantize/adadim.npz")
    grid = Grid("affine", bits, None if group < 0 else group, group_axis=axis)
    ours = dense(quantize_matrix(jnp.asarray(stored["pseudo/W"].T), grid), bits).T
    theirs = stored[f"pseudo/b{bits}_g{group}_{'oc' if axis == 'input' else 'ic'}"]
    step = np.abs(theirs).max() / 2**bits
    # The authors round both scale and zero point likewise; entries on a tie may go either way.
    assert np.mean(np.abs(ours - theirs) > 0.01 * step) < 0.002


@pytest.mark.parametrize(
    "case", ["ic_b4_g16", "ic_b3_g24_act", "oc_b4_g16", "oc_b3_g16_act_static"]
)
def test_the_authors_gptq_along_either_axis_is_reproduced(case):
    stored = fixture("quantize/adadim.npz")
    settings = json.loads(str(stored["meta"]))["cases"][f"gptq/{case}"]
    ours = gptq_matrix(
        jnp.asarray(stored["gptq/W"].T),
        jnp.asarray(stored["gptq/H"]),
        bits=settings["bits"],
        group_size=settings["groupsize"],
        group_axis="output" if settings["cfg"] == "ic" else "input",
        act_order=settings["actorder"] is not None,
        static_groups=settings["static_groups"],
        compat=True,
    )
    theirs = stored[f"gptq/{case}"]
    same = np.abs(dense(ours.codes, settings["bits"]).T - theirs) < 1e-4
    # Along inputs a flipped rounding changes the rest of its output only; along outputs it also
    # changes the scales that later rows of the other outputs of its group get.
    assert np.mean(same) > 0.95
    assert ours.group_index is None


def test_the_authors_choices_are_reproduced():
    stored = fixture("quantize/adadim.npz")
    settings = json.loads(str(stored["meta"]))["cases"]["rtn_block"]
    get = lambda part, name: jnp.asarray(stored[f"rtn_block/{part}/{name}.weight"].T)  # noqa: E731

    def flat(name):
        inputs = jnp.asarray(stored[f"rtn_block/input/{name}"])
        return inputs.reshape(-1, inputs.shape[-1])

    x = flat("mlp.gate_proj")
    down, up = get("before", "mlp.down_proj"), get("before", "mlp.up_proj")

    def mlp(gate, up):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    gate = get("before", "mlp.gate_proj")
    new_gate = get("after", "mlp.gate_proj")
    metrics = {
        # The gate and the up projection are judged by the whole MLP.
        "mlp.gate_proj": lambda w, q, gram: jnp.mean((mlp(w, up) - mlp(q, up)) ** 2),
        "mlp.up_proj": lambda w, q, gram: jnp.mean((mlp(gate, w) - mlp(new_gate, q)) ** 2),
    }
    for name, chosen in settings["chosen"].items():
        weight, inputs = get("before", name), flat(name if "up" not in name else "mlp.gate_proj")
        report = {}
        options = {"metric": metrics[name]} if name in metrics else {}
        tx = adadim(
            bits=settings["bits"],
            group_size=settings["q_group_size"],
            report=report.__setitem__,
            **options,
        )
        new = apply(tx, {"kernel": weight}, stats=stats_of(inputs.T @ inputs, len(inputs)))
        assert report["kernel"].axis == {"ic": "output", "oc": "input"}[chosen], name
        np.testing.assert_allclose(
            new["kernel"].materialize(), get("after", name), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["affine", "signed_max"])
def test_groups_along_outputs_are_groups_along_inputs_of_the_transpose(kind):
    weight, _ = problem()
    across = quantize_matrix(weight, Grid(kind, 3, 8, group_axis="output"))
    along = quantize_matrix(weight.T, Grid(kind, 3, 8))
    assert across.scale.shape == (32, 2)
    for one, other in zip(across, along, strict=True):
        assert (one is None and other is None) or np.array_equal(one, other.T)


def test_scaling_an_input_scales_its_own_scales_only():
    weight, _ = problem()
    tx = round_to_nearest(bits=3, group_size=8, group_axis="output")
    plain, scaled = (apply(tx, {"k": w})["k"] for w in (weight, weight.at[3].mul(4.0)))
    assert np.array_equal(plain.codes_matrix(), scaled.codes_matrix())
    assert np.array_equal(plain.scale.at[3].mul(4.0), scaled.scale)


def test_rows_on_their_own_scales_are_rounded_when_they_are_reached():
    weight, gram = problem()
    ours = gptq_matrix(weight, gram, bits=3, group_size=8, group_axis="output")
    rows = np.asarray(weight, np.float64)
    damped = np.asarray(gram, np.float64)
    damped = damped + 0.01 * np.mean(np.diag(damped)) * np.eye(32)
    inverse = np.linalg.inv(damped)
    result = np.zeros_like(rows)
    for i in range(32):  # the paper's equation 3, a row at a time
        row = jnp.asarray(rows[i : i + 1], jnp.float32)
        result[i] = dense(quantize_matrix(row, Grid("affine", 3, 8, group_axis="output")), 3)
        rows = rows - np.outer(inverse[:, i], (rows[i] - result[i]) / inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    same = np.abs(dense(ours.codes, 3) - result) < 1e-3
    assert same.mean() > 0.95


@pytest.mark.parametrize("method", ["round_to_nearest", "gptq"])
@pytest.mark.parametrize("loud_row", [True, False])
def test_the_axis_that_errs_less_is_chosen(method, loud_row):
    weight, gram = problem(loud_row=loud_row)
    chosen = {}
    tx = adadim(bits=3, group_size=8, method=method, report=chosen.__setitem__)
    new = apply(tx, {"kernel": weight}, stats=stats_of(gram))["kernel"]
    errors = {}
    for axis in ("input", "output"):
        one = {"bits": 3, "group_size": 8, "group_axis": axis}
        if method == "gptq":
            alone = gptq(**one, act_order=True, static_groups=axis == "input")
        else:
            alone = round_to_nearest(**one, grid="affine")
        other = apply(alone, {"kernel": weight}, stats=stats_of(gram))["kernel"]
        change = np.asarray(weight - other.materialize(), np.float64)
        errors[axis] = np.sum(change * (np.asarray(gram, np.float64) @ change))
        if axis == chosen["kernel"].axis:
            assert np.array_equal(new.codes_matrix(), other.codes_matrix())
    assert chosen["kernel"].axis == min(errors, key=errors.get)
    assert chosen["kernel"].errors == pytest.approx(errors, rel=1e-3)
    if loud_row:
        assert chosen["kernel"].axis == "output"


def test_a_stack_has_one_axis_chosen_by_the_sum():
    pairs = [problem(seed, loud_row=seed == 0) for seed in range(3)]
    weights, grams = (jnp.stack(x) for x in zip(*pairs, strict=True))
    stats = Stats(
        {"kernel": {"gram": grams, "count": jnp.full(3, 128)}},
        layout=Layout.of({"kernel": Axes()}),
    )
    chosen = {}
    tx = adadim(bits=3, group_size=8, report=chosen.__setitem__)
    new = apply(tx, {"kernel": weights}, stats=stats)["kernel"]
    assert chosen["kernel"].axis == "output"  # the loud row of one matrix outweighs the rest
    assert new.scale.shape == (3, 32, 2)


def test_it_refuses_to_be_traced_and_bad_settings():
    weight, gram = problem()
    tx = adadim(bits=3, group_size=8)
    with pytest.raises(ValueError, match=r"quantize\.adadim: the shape of the scales depends on"):
        jax.jit(lambda p: apply(tx, p, stats=stats_of(gram)))({"kernel": weight})
    with pytest.raises(ValueError, match="method='awq' is unknown"):
        adadim(bits=3, method="awq")
    with pytest.raises(ValueError, match="group_size='tensor' has no axis to choose"):
        adadim(bits=3, group_size="tensor")
    with pytest.raises(ValueError, match="group_axis='rows' is unknown"):
        round_to_nearest(bits=3, group_axis="rows")
    words = r"'kernel': group_size=32 does not divide the output axis, which has length 16"
    with pytest.raises(ValueError, match=words):
        apply(adadim(bits=3, group_size=32), {"kernel": weight}, stats=stats_of(gram))
