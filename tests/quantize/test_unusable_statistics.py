"""Statistics that overflowed, or that no token reached, are refused by name."""

import jax
import jax.numpy as jnp
import pytest

import jaxweights as jw

Q = jw.quantize
OVERFLOWED = "the statistic 'gram' is not finite: its inputs held NaN or were too large"


def stats_of(**changed):
    x = jax.random.normal(jax.random.key(1), (64, 16))
    one = {
        "gram": x.T @ x,
        "abs_sum": jnp.abs(x).sum(0),
        "count": jnp.asarray(64, jnp.int32),
        "min": x.min(0),
        "max": x.max(0),
    }
    return jw.Stats({"kernel": one | changed})


@pytest.mark.parametrize(
    "tx, words",
    [
        (Q.refine(Q.round_to_nearest(bits=4)), OVERFLOWED),
        (Q.joint(Q.round_to_nearest(bits=4), rank=2), OVERFLOWED),
        (Q.awq(bits=4, group_size=8), OVERFLOWED),
        (Q.adadim(bits=4, group_size=8), "its Gram matrix is not finite"),
        (Q.gptq(bits=4), "its Gram matrix is not positive definite"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
def test_a_gram_matrix_that_overflowed_is_refused(tx, words, value):
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    gram = stats_of().get("kernel", "gram")
    jw.apply(tx, params, stats=stats_of())
    with pytest.raises(ValueError, match=f"'kernel': .*{words}"):
        jw.apply(tx, params, stats=stats_of(gram=gram.at[3].set(value).at[:, 3].set(value)))


def test_a_static_step_of_inputs_that_never_came_is_refused():
    params = {"kernel": jnp.ones((16, 8))}
    never = {"min": jnp.full(16, jnp.inf), "max": jnp.full(16, -jnp.inf)}
    with pytest.raises(ValueError, match=r"quantize.int8_static: 'kernel': the largest magnitude"):
        jw.apply(Q.int8_static(), params, stats=stats_of(**never))
