import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.sparsify import n_of_m_mask
from jaxweights.sparsify._counts import count_zeros
from jaxweights.sparsify._groups import Group, keep_mask, make_group


def keep_by_sorting(scores, zeros):
    """Oracle: drops the first `zeros` of a stable sort, group by group along axis 0."""
    flat = np.abs(np.asarray(scores, np.float64)).reshape(len(scores), -1)
    mask = np.ones(flat.shape, bool)
    for column in range(flat.shape[1]):
        order = np.argsort(flat[:, column], kind="stable")
        mask[order[:zeros], column] = False
    return mask.reshape(scores.shape)


def scores_of(shape, kind, dtype=jnp.float32):
    if kind == "equal":
        return jnp.full(shape, 0.5, dtype)
    scores = jax.random.normal(jax.random.key(0), shape)
    return (jnp.round(scores * 2) if kind == "ties" else scores).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_masks_equal_those_by_sorting(kind, dtype):
    scores = scores_of((30, 8), kind, dtype)
    values = np.asarray(scores.astype(jnp.float32))
    sparsity = 0.37
    leaf = keep_by_sorting(values.reshape(-1), count_zeros(sparsity, 240)).reshape(30, 8)
    np.testing.assert_array_equal(keep_mask(scores, Group("leaf"), sparsity=sparsity), leaf)
    output = keep_by_sorting(values, count_zeros(sparsity, 30))
    np.testing.assert_array_equal(keep_mask(scores, Group("output"), sparsity=sparsity), output)
    blocks = [
        keep_by_sorting(part.reshape(-1), count_zeros(sparsity, part.size)).reshape(part.shape)
        for part in np.split(values, [7, 14, 21, 28])  # the last block has 2 inputs
    ]
    block = keep_mask(scores, Group("input_block", block=7), sparsity=sparsity)
    np.testing.assert_array_equal(block, np.concatenate(blocks))


@pytest.mark.parametrize("keep, of", [(1, 2), (2, 4), (1, 4), (4, 8), (3, 3), (5, 20)])
def test_every_run_keeps_exactly_as_many_even_when_all_scores_tie(keep, of):
    for kind in ("normal", "ties", "equal"):
        scores = scores_of((2 * of, 5), kind)
        mask = np.asarray(n_of_m_mask(scores, keep=keep, of=of))
        runs = np.moveaxis(np.asarray(scores).reshape(2, of, 5), 1, 0)
        expected = np.moveaxis(keep_by_sorting(runs, of - keep), 0, 1).reshape(2 * of, 5)
        np.testing.assert_array_equal(mask, expected)
        assert (mask.reshape(2, of, 5).sum(axis=1) == keep).all()


def test_a_tail_is_refused_kept_or_pruned_in_proportion():
    scores = scores_of((10, 3), "normal")
    with pytest.raises(
        ValueError, match=r"input axis 10 is not divisible by 4\. Pass tail='dense'"
    ):
        n_of_m_mask(scores, keep=1, of=4)
    dense = n_of_m_mask(scores, keep=1, of=4, tail="dense")
    partial = n_of_m_mask(scores, keep=1, of=4, tail="partial")
    assert dense[8:].all()
    np.testing.assert_array_equal(partial[8:].sum(axis=0), [1, 1, 1])  # ceil(1 * 2 / 4)
    np.testing.assert_array_equal(dense[:8], partial[:8])


def test_empty_matrices_and_single_entries_have_masks():
    assert keep_mask(jnp.zeros((0, 3)), Group("leaf"), sparsity=0.5).shape == (0, 3)
    assert keep_mask(jnp.zeros((3, 0)), Group("input_block", 2), sparsity=0.5).shape == (3, 0)
    assert keep_mask(jnp.ones((1, 1)), Group("leaf"), sparsity=0.5).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"group": "column"}, "group='column' must be one of 'leaf', 'output'"),
        ({"group": "input_block"}, "block=None with group='input_block'"),
        ({"group": "leaf", "block": 4}, "block=4 with group='leaf'"),
        ({"group": "leaf", "keep": 2}, "keep=2, of=None: give both or neither"),
        ({"group": "leaf", "keep": 5, "of": 4}, "keep counts the weights that stay"),
        ({"group": "leaf", "keep": 0, "of": 4}, "must be 1 <= keep <= of"),
        ({"group": "output", "keep": 2, "of": 4}, "are two groups"),
        ({"group": "leaf", "tail": "dense"}, "only with keep and of"),
        ({"group": "leaf", "keep": 2, "of": 4, "tail": "x"}, "tail='x' must be"),
    ],
)
def test_settings_that_contradict_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_group("asker", **settings)


def test_numbers_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match=r"keep=2\.0 must be an integer"):
        make_group("asker", group="leaf", keep=2.0, of=4)
