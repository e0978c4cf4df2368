import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.align import PermutationSpec, bert_permutations, llama_permutations
from jaxweights.models import build
from jaxweights.quantize import check_same_function, pad_hidden
from jaxweights.quantize._pad_hidden import padded_index
from tests.quantize._fold_models import BERT, CONFIGS, LLAMAS, TOKENS, model


@pytest.mark.parametrize("name", ["gqa", "biases", "bert"])
@pytest.mark.parametrize("interleave", [True, False])
def test_a_model_with_a_wider_mlp_computes_the_same(name, interleave):
    fn, params, _ = model(name)
    spec = bert_permutations(BERT) if name == "bert" else llama_permutations(LLAMAS[name])
    padded = pad_hidden(params, spec, multiple=32, interleave=interleave)  # 48 -> 64
    wider = build(dataclasses.replace(CONFIGS[name], intermediate_size=64))
    shapes = jax.eval_shape(wider.init, jax.random.key(0), jnp.asarray(TOKENS, jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, padded) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    new = wider.apply({"params": padded}, TOKENS)
    same = lambda outputs: outputs  # noqa: E731
    assert check_same_function(same, fn(params, TOKENS), new, []) < 1e-5
    assert padded["layers"]["attn"] is not None
    np.testing.assert_array_equal(
        padded["layers"]["attn"]["q"]["kernel"], params["layers"]["attn"]["q"]["kernel"]
    )


@pytest.mark.parametrize("size, length", [(6, 8), (6, 6), (3, 8), (2, 8), (231, 232)])
def test_every_feature_is_kept_once_in_order_and_zeros_stand_among_the_first(size, length):
    index = padded_index(size, length, interleave=True)
    assert len(index) == length
    np.testing.assert_array_equal(index[index >= 0], np.arange(size))
    if 0 < length - size <= size:
        first = index[: 2 * (length - size)].reshape(-1, 2)
        assert (first[:, 0] >= 0).all() and (first[:, 1] == -1).all()
    end = padded_index(size, length, interleave=False)
    np.testing.assert_array_equal(end, [*range(size), *[-1] * (length - size)])


def test_no_group_of_rows_is_all_zero_and_other_groups_keep_their_scales():
    params = {"up": jnp.ones((3, 48)), "down": jax.random.normal(jax.random.key(0), (48, 5))}
    axes = {"up": (None, "mlp"), "down": ("mlp", None)}
    spec = PermutationSpec.of(params, axes)
    tx = jw.quantize.round_to_nearest(bits=4, group_size=8)
    scales = {}
    for interleave in (True, False):
        padded = pad_hidden(params, spec, multiple=64, interleave=interleave)
        scales[interleave] = jw.apply(tx, {"down": padded["down"]})["down"].scale
        assert (jnp.abs(padded["down"]).reshape(8, 8, 5).max(1) == 0).any() != interleave
    plain = jw.apply(tx, {"down": params["down"]})["down"].scale
    np.testing.assert_array_equal(scales[False][:6], plain)
    np.testing.assert_array_equal(scales[True][4:], plain[2:])  # behind the 32 interleaved rows


def test_a_width_that_fits_is_returned_as_it_is_and_bfloat16_stays():
    params = {"up": jnp.ones((3, 8), jnp.bfloat16), "down": jnp.ones((8, 2), jnp.bfloat16)}
    spec = PermutationSpec.of(params, {"up": (None, "mlp"), "down": ("mlp", None)})
    assert pad_hidden(params, spec, multiple=4) is params
    assert pad_hidden(params, spec, multiple=16)["down"].dtype == jnp.bfloat16


def test_what_cannot_be_padded_is_refused():
    params = {"up": jnp.ones((3, 6)), "down": jnp.ones((6, 2))}
    spec = PermutationSpec.of(params, {"up": (None, "mlp"), "down": ("mlp", None)})
    with pytest.raises(ValueError, match=r"'mpl' is no width of the spec. Its widths are \['mlp'"):
        pad_hidden(params, spec, width="mpl")
    with pytest.raises(ValueError, match="multiple=0 must be a positive integer"):
        pad_hidden(params, spec, multiple=0)
    with pytest.raises(ValueError, match=r"quantize.pad_hidden: the tree lacks \['down'\]"):
        pad_hidden({"up": params["up"]}, spec)
    quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), params)
    with pytest.raises(ValueError, match=r"'up': is a Quantized. Pad before you quantize"):
        pad_hidden(quantized, spec)
