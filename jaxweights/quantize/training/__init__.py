"""Quantization inside a training loop."""

from jaxweights.quantize.training._annealing import confidence_annealing as confidence_annealing
from jaxweights.quantize.training._bitnet import binary as binary
from jaxweights.quantize.training._bitnet import ternary as ternary
from jaxweights.quantize.training._lsq import lsq as lsq
from jaxweights.quantize.training._lsq import lsq_round as lsq_round
from jaxweights.quantize.training._lsq import lsq_step as lsq_step
from jaxweights.quantize.training._lsq import settle as settle
from jaxweights.quantize.training._oscillation import OscillationState as OscillationState
from jaxweights.quantize.training._oscillation import oscillation_monitor as oscillation_monitor
from jaxweights.quantize.training._pact import pact as pact
from jaxweights.quantize.training._query_key import QueryKey as QueryKey
from jaxweights.quantize.training._query_key import query_key_logits as query_key_logits
from jaxweights.quantize.training._query_key import query_key_product as query_key_product
from jaxweights.quantize.training._shrink_gradient import (
    shrink_embedding_gradients as shrink_embedding_gradients,
)
from jaxweights.quantize.training._shrink_gradient import shrink_gradient as shrink_gradient
from jaxweights.quantize.training._statsq import statsq as statsq
from jaxweights.quantize.training._statsq import statsq_matrix as statsq_matrix
from jaxweights.quantize.training._stochastic import stochastic_rounding as stochastic_rounding
from jaxweights.quantize.training._straight_through import fake_quant as fake_quant
from jaxweights.quantize.training._straight_through import straight_through as straight_through

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
