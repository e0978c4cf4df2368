"""Representations: small frozen pytrees that stand for a dense weight."""

from jaxweights.weights._axes import CONV_HWIO as CONV_HWIO
from jaxweights.weights._axes import CONV_OIHW as CONV_OIHW
from jaxweights.weights._axes import EMBEDDING as EMBEDDING
from jaxweights.weights._axes import OUTPUTS_FIRST as OUTPUTS_FIRST
from jaxweights.weights._axes import Axes as Axes
from jaxweights.weights._axes import View as View
from jaxweights.weights._codebook import Codebook as Codebook
from jaxweights.weights._factored import Factored as Factored
from jaxweights.weights._hadamard import hadamard_matrix as hadamard_matrix
from jaxweights.weights._hadamard import hadamard_order as hadamard_order
from jaxweights.weights._hadamard import hadamard_transform as hadamard_transform
from jaxweights.weights._input_changes import InputChange as InputChange
from jaxweights.weights._input_changes import Rescaled as Rescaled
from jaxweights.weights._input_changes import Rotated as Rotated
from jaxweights.weights._learned_step import LearnedStep as LearnedStep
from jaxweights.weights._low_rank import LowRank as LowRank
from jaxweights.weights._masked import Masked as Masked
from jaxweights.weights._matrix_weight import MatrixWeight as MatrixWeight
from jaxweights.weights._narrow_float import NarrowFloat as NarrowFloat
from jaxweights.weights._outliers import Outliers as Outliers
from jaxweights.weights._packed_sparse import BitmaskSparse as BitmaskSparse
from jaxweights.weights._packed_sparse import PackedNM as PackedNM
from jaxweights.weights._packed_sparse import pack_sparse as pack_sparse
from jaxweights.weights._quantized import Quantized as Quantized
from jaxweights.weights._quantized_product import QuantizedProduct as QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs as RoundedInputs
from jaxweights.weights._scaled import Scaled as Scaled
from jaxweights.weights._trits import Trits as Trits
from jaxweights.weights._weight import Weight as Weight
from jaxweights.weights._weight import is_weight as is_weight
from jaxweights.weights._weight import materialize as materialize
from jaxweights.weights._weight import static as static
from jaxweights.weights._weight import weight_dataclass as weight_dataclass

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
