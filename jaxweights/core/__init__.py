"""The algebra: transforms, how they combine, and what they read."""

from jaxweights.core._apply import apply as apply
from jaxweights.core._apply import resolve_layout as resolve_layout
from jaxweights.core._chain import chain as chain
from jaxweights.core._context import Context as Context
from jaxweights.core._layout import Layout as Layout
from jaxweights.core._layout import conventional_layout as conventional_layout
from jaxweights.core._layout import is_default_target as is_default_target
from jaxweights.core._leafwise import describe_nonfinite as describe_nonfinite
from jaxweights.core._leafwise import leafwise as leafwise
from jaxweights.core._partition import partition as partition
from jaxweights.core._paths import Flat as Flat
from jaxweights.core._paths import Params as Params
from jaxweights.core._paths import Path as Path
from jaxweights.core._paths import fail as fail
from jaxweights.core._paths import flatten as flatten
from jaxweights.core._paths import nearest as nearest
from jaxweights.core._paths import path_key as path_key
from jaxweights.core._paths import unflatten as unflatten
from jaxweights.core._stats import STATISTICS as STATISTICS
from jaxweights.core._stats import Needs as Needs
from jaxweights.core._stats import Statistic as Statistic
from jaxweights.core._stats import Stats as Stats
from jaxweights.core._stats import merge_stats as merge_stats
from jaxweights.core._transform import Transform as Transform
from jaxweights.core._transform import identity as identity
from jaxweights.core._transform import stateless as stateless
