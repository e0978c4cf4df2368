"""chain threads states and contexts, and refuses stale statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import apply, chain, identity
from tests.core._transforms import add, counting, matrix, rotate, scale_by_rms

PARAMS = {"w": matrix(0, 2, 2)}


def test_transforms_are_applied_in_order():
    double = add(0, name="x")
    tx = chain(add(1, name="one"), counting(), counting(), double)
    np.testing.assert_allclose(apply(tx, PARAMS)["w"], PARAMS["w"] + 3, rtol=1e-6)
    assert tx.name == "chain(one, counting, counting, x)"


def test_states_are_kept_apart():
    tx = chain(counting(), counting())
    state = tx.init(PARAMS)
    from jaxweights.core import Context

    _, state = tx.update(PARAMS, state, Context())
    assert [int(s) for s in state] == [2, 2]


def test_the_empty_chain_changes_nothing():
    assert apply(chain(), PARAMS)["w"] is PARAMS["w"]


def test_needs_are_those_of_all():
    tx = chain(scale_by_rms(), add(1), scale_by_rms())
    assert tx.needs(PARAMS) == {"w": frozenset({"count", "second_moment"})}
    assert tx.reads_statistics and not tx.moves_inputs
    assert chain(rotate()).moves_inputs and not chain(add(1)).reads_statistics


@pytest.mark.parametrize(
    "behind", [scale_by_rms, lambda: chain(add(1), scale_by_rms("scale_by_rms"))]
)
@pytest.mark.parametrize("mover", [rotate, lambda: chain(add(1), rotate())])
def test_readers_of_statistics_behind_movers_of_inputs_are_refused(mover, behind):
    with pytest.raises(
        ValueError, match=r"chain: .* reads statistics, but .*rotate.*Use pipeline\("
    ):
        chain(mover(), identity(), behind())
    chain(scale_by_rms(), rotate())  # in this order the statistics are still true


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match=r"chain: .* is a function. Pass transforms"):
        chain(add(1), add)
    with pytest.raises(TypeError, match=r"chain: 3 is a int"):
        chain(3)


def test_dtypes_stay_through_a_chain():
    half = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    assert apply(chain(add(1), add(2)), half)["w"].dtype == jnp.bfloat16


def test_a_chain_depends_on_as_much_as_its_widest_part():
    entry, leaf = jw.merge.mean(), jw.quantize.round_to_nearest(bits=4)
    tree = jw.sparsify.magnitude(sparsity=0.5, group="global")
    assert jw.chain().scope == jw.chain(entry, jw.identity()).scope == "entry"
    assert jw.chain(entry, leaf).scope == "matrix"
    assert jw.chain(leaf, tree, entry).scope == "tree"


@pytest.mark.parametrize(
    "tx, scope",
    [
        (jw.merge.ties(density=0.5), "tree"),
        (jw.merge.ties(density=0.5, scope="leaf"), "leaf"),
        (jw.merge.ties(density=1.0, scope="leaf"), "leaf"),
        (jw.merge.task_arithmetic(), "entry"),
        (jw.merge.task_arithmetic(out_dtype="bfloat16", rounding="stochastic"), "leaf"),
        (jw.merge.dare_linear(density=0.5), "leaf"),
        (jw.merge.dare_ties(density=0.5, trim=0.5), "tree"),
        (jw.quantize.round_to_nearest(bits=4), "matrix"),
    ],
)
def test_transforms_say_what_an_entry_of_their_result_depends_on(tx, scope):
    assert tx.scope == scope
