"""Statistics against a slow NumPy oracle, for every way a model uses its weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.calibrate import STATISTICS, calibrate, pipeline
from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.weights import Axes
from tests.calibrate._calibrate import (
    ALL,
    assert_statistics,
    batches_of,
    needs_of,
    oracle,
    stacked,
)
from tests.calibrate._models import MODELS, draw


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_those_of_a_slow_oracle(name):
    model = MODELS[name]
    batches = batches_of(model)
    stats = calibrate(model.fn, model.params, batches, needs=needs_of(model))
    assert_statistics(stats, oracle(model, batches))
    assert {str(stats.get(p, n).dtype) for p in model.params for n in ("gram", "max")} == {
        "float32"
    }
    assert all(stats.get(p, "count").dtype == jnp.int32 for p in model.params)


def test_the_oracle_tells_models_apart():
    """Rows must differ between weights and batches, or agreement would prove little."""
    found = oracle(MODELS["scan"], batches_of(MODELS["scan"]))
    grams = [*found["rest"]["gram"]]
    assert not np.allclose(grams[0], grams[1], rtol=0.1)


@pytest.mark.parametrize("name", ["plain", "attention", "experts with empty slots", "conv"])
def test_bfloat16_activations_are_summed_in_float32(name):
    model = MODELS[name]
    half = lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x  # noqa: E731
    params = jax.tree.map(half, model.params)
    batches = jax.tree.map(half, batches_of(model, count=1))
    stats = calibrate(model.fn, params, batches, needs=needs_of(model))
    first = {"plain": "a", "attention": "q"}.get(name, next(iter(model.params)))
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), batches)
    exact = oracle(model, rounded)[first]
    # The first weight reads the batch itself: nothing but the sums may round.
    assert_statistics(stats, {first: exact})


def test_a_represented_weight_is_calibrated_as_the_model_uses_it():
    model = MODELS["scan"]
    batches = batches_of(model)
    represented = jw.apply(
        jw.quantize.round_to_nearest(bits=4), model.params, layout={".*": Axes()}
    )
    assert jw.is_weight(represented["rest"])
    stats = calibrate(model.fn, represented, batches, needs=needs_of(model))
    dense = jax.tree.map(np.asarray, jw.materialize(represented))
    coarse = dataclasses.replace(model, params=dense)
    assert_statistics(stats, oracle(coarse, batches), tolerance=1e-4)


HALVES = ["scan", "cond", "experts by ragged_dot", "unrolled"]


@pytest.mark.parametrize("name", HALVES)
def test_two_halves_add_up_to_the_whole_in_any_order(name):
    model = MODELS[name]
    batches = batches_of(model, count=3)
    run = lambda some: calibrate(model.fn, model.params, some, needs=needs_of(model))  # noqa: E731
    whole, first, second = run(batches), run(batches[:1]), run(batches[1:])
    for total in (first + second, jw.merge_stats(second, first), run(batches[::-1])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), total, whole
        )
        assert total.owners == whole.owners and total.layout == whole.layout


def test_statistics_of_different_needs_or_models_are_not_merged():
    model = MODELS["plain"]
    run = lambda needs: calibrate(model.fn, model.params, batches_of(model), needs=needs)  # noqa: E731
    with pytest.raises(ValueError, match=r"core.merge_stats: .*'a: gram'.*collected on one side"):
        run({"a": {"gram"}}) + run({"a": {"sum"}})


def test_weights_that_read_one_input_share_one_entry():
    model = MODELS["attention"]
    stats = calibrate(model.fn, model.params, batches_of(model), needs=needs_of(model))
    assert set(stats.values) == {"q", "o"}
    assert set(stats.paths) == {"q", "k", "v", "o"}
    assert stats.get("v", "gram") is stats.get("q", "gram")


def test_needs_of_all_who_share_an_input_are_collected_once():
    model = MODELS["attention"]
    needs = {"k": {"max"}, "v": {"gram"}}
    stats = calibrate(model.fn, model.params, batches_of(model), needs=needs)
    assert set(stats.values) == {"k"}
    assert stats.get("k", "gram").shape == stats.get("v", "gram").shape == (4, 4)


def test_different_inputs_of_equal_shape_are_not_shared():
    params = {"a": draw(0, 4, 4), "b": draw(1, 4, 4)}
    fn = lambda p, x, y: x @ p["a"] + y @ p["b"]  # noqa: E731
    x, y = draw(2, 3, 4), draw(3, 3, 4)
    stats = calibrate(fn, params, [(x, y)], needs=dict.fromkeys(params, frozenset({"gram"})))
    np.testing.assert_allclose(stats.get("b", "gram"), y.T @ y, rtol=1e-5, atol=1e-6)
    assert set(stats.values) == {"a", "b"}


def test_minimum_and_maximum_of_inputs_on_one_side_of_zero():
    x = -1 - np.abs(draw(0, 6, 4))
    stats = calibrate(
        lambda p, x: x @ p["w"], {"w": draw(1, 4, 2)}, [x], needs={"w": {"min", "max"}}
    )
    np.testing.assert_array_equal(stats.get("w", "max"), x.max(0))
    np.testing.assert_array_equal(stats.get("w", "min"), x.min(0))
    assert float(stats.get("w", "max").max()) < 0


def test_batches_may_be_a_generator_and_the_last_may_be_shorter():
    model = MODELS["plain"]
    x = draw(0, 11, 4)
    stats = calibrate(
        model.fn, model.params, (x[i : i + 4] for i in range(0, 11, 4)), needs=needs_of(model)
    )
    whole = {path: stacked(rows) for path, rows in model.rows(model.params, x).items()}
    assert_statistics(stats, whole)


def test_batches_may_be_dicts_and_progress_is_told():
    told = []
    fn = lambda p, batch: batch["x"] @ p["w"]  # noqa: E731
    batches = [{"x": draw(i, 3, 4)} for i in range(2)]
    progress = lambda *state: told.append(state)  # noqa: E731
    calibrate(fn, {"w": draw(0, 4, 2)}, batches, needs={"w": {"gram"}}, progress=progress)
    assert told == [("calibrate", 1, 2), ("calibrate", 2, 2)]


def test_without_a_batch_there_is_an_error():
    with pytest.raises(ValueError, match=r"calibrate: there is no batch. Pass at least one."):
        calibrate(lambda p, x: x @ p["w"], {"w": draw(0, 4, 2)}, [], needs={"w": {"gram"}})


def test_unknown_statistics_are_refused_with_the_nearest_name():
    words = r"calibrate: 'w': unknown statistic 'grams'.*the nearest is 'gram'"
    with pytest.raises(ValueError, match=words):
        calibrate(
            lambda p, x: x @ p["w"], {"w": draw(0, 4, 2)}, [draw(1, 3, 4)], needs={"w": {"grams"}}
        )


def test_gradient_statistics_without_a_loss_are_refused():
    with pytest.raises(
        ValueError, match=r"'w': \['grad_sq'\] are statistics of gradients. Pass loss="
    ):
        calibrate(
            lambda p, x: x @ p["w"], {"w": draw(0, 4, 2)}, [draw(1, 3, 4)], needs={"w": {"grad_sq"}}
        )


def test_needs_of_leaves_that_are_no_matrices_are_ignored_until_a_transform_asks():
    params = {"w": draw(0, 4, 4), "table": draw(1, 4, 4)}
    fn = lambda p, x: x @ p["w"] + jnp.sum(p["table"])  # noqa: E731
    wanda = jw.sparsify.wanda(sparsity=0.5)
    stats = calibrate(fn, params, [draw(2, 8, 4)], needs=wanda.needs(params))
    assert stats.paths == ["w"]
    assert isinstance(jw.apply(wanda, params, stats=stats)["table"], np.ndarray)
    both = jw.partition(("w|table", wanda))
    with pytest.raises(ValueError, match=r"sparsify.wanda: 'table': .*never multiplies this leaf"):
        jw.apply(both, params, stats=stats)
    stated = {"table": Axes()}
    with pytest.raises(ValueError, match=r"'table': the statistic '\w+' is missing; no statistics"):
        jw.apply(both, params, stats=stats, layout=stated)


def test_a_weight_whose_uses_cannot_all_be_followed_is_refused():
    params = {"w": draw(0, 4, 4), "v": draw(1, 4, 4)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ jnp.roll(p["w"], 1, axis=0) @ p["v"]  # noqa: E731
    run = lambda needs: calibrate(fn, params, [draw(2, 3, 4)], needs=needs)  # noqa: E731
    with pytest.raises(ValueError, match=r"calibrate: 'w': the model also uses it in .*incomplete"):
        run({"w": {"gram"}, "v": {"gram"}})
    assert run({"v": {"gram"}}).paths == ["v"]


def test_returning_a_weight_loses_nothing():
    fn = lambda p, x: (x @ p["w"], p)  # noqa: E731
    x = draw(1, 3, 4)
    stats = calibrate(fn, {"w": draw(0, 4, 2)}, [x], needs={"w": ALL})
    assert_statistics(stats, {"w": stacked(x)})


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_are_taken_one_example_at_a_time():
    params = {"w": draw(0, 4, 3), "v": draw(1, 3, 2)}
    fn = lambda p, x, y: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    loss = lambda p, x, y: jnp.mean(jnp.square(fn(p, x, y) - y))  # noqa: E731
    batches = [(draw(2, 5, 4), draw(3, 5, 2)), (draw(4, 3, 4), draw(5, 3, 2))]
    needs = dict.fromkeys(params, frozenset({"grad_abs", "grad_sq", "gram"}))
    stats = calibrate(fn, params, batches, needs=needs, loss=loss)
    absolute, squared = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for x, y in batches:
        for i in range(len(x)):
            grads = jax.grad(loss)(params, x[i : i + 1], y[i : i + 1])
            for path, g in grads.items():
                absolute[path] += np.abs(g)
                squared[path] += np.square(g)
    for path in params:
        np.testing.assert_allclose(
            stats.get(path, "grad_abs"), absolute[path], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(stats.get(path, "grad_sq"), squared[path], rtol=1e-4, atol=1e-6)
        assert int(stats.get(path, "examples")) == 8
    assert stats.get("w", "gram").shape == (4, 4)


def test_gradients_are_never_shared_although_inputs_are():
    params = {"a": draw(0, 4, 3), "b": draw(1, 4, 3)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) * (x @ p["b"])  # noqa: E731
    loss = lambda p, x: jnp.sum(fn(p, x))  # noqa: E731
    needs = dict.fromkeys(params, frozenset({"gram", "grad_sq"}))
    stats = calibrate(fn, params, [draw(2, 5, 4)], needs=needs, loss=loss)
    assert stats.owners == (("b", "a"),)
    assert stats.get("b", "gram") is stats.get("a", "gram")
    assert not np.allclose(stats.get("a", "grad_sq"), stats.get("b", "grad_sq"), rtol=0.1)


def test_kernels_that_list_the_same_inputs_in_another_order_have_their_own_statistics():
    params = {"a": draw(0, 3, 4, 5), "b": draw(1, 4, 3, 5)}
    x = draw(2, 7, 3, 4)

    def fn(p, x):
        return jnp.einsum("thk,hkd->td", x, p["a"]) + jnp.einsum("thk,khd->td", x, p["b"])

    stats = calibrate(fn, params, [x], needs=dict.fromkeys(params, frozenset({"gram"})))
    for path, rows in {"a": x.reshape(7, 12), "b": jnp.swapaxes(x, 1, 2).reshape(7, 12)}.items():
        np.testing.assert_allclose(stats.get(path, "gram"), rows.T @ rows, rtol=1e-4, atol=1e-5)


# --- saving, cost -------------------------------------------------------------------------------


def test_statistics_survive_saving_bit_for_bit(tmp_path):
    model = MODELS["attention"]
    stats = calibrate(model.fn, model.params, batches_of(model), needs=needs_of(model))
    save_tree(tmp_path / "stats", stats)
    loaded = load_tree(tmp_path / "stats").tree
    assert isinstance(loaded, jw.Stats)
    assert loaded.owners == stats.owners and loaded.layout == stats.layout
    jax.tree.map(np.testing.assert_array_equal, loaded, stats)


def compiled_step(fn, params, batch, names):
    """The program of one batch, lowered through the same functions as `calibrate`."""
    from jaxweights.calibrate._calibrate import _assign, _input_records
    from jaxweights.core import flatten
    from jaxweights.lift._infer_layout import trace_model

    flat, structure = flatten(params)
    trace = trace_model(fn, params, (batch,))
    needs = dict.fromkeys(flat, frozenset(names))
    wanted, _ = _assign(needs, flat, trace.layout, dict(trace.owners))
    run = lambda flat, batch: _input_records(  # noqa: E731
        fn, flat, None, structure, trace.layout, wanted, batch, None
    )
    return jax.jit(run).lower(flat, batch).compile()


def test_the_program_holds_one_product_for_the_model_and_one_for_the_gram():
    model = MODELS["scan"]
    program = compiled_step(model.fn, model.params, draw(0, 6, 4), {"gram", "sum", "max"}).as_text()
    products = len(re.findall(r"= \S+ dot\(", program))
    # `first` and the body of the scan; the last layer's product is not needed but sits in the loop.
    assert products == 4


def test_memory_does_not_grow_with_layers_times_tokens():
    fn = MODELS["scan"].fn
    width, tokens = 16, 512

    def temporary(layers):
        params = {"first": draw(0, width, width), "rest": draw(1, layers, width, width)}
        program = compiled_step(fn, params, draw(2, tokens, width), {"gram"})
        return program.memory_analysis().temp_size_in_bytes

    activations = tokens * width * 4
    # Twelve more layers add their Gram matrices, 1 KiB each, not their activations, 32 KiB each.
    assert temporary(16) - temporary(4) < activations


def test_paths_that_the_model_has_not_are_refused_with_the_nearest():
    params = {"mlp": {"up": jnp.ones((3, 2))}, "bias": jnp.ones(2)}
    run = lambda p, x: x @ p["mlp"]["up"] + p["bias"][None]  # noqa: E731
    needs = {"mlp/up": {"gram"}, "mlp/upp": {"gram"}, "other": {"max"}}
    with pytest.raises(ValueError) as error:
        calibrate(run, params, [jnp.ones((4, 3))], needs=needs)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "calibrate: 'mlp/upp': needs names this path, but params has no such leaf" in lines[0]
    assert "The nearest paths: ['mlp/up'" in lines[0]


def test_needs_of_nothing_that_is_multiplied_are_refused():
    params = {"up": jnp.ones((3, 2)), "bias": jnp.ones((1, 2)), "table": jnp.ones((5, 3))}
    run = lambda p, i: jnp.take(p["table"], i, axis=0) @ p["up"] + p["bias"]  # noqa: E731
    batches = [jnp.arange(3)]
    for path in ("bias", "table"):  # added, and looked up
        with pytest.raises(ValueError, match=rf"{path}'.*none of these leaves.*'up'"):
            calibrate(run, params, batches, needs={path: {"gram"}})
    # Beside one that is, they are left out: transforms name all that they might act on.
    stats = calibrate(run, params, batches, needs={path: {"gram"} for path in params})
    assert stats.paths == ["up"]
    assert calibrate(run, params, batches, needs={}).paths == []


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_one_array_is_no_sequence_of_batches(kind):
    params, x = {"w": jnp.ones((3, 2))}, kind(np.ones((4, 3), np.float32))
    run = lambda p, x: x @ p["w"]  # noqa: E731
    words = r"calibrate: batches is an array \(4, 3\), each row of which .* Pass \[array\], or"
    with pytest.raises(TypeError, match=words):
        calibrate(run, params, x, needs={"w": {"gram"}})
    with pytest.raises(TypeError, match=r"pipeline: batches is an array \(4, 3\)"):
        pipeline(run, params, x, [])
    with pytest.raises(TypeError, match=r"mapping with the keys \['x'\].*Pass \[batch\]"):
        calibrate(run, params, {"x": x}, needs={"w": {"gram"}})


def test_every_statistic_has_a_test():
    of_two_models = {"cross_gram"}  # in tests/quantize/test_error_propagation.py
    assert set(STATISTICS) == ALL | of_two_models | {"count", "grad_abs", "grad_sq"}


def test_inputs_that_are_not_finite_are_refused_where_they_arise():
    params = {"table": jnp.ones((5, 4)), "up": jnp.ones((4, 3)), "other": jnp.ones((4, 3))}

    def model(params, ids):
        table = jnp.take(params["table"], ids, axis=0, mode="fill")  # NaN for an id out of range
        return table @ params["up"], jnp.ones((2, 4)) @ params["other"]

    needs = {"up": {"gram"}, "other": {"gram"}}
    good, bad = jnp.arange(5), jnp.arange(1, 6)
    calibrate(model, params, [good], needs=needs)
    with pytest.raises(ValueError, match=r"^calibrate: 'up': what the model .* ids out of range"):
        calibrate(model, params, [good, bad], needs=needs)


def test_a_tree_in_the_models_place_is_told_apart():
    params = {"kernel": jnp.ones((4, 4))}
    fn = lambda params, x: x @ params["kernel"]  # noqa: E731
    with pytest.raises(TypeError, match=r"^calibrate: the first argument is a dict, not a func"):
        calibrate(params, fn, [jnp.ones((2, 4))], needs={"kernel": frozenset({"gram"})})
