"""Checkpoints: safetensors, GGUF and Orbax, read without trust and written whole or not at all."""

from jaxweights.checkpoint._atomic import atomic_directory as atomic_directory
from jaxweights.checkpoint._atomic import atomic_file as atomic_file
from jaxweights.checkpoint._checkpoint import Checkpoint as Checkpoint
from jaxweights.checkpoint._gguf import GGUFReader as GGUFReader
from jaxweights.checkpoint._gguf import GGUFTensorInfo as GGUFTensorInfo
from jaxweights.checkpoint._gguf import open_gguf as open_gguf
from jaxweights.checkpoint._orbax import LoadedTree as LoadedTree
from jaxweights.checkpoint._orbax import load_tree as load_tree
from jaxweights.checkpoint._orbax import save_tree as save_tree
from jaxweights.checkpoint._provenance import Provenance as Provenance
from jaxweights.checkpoint._safetensors import SafetensorsReader as SafetensorsReader
from jaxweights.checkpoint._safetensors import open_safetensors as open_safetensors
from jaxweights.checkpoint._safetensors_header import TensorInfo as TensorInfo
from jaxweights.checkpoint._saved import register_saved as register_saved
from jaxweights.checkpoint._source import open_checkpoint as open_checkpoint
from jaxweights.checkpoint._write_gguf import write_gguf as write_gguf
from jaxweights.checkpoint._write_safetensors import LazyTensor as LazyTensor
from jaxweights.checkpoint._write_safetensors import write_safetensors as write_safetensors

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
