"""The algebra: transforms, how they combine, and what they read."""

from jaxweights.core._apply import apply as apply
from jaxweights.core._chain import chain as chain
from jaxweights.core._context import Context as Context
from jaxweights.core._layout import Layout as Layout
from jaxweights.core._layout import conventional_layout as conventional_layout
from jaxweights.core._leafwise import leafwise as leafwise
from jaxweights.core._materialized import materialized as materialized
from jaxweights.core._optax import to_optax as to_optax
from jaxweights.core._partition import partition as partition
from jaxweights.core._partition import partition_by as partition_by
from jaxweights.core._paths import Flat as Flat
from jaxweights.core._paths import Params as Params
from jaxweights.core._paths import Path as Path
from jaxweights.core._paths import flatten as flatten
from jaxweights.core._paths import path_key as path_key
from jaxweights.core._paths import unflatten as unflatten
from jaxweights.core._plan import Plan as Plan
from jaxweights.core._plan import plan as plan
from jaxweights.core._rank_search import magnitude_bits as magnitude_bits
from jaxweights.core._schedule import between as between
from jaxweights.core._schedule import every as every
from jaxweights.core._select import kth_smallest as kth_smallest
from jaxweights.core._select import largest as largest
from jaxweights.core._select import smallest as smallest
from jaxweights.core._select import smallest_of_leaves as smallest_of_leaves
from jaxweights.core._split import Frozen as Frozen
from jaxweights.core._split import combine as combine
from jaxweights.core._split import split as split
from jaxweights.core._stats import STATISTICS as STATISTICS
from jaxweights.core._stats import Needs as Needs
from jaxweights.core._stats import Statistic as Statistic
from jaxweights.core._stats import Stats as Stats
from jaxweights.core._stats import merge_stats as merge_stats
from jaxweights.core._transform import Transform as Transform
from jaxweights.core._transform import identity as identity
from jaxweights.core._transform import stateless as stateless

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
