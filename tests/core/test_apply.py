"""apply keeps structure, identity and ties, under tracing too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import Context, apply, chain, flatten, identity, leafwise, partition, stateless
from tests.core._transforms import add, add_noise, counting, matrix, scale_by_rms


def make_params():
    return {"a": {"kernel": matrix(0, 4, 3), "bias": jnp.ones(3)}, "steps": jnp.int32(3)}


def test_untouched_leaves_are_the_same_objects():
    params = make_params()
    new = apply(add(1), params)
    assert new["a"]["bias"] is params["a"]["bias"] and new["steps"] is params["steps"]
    np.testing.assert_allclose(new["a"]["kernel"], params["a"]["kernel"] + 1, rtol=1e-6)
    same = apply(identity(), params)
    assert all(x is y for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


def test_tied_leaves_are_transformed_once_and_stay_tied():
    shared = matrix(0, 4, 4)
    params = {"first": shared, "second": shared, "copy": jnp.copy(shared)}
    calls = []
    tx = stateless(lambda p, c: calls.append(list(p)) or {k: v + 1 for k, v in p.items()}, name="t")
    new = apply(tx, params)
    assert new["first"] is new["second"] and new["copy"] is not new["first"]
    assert calls == [["copy", "first"]]


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("head", add(1)), ("table", add(2))], "rule 'table' takes the one and rule 'head' the"),
        ([("head", add(1)), (..., identity())], "rule `...` takes the one and rule 'head' the"),
        ([("table", add(1))], "rule 'table' takes the one and no rule the other"),
    ],
)
@pytest.mark.parametrize("chained", [False, True])
def test_tied_leaves_with_different_rules_are_refused(rules, words, chained):
    shared = matrix(0, 4, 4)
    tx = chain(partition(*rules), identity()) if chained else partition(*rules)
    with pytest.raises(ValueError) as error:
        apply(tx, {"head": shared, "table": shared})
    assert f"apply: 'table': is the same array as 'head', but {words}" in str(error.value)
    assert "Let one rule name both, or give the tree a copy of its own" in str(error.value)
    untied = apply(partition(("head|table", add(1))), {"head": shared, "table": shared})
    assert untied["head"] is untied["table"]


def test_tied_random_transforms_draw_once():
    shared = matrix(0, 4, 4)
    new = apply(add_noise(), {"a": shared, "b": shared}, key=jax.random.key(0))
    assert new["a"] is new["b"]


def test_abstract_leaves_give_the_shapes_of_the_run():
    params = make_params()
    abstract = jax.eval_shape(lambda p: apply(add(1), p), params)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert abstract["a"]["kernel"].shape == (4, 3)
    traced = jax.jit(lambda p: apply(add(1), p))(params)
    np.testing.assert_array_equal(traced["a"]["kernel"], apply(add(1), params)["a"]["kernel"])


def test_containers_of_every_kind_are_kept():
    from flax.core import freeze

    params = freeze({"layers": [{"kernel": matrix(0, 4, 3)}, {"kernel": matrix(1, 3, 2)}]})
    new = apply(add(1), params)
    assert jax.tree.structure(new) == jax.tree.structure(params)


def test_state_is_initialised_once_and_dropped():
    params = {"w": matrix(0, 2, 2)}
    np.testing.assert_allclose(apply(counting(), params)["w"], params["w"] + 1, rtol=1e-6)


def test_progress_is_told_leaf_by_leaf():
    told = []
    params = {"a": matrix(0, 2, 2), "b": matrix(1, 2, 2), "c": jnp.ones(2)}
    apply(add(1), params, progress=lambda *state: told.append(state))
    assert told == [("a", 1, 2), ("b", 2, 2)]


@pytest.mark.parametrize(
    "field, remedy",
    [
        ("stats", "pass stats=calibrate"),
        ("models", r"pass models=\[...\]"),
        ("grads", "pass grads"),
        ("step", "pass step"),
        ("key", "pass key=jax.random.key"),
    ],
)
def test_what_is_missing_is_refused_by_name_with_a_remedy(field, remedy):
    tx = stateless(lambda params, context: context.require(field, "mine"), name="mine")
    with pytest.raises(ValueError, match=rf"mine: '{field}' is missing: {remedy}"):
        apply(tx, make_params())


def test_the_context_holds_what_was_given_by_path():
    seen = {}
    tx = stateless(lambda params, context: seen.update(c=context) or params, name="look")
    params = make_params()
    apply(tx, params, models=[params, params], grads=params, step=3, key=jax.random.key(1))
    context = seen["c"]
    assert isinstance(context, Context)
    assert [list(m) for m in context.models] == [list(flatten(params)[0])] * 2
    assert list(context.grads) == list(flatten(params)[0])
    assert context.step.dtype == jnp.int32 and not context.named
    assert context.layout["a/kernel"] == jw.Axes()
    leaves, treedef = jax.tree.flatten(context)  # a pytree: it may be an argument of jit
    assert jax.tree.unflatten(treedef, leaves).layout == context.layout


def test_models_with_leaves_or_untied_values_that_params_lacks_are_refused():
    shared = matrix(0, 2, 2)
    look = identity()
    with pytest.raises(ValueError, match=r"apply: models\[0\] has \['z'\], which params lacks"):
        apply(look, {"a": shared}, models=[{"a": shared, "z": shared}])
    with pytest.raises(
        ValueError, match=r"'b': is tied to 'a' in params, but models\[0\] holds other"
    ):
        apply(look, {"a": shared, "b": shared}, models=[{"a": shared, "b": shared + 1}])


def test_a_tree_with_a_missing_layer_names_what_is_nearest():
    params = {"layer_0": {"kernel": matrix(0, 2, 2)}}
    tx = partition((r"layer_0/kernel", add(1)), (r"layer_1/kernel", add(2)))
    with pytest.raises(
        ValueError, match=r"pattern 'layer_1/kernel' matches no leaf.*layer_0/kernel"
    ):
        apply(tx, params)


def statistics_of(params, x=None):
    model = lambda p, x: sum(x @ w for w in p.values())  # noqa: E731
    x = matrix(1, 6, next(iter(params.values())).shape[0]) if x is None else x
    return jw.calibrate(model, params, [x], needs=scale_by_rms().needs(params))


def test_statistics_of_another_model_are_refused():
    stats = statistics_of({"w": matrix(0, 5, 3)})
    words = r"'w': the statistic 'second_moment' has shape \(5,\).*needs \(4,\).*another model"
    with pytest.raises(ValueError, match=words):
        apply(scale_by_rms(), {"w": matrix(0, 4, 3)}, stats=stats)
    words = r"apply: the tree lacks \['w'\], which the traced model has and the tree has \['v'\]"
    with pytest.raises(ValueError, match=words):
        apply(scale_by_rms(), {"v": matrix(0, 5, 3)}, stats=stats)


def test_statistics_of_other_input_axes_are_refused_though_their_shapes_fit():
    params = {"w": matrix(0, 4, 4)}
    stats = statistics_of(params)
    turned = jw.weights.Axes(inputs=(-1,), outputs=(-2,))
    for layout in ({"w": turned}, jw.infer_layout(lambda p, x: x @ p["w"].T, params, params["w"])):
        with pytest.raises(
            ValueError,
            match=r"'w': its statistics are those of the input axes \(-2,\), but the layout says "
            r"that its inputs are \(-1,\). Leave layout out",
        ):
            apply(scale_by_rms(), params, stats=stats, layout=layout)
    apply(scale_by_rms(), params, stats=stats, layout={"w": jw.weights.Axes()})


@pytest.mark.parametrize("other", ["earlier", "later"])
def test_an_array_at_several_paths_has_the_statistics_of_all_its_uses(other):
    shared, x = matrix(0, 4, 4), matrix(1, 6, 4)
    params = {"first": shared, "second": shared, other: matrix(2, 4, 4)}
    model = lambda p, x: (x @ p["first"]) @ p["second"] + x @ p[other]  # noqa: E731
    stats = jw.calibrate(model, params, [x], needs=scale_by_rms().needs(params))
    assert len(stats.owners) == 1  # the other reads what the first does

    new = apply(scale_by_rms(), params, stats=stats)
    assert new["first"] is new["second"]
    inputs = jnp.concatenate([x, x @ shared])
    for path, rows in {"first": inputs, other: x}.items():
        apart = statistics_of({"w": params[path]}, rows)
        expected = apply(scale_by_rms(), {"w": params[path]}, stats=apart)["w"]
        np.testing.assert_allclose(new[path], expected, rtol=1e-5)


def test_an_array_whose_uses_contract_other_axes_is_refused_for_methods_that_read_inputs():
    shared = matrix(0, 4, 4)
    params = {"first": shared, "second": shared}
    model = lambda p, x: (x @ p["first"]) @ p["second"].T  # noqa: E731
    stats = jw.calibrate(model, params, [matrix(1, 6, 4)], needs=scale_by_rms().needs(params))
    words = (
        r"'first': is one array with \['second'\], but .*\(-2,\) at 'first', \(-1,\) at 'second'"
    )
    with pytest.raises(ValueError, match=words + r".*jnp.copy\(leaf\)"):
        apply(scale_by_rms(), params, stats=stats)
    untied = {"first": shared, "second": jnp.copy(shared)}
    stats = jw.calibrate(model, untied, [matrix(1, 6, 4)], needs=scale_by_rms().needs(untied))
    apply(scale_by_rms(), untied, stats=stats)


def test_a_tree_that_lacks_a_layer_of_the_calibrated_model_is_refused():
    params = {f"layer_{i}": matrix(i, 4, 4) for i in range(3)}
    stats = statistics_of(params)
    apply(scale_by_rms(), params, stats=stats)
    params.pop("layer_1")
    with pytest.raises(
        ValueError, match=r"apply: the tree lacks \['layer_1'\].*calibrate, or infer"
    ):
        apply(scale_by_rms(), params, stats=stats)


def test_donated_trees_may_be_transformed_under_jit():
    run = jax.jit(
        lambda p: apply(leafwise(lambda weight: -weight, name="negate"), p), donate_argnums=0
    )
    np.testing.assert_array_equal(run({"w": jnp.ones((2, 2))})["w"], -np.ones((2, 2)))


def test_a_transform_that_loses_leaves_is_named():
    loses = stateless(lambda params, _: {"w": params["w"]}, name="loses")
    with pytest.raises(ValueError, match=r"apply: loses gave back no leaf at \['v'\]\. A t"):
        apply(loses, {"v": matrix(0, 2, 2), "w": matrix(1, 2, 2)})


PAIR = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda tx: jw.apply(PAIR, tx),
            r"the first argument is a dict.*apply\(tx, ",
        ),
        (lambda tx: jw.apply(tx, PAIR, models=PAIR), r"models is a dict.*models=\[model\]"),
        (lambda tx: jw.apply(tx, PAIR, stats={}), r"stats is a dict.*calibrate"),
        (lambda tx: jw.apply(tx, PAIR, key=3), r"key=3 is a int.*key=jax\.random\.key\(3\)"),
        (lambda tx: jw.apply(tx, PAIR, layout=jw.Axes()), r"layout is a Axes.*infer_layout"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_what_to_pass(call, words):
    with pytest.raises(TypeError, match=f"apply: {words}"):
        call(jw.quantize.round_to_nearest(bits=8))


@pytest.mark.parametrize(
    "params, words",
    [
        (
            {"lm_head": {"kernel": jnp.ones((4, 4))}},
            r"it leaves 'lm_head/kernel' \(an embed",
        ),
        ({"bias": jnp.ones(4)}, r"of 1 none is a floating matrix"),
    ],
)
def test_a_method_that_finds_nothing_to_change_is_an_error_and_no_copy(params, words):
    for tx in (
        jw.quantize.round_to_nearest(bits=8),
        jw.chain(jw.sparsify.magnitude(sparsity=0.5), jw.adapt.lora(rank=1)),
    ):
        with pytest.raises(ValueError, match=f"apply: .*finds no leaf to change: {words}"):
            jw.apply(tx, params)
        assert not jw.plan(tx, params).changed
    kept = jw.apply(jw.partition((..., jw.identity())), params)
    assert jax.tree.leaves(kept)[0] is jax.tree.leaves(params)[0]
    assert jw.apply(jw.quantize.round_to_nearest(bits=8), {}) == {}
