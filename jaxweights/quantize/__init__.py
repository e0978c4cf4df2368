"""Integers in place of floats: grids, rounding and what calibration adds to it."""

from jaxweights.quantize._add_deltas import MergeLoss as MergeLoss
from jaxweights.quantize._add_deltas import add_deltas as add_deltas
from jaxweights.quantize._gptq import GptqMatrix as GptqMatrix
from jaxweights.quantize._gptq import gptq as gptq
from jaxweights.quantize._gptq import gptq_matrix as gptq_matrix
from jaxweights.quantize._grid import Codes as Codes
from jaxweights.quantize._grid import Grid as Grid
from jaxweights.quantize._grid import decode as decode
from jaxweights.quantize._grid import quantize_matrix as quantize_matrix
from jaxweights.quantize._output_error import output_error as output_error
from jaxweights.quantize._requantize import Requantized as Requantized
from jaxweights.quantize._requantize import requantize as requantize
from jaxweights.quantize._round_to_nearest import round_to_nearest as round_to_nearest
from jaxweights.quantize.training import binary as binary
from jaxweights.quantize.training import fake_quant as fake_quant
from jaxweights.quantize.training import lsq as lsq
from jaxweights.quantize.training import lsq_round as lsq_round
from jaxweights.quantize.training import lsq_step as lsq_step
from jaxweights.quantize.training import pact as pact
from jaxweights.quantize.training import settle as settle
from jaxweights.quantize.training import shrink_embedding_gradients as shrink_embedding_gradients
from jaxweights.quantize.training import shrink_gradient as shrink_gradient
from jaxweights.quantize.training import stochastic_rounding as stochastic_rounding
from jaxweights.quantize.training import straight_through as straight_through
from jaxweights.quantize.training import ternary as ternary
