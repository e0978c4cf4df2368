"""Zeros in place of the weights that matter least."""

from jaxweights.sparsify._groups import n_of_m_mask as n_of_m_mask
from jaxweights.sparsify._magnitude import magnitude as magnitude
from jaxweights.sparsify._wanda import wanda as wanda
from jaxweights.sparsify._wanda import wanda_scores as wanda_scores

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
