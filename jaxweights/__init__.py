"""Change the weights of trained models in JAX: quantize, sparsify, adapt, merge, analyze.

A model is a pytree of weights; every method is a pure transform of that tree. Transforms compose:

>>> import jax, jaxweights as jw
>>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
>>> tx = jw.chain(jw.sparsify.magnitude(sparsity=0.5), jw.quantize.round_to_nearest(bits=4))
>>> small = jw.apply(tx, params)
>>> type(small["dense"]["kernel"]).__name__
'Masked'
"""

import importlib as _importlib
import sys as _sys
import typing as _typing

from jaxweights.calibrate import calibrate as calibrate
from jaxweights.calibrate import pipeline as pipeline
from jaxweights.core import Context as Context
from jaxweights.core import Layout as Layout
from jaxweights.core import Stats as Stats
from jaxweights.core import Transform as Transform
from jaxweights.core import apply as apply
from jaxweights.core import between as between
from jaxweights.core import chain as chain
from jaxweights.core import combine as combine
from jaxweights.core import every as every
from jaxweights.core import identity as identity
from jaxweights.core import leafwise as leafwise
from jaxweights.core import materialized as materialized
from jaxweights.core import merge_stats as merge_stats
from jaxweights.core import partition as partition
from jaxweights.core import partition_by as partition_by
from jaxweights.core import plan as plan
from jaxweights.core import split as split
from jaxweights.core import stateless as stateless
from jaxweights.core import to_optax as to_optax
from jaxweights.lift import infer_layout as infer_layout
from jaxweights.lift import lift as lift
from jaxweights.weights import Axes as Axes
from jaxweights.weights import LowRank as LowRank
from jaxweights.weights import Masked as Masked
from jaxweights.weights import Quantized as Quantized
from jaxweights.weights import Weight as Weight
from jaxweights.weights import is_weight as is_weight
from jaxweights.weights import materialize as materialize

if _typing.TYPE_CHECKING:
    from jaxweights import adapt as adapt
    from jaxweights import align as align
    from jaxweights import analyze as analyze
    from jaxweights import checkpoint as checkpoint
    from jaxweights import merge as merge
    from jaxweights import models as models
    from jaxweights import quantize as quantize
    from jaxweights import recipes as recipes
    from jaxweights import sparsify as sparsify
    from jaxweights import stream as stream

__version__ = "0.8.0"

# Loaded when first used, so that the import stays quick: most programs use one or two families, and
# some of these touch Flax, Orbax and files.
_LAZY = (
    "adapt",
    "align",
    "analyze",
    "checkpoint",
    "merge",
    "models",
    "quantize",
    "recipes",
    "sparsify",
    "stream",
)

# What help() lists; type checkers read the imports.
__all__ = [*(name for name in dir() if not name.startswith("_")), *_LAZY]  # pyright: ignore


def __getattr__(name: str) -> _typing.Any:
    if name in _LAZY:
        return _importlib.import_module(f"jaxweights.{name}")
    # With the name and the module, Python adds the nearest name to the message.
    this = _sys.modules[__name__]
    raise AttributeError(f"module 'jaxweights' has no attribute {name!r}", name=name, obj=this)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
