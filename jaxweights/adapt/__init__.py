"""Adapters: trainable parts beside frozen weights, added and merged as pure functions."""

from jaxweights.adapt._adapters import RankLoss as RankLoss
from jaxweights.adapt._combine import combine_adapters as combine_adapters
from jaxweights.adapt._extract import Extraction as Extraction
from jaxweights.adapt._extract import extract_lora as extract_lora
from jaxweights.adapt._lora import factors as factors
from jaxweights.adapt._lora import lora as lora
from jaxweights.adapt._lora import rslora as rslora
from jaxweights.adapt._merge import MergeLoss as MergeLoss
from jaxweights.adapt._merge import merge_adapters as merge_adapters
from jaxweights.adapt._merge import unmerge as unmerge
from jaxweights.adapt._merge_deltas import merge_adapter_deltas as merge_adapter_deltas
from jaxweights.adapt._truncate import truncate as truncate

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
