"""GPTQ of trees: stacks, masks, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, partition
from jaxweights.quantize import decode, gptq, gptq_matrix, round_to_nearest
from jaxweights.weights import Axes, Masked, Quantized
from tests.quantize._gptq import assert_mostly_equal, correlated, dense, run, stats_of


def test_a_stack_equals_its_matrices_one_by_one():
    pairs = [correlated(seed=seed) for seed in range(3)]
    weights, grams = (jnp.stack(x) for x in zip(*pairs, strict=True))
    params = {"layers": {"kernel": weights}}
    stats = stats_of(
        params, {"layers/kernel": (grams, jnp.full(3, 256))}, {"layers/kernel": Axes()}
    )
    stacked = apply(gptq(bits=4, group_size=16), params, stats=stats)["layers"]["kernel"]
    assert isinstance(stacked, Quantized)
    assert stacked.shape == (3, 64, 24)
    for i, (weight, gram) in enumerate(pairs):
        alone = run(weight, gram, bits=4, group_size=16)
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        assert np.array_equal(one.codes_matrix(), alone.codes.codes)
        assert np.array_equal(one.scale, alone.codes.scale)


def test_a_tree_can_be_rounded_as_the_authors_do():
    weight, gram = correlated()
    gram = gram.at[5].set(0).at[:, 5].set(0)
    stats = stats_of({"kernel": weight}, {"kernel": (gram, 256)})
    settings = {"bits": 3, "group_size": 16, "block_size": 32}
    found = {}
    for compat in (False, True):
        tx = gptq(compat=compat, **settings)
        found[compat] = apply(tx, {"kernel": weight}, stats=stats)["kernel"]
        alone = run(weight, gram, compat=compat, **settings).codes
        assert np.array_equal(found[compat].codes_matrix(), alone.codes)
        assert np.array_equal(found[compat].scale, alone.scale)
    assert np.all(found[True].materialize()[5] == 0)
    assert not np.array_equal(found[True].scale, found[False].scale)


@pytest.mark.parametrize("act_order", [False, True])
def test_an_attention_kernel_is_rounded_as_its_matrix(act_order):
    weight, gram = correlated()
    params = {"q": {"kernel": weight.reshape(64, 4, 6)}, "o": {"kernel": weight.reshape(8, 8, 24)}}
    axes = {
        "q/kernel": Axes(inputs=(-3,), outputs=(-2, -1)),
        "o/kernel": Axes(inputs=(-3, -2), outputs=(-1,)),
    }
    stats = stats_of(params, dict.fromkeys(axes, (gram, 256)), axes)
    new = apply(gptq(bits=4, group_size=16, act_order=act_order), params, stats=stats)
    alone = run(weight, gram, bits=4, group_size=16, act_order=act_order)
    for name in ("q", "o"):
        kernel = new[name]["kernel"]
        assert kernel.shape == params[name]["kernel"].shape
        np.testing.assert_allclose(
            kernel.materialize().reshape(64, 24), dense(alone), rtol=1e-6, atol=1e-6
        )


def test_a_masked_leaf_stays_masked():
    weight, gram = correlated()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape)
    params = {"kernel": Masked(weight, mask)}
    new = apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))["kernel"]
    assert isinstance(new, Masked)
    assert isinstance(new.base, Quantized)
    assert np.all(np.asarray(new.base.materialize())[~np.asarray(mask)] == 0)
    alone = run(weight, gram, bits=4, mask=mask)
    assert np.array_equal(new.base.codes_matrix(), alone.codes.codes)


def test_it_asks_for_the_gram_matrix_and_the_count():
    params = {"mlp": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    assert gptq(bits=4).needs(params) == {"mlp/kernel": frozenset({"gram", "count"})}


@pytest.mark.parametrize(
    "gram, count, words",
    [
        (
            jnp.zeros((64, 64)),
            0,
            "'kernel': no calibration token reached it. Calibrate on more data",
        ),
        (
            jnp.full((64, 64), jnp.nan),
            256,
            "'kernel': its Gram matrix is not positive definite even",
        ),
    ],
)
def test_a_matrix_that_cannot_be_calibrated_is_refused_by_name_or_rounded(gram, count, words):
    weight, _ = correlated()
    params = {"kernel": weight}
    stats = stats_of(params, {"kernel": (gram, count)})
    with pytest.raises(ValueError) as error:
        apply(gptq(bits=4), params, stats=stats)
    assert words in str(error.value)
    assert "on_failure='round_to_nearest'" in str(error.value)
    tolerant = gptq(bits=4, on_failure="round_to_nearest")
    reason = "no_tokens" if count == 0 else "not_positive_definite"
    with pytest.warns(UserWarning, match=rf"'kernel': was rounded to nearest \({reason}\)"):
        rounded = apply(tolerant, params, stats=stats)["kernel"]
    plain = apply(round_to_nearest(bits=4, grid="affine"), params)["kernel"]
    assert np.array_equal(rounded.materialize(), plain.materialize())


def test_the_matrices_of_a_stack_that_fail_are_named():
    weight, gram = correlated()
    params = {"experts": {"kernel": jnp.stack([weight] * 3)}}
    grams = jnp.stack([gram, 0 * gram, gram])
    stats = stats_of(
        params,
        {"experts/kernel": (grams, jnp.array([256, 0, 256]))},
        {"experts/kernel": Axes()},
    )
    with pytest.raises(ValueError, match=r"'experts/kernel'.*matrices \[1\] of its stack"):
        apply(gptq(bits=4), params, stats=stats)


def test_fewer_tokens_than_inputs_are_warned_of():
    weight, gram = correlated(tokens=32)
    params = {"kernel": weight}
    with pytest.warns(
        UserWarning, match=r"'kernel': 32 tokens were seen, fewer than its 64 inputs"
    ):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 32)}))


def test_values_that_are_not_finite_are_refused():
    weight, gram = correlated()
    params = {"kernel": weight.at[40, 3].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"quantize.gptq: 'kernel': 1 of 24 groups hold values"):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))


def test_a_group_that_does_not_divide_is_refused_with_the_sizes_that_do():
    params = {"kernel": jnp.ones((100, 8))}
    stats = stats_of(params, {"kernel": (jnp.eye(100), 256)})
    with pytest.raises(ValueError) as error:
        apply(gptq(bits=4, group_size=128), params, stats=stats)
    assert (
        "quantize.gptq: 'kernel': group_size=128 does not divide the input axis, which has length "
        "100. Choose one of 1, 2, 4, 5, 10, 20, 25, 50, 100, fill up the last group by pad='zero', "
    ) in str(error.value)
    with pytest.raises(ValueError, match="group_size=128 does not divide"):
        gptq_matrix(jnp.ones((100, 8)), jnp.eye(100), bits=4, group_size=128)


def test_a_quantized_leaf_is_refused():
    weight, gram = correlated()
    params = apply(round_to_nearest(bits=4), {"kernel": weight})
    with pytest.raises(ValueError, match=r"is already a Quantized\. Quantizing it again"):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"damping": 1.5}, r"damping=1.5 must lie in \[0, 1\]"),
        ({"block_size": 0}, "block_size=0 must be a positive integer"),
        ({"bits": 1}, "bits=1 must lie between 2 and 8"),
        ({"on_failure": "skip"}, "on_failure='skip' is unknown"),
        (
            {"pad": "zero"},
            "pad='zero' fills up groups of rows, but group_size=None along the input",
        ),
        (
            {"pad": "zero", "group_size": 8, "act_order": "groups"},
            "act_order='groups' visits whole groups in another order, so that a shorter one may",
        ),
    ],
)
def test_settings_are_checked_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        gptq(**({"bits": 4} | settings))


def test_it_works_inside_jit_and_on_abstract_values():
    weight, gram = correlated()
    params, tx = {"kernel": weight}, gptq(bits=4, group_size=16)
    stats = stats_of(params, {"kernel": (gram, 256)})
    outside = apply(tx, params, stats=stats)["kernel"]
    inside = jax.jit(lambda p, s: apply(tx, p, stats=s))(params, stats)["kernel"]
    assert_mostly_equal(np.asarray(outside.materialize()), np.asarray(inside.materialize()), 0.1)
    shape = jax.eval_shape(lambda p, s: apply(tx, p, stats=s), params, stats)["kernel"]
    assert shape.shape == (64, 24)
    assert shape.codes.shape == (32, 24)


def test_rules_name_what_is_rounded_and_how():
    weight, gram = correlated()
    params = {"a": {"kernel": weight}, "b": {"kernel": -weight}}
    stats = stats_of(params, {"a/kernel": (gram, 256)})
    tx = partition(("a/.*", gptq(bits=4)), (..., round_to_nearest(bits=8)))
    new = apply(tx, params, stats=stats)
    assert (new["a"]["kernel"].bits, new["b"]["kernel"].bits) == (4, 8)


def test_decoded_codes_are_what_the_weight_materialises_to():
    weight, gram = correlated()
    params = {"kernel": weight}
    new = apply(
        gptq(bits=3, group_size=16), params, stats=stats_of(params, {"kernel": (gram, 256)})
    )
    alone = run(weight, gram, bits=3, group_size=16).codes
    spread = jax.tree.map(lambda x: jnp.repeat(x, 64 // x.shape[0], 0), alone)
    assert np.array_equal(new["kernel"].materialize(), decode(*spread))
