"""Statistics are held once, read by path, merged, and missed by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, Stats, merge_stats
from jaxweights.core._stats import union_needs
from jaxweights.weights import Axes

GRAM = jnp.asarray([[4.0, 1.0], [1.0, 9.0]])


def make(scale=1.0):
    entry = {
        "count": jnp.int32(3),
        "gram": GRAM * scale,
        "min": jnp.asarray([-scale, 0.0]),
        "max": jnp.asarray([scale, 0.0]),
    }
    grads = {"grad_sq": jnp.full((2, 2), scale), "examples": jnp.int32(2)}
    layout = Layout.of({"q": Axes(), "k": Axes()}, traced=True)
    return Stats({"q": entry, "k": grads}, (("k", "q"),), layout)


def test_shared_inputs_are_read_through_the_owner_and_gradients_are_not():
    stats = make()
    assert stats.get("k", "gram") is stats.get("q", "gram")
    assert stats.get("k", "grad_sq") is not None and stats.get("q", "grad_sq") is None
    assert int(stats.get("k", "examples")) == 2
    assert stats.get("v", "gram") is None
    assert stats.paths == ["q", "k"]


def test_the_second_moment_is_the_diagonal_of_the_gram():
    np.testing.assert_array_equal(make().get("k", "second_moment"), [4, 9])


def test_merging_adds_sums_and_joins_extremes():
    total = make(1.0) + make(2.0)
    np.testing.assert_array_equal(total.get("q", "gram"), 3 * GRAM)
    np.testing.assert_array_equal(total.get("q", "min"), [-2, 0])
    np.testing.assert_array_equal(total.get("q", "max"), [2, 0])
    assert int(total.get("q", "count")) == 6
    assert total.layout == make().layout


def test_statistics_are_a_pytree_that_jit_merges():
    merged = jax.jit(merge_stats)(make(1.0), make(2.0))
    np.testing.assert_array_equal(merged.get("q", "gram"), 3 * GRAM)


def test_what_differs_is_not_merged():
    fewer = Stats({"q": {"gram": GRAM}}, (("k", "q"),))
    with pytest.raises(ValueError, match=r"core.merge_stats: .*'q: count'.*on one side only"):
        merge_stats(make(), fewer)
    unshared = Stats(make().values)
    with pytest.raises(ValueError, match=r"core.merge_stats: .*shared differently"):
        merge_stats(make(), unshared)
    wider = Stats({"q": {"gram": jnp.eye(3)}})
    with pytest.raises(
        ValueError, match=r"'q': the statistic 'gram' has shape \(2, 2\) on one side"
    ):
        merge_stats(Stats({"q": {"gram": GRAM}}), wider)


def test_a_missing_statistic_is_explained():
    stats = make()
    assert "'k': the statistic 'sum' is missing; collected were ['count'" in stats.why_missing(
        "k", "sum"
    )
    assert (
        "no statistics of this weight were collected. The nearest paths that have some: ['q'"
        in (stats.why_missing("q2", "sum"))
    )


def test_needs_are_united_per_path():
    parts = [{"a": frozenset({"gram"})}, {"a": frozenset({"sum"}), "b": frozenset({"count"})}]
    assert union_needs(parts) == {"a": frozenset({"gram", "sum"}), "b": frozenset({"count"})}


def test_statistics_print_a_line_for_every_weight_and_no_values():
    layout = Layout.of({"q": Axes(), "k": Axes()})
    stats = Stats({"q": {"count": jnp.int32(3), "gram": GRAM}}, owners=(("k", "q"),), layout=layout)
    assert repr(stats).splitlines() == [
        "Stats of 2 weights",
        "q  count=3, gram=float32[2,2]",
        "k  as q",
    ]
