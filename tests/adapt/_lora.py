"""Models with factors, for the tests of LoRA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.weights import (
    LowRank,
    is_weight,
)


def mlp_apply(params, x):
    h = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    return h @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]


def adapters(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if isinstance(leaf, LowRank)
    }


def with_factors(tree, values):
    """Puts given (down, up) pairs in place of those drawn."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            dataclasses.replace(
                leaf,
                **dict(
                    zip(
                        ("down", "up"),
                        values[jax.tree_util.keystr(path, simple=True, separator="/")],
                        strict=True,
                    )
                ),
            )
            if isinstance(leaf, LowRank)
            else leaf
        ),
        tree,
        is_leaf=is_weight,
    )
