"""Flax models of public checkpoints, and the names under which their weights are stored."""

from jaxweights.models._bert import Bert as Bert
from jaxweights.models._bert import BertConfig as BertConfig
from jaxweights.models._bert import sentence_embedding as sentence_embedding
from jaxweights.models._cache import KVCache as KVCache
from jaxweights.models._cache import init_cache as init_cache
from jaxweights.models._convert import checkpoint_from_params as checkpoint_from_params
from jaxweights.models._convert import param_shapes as param_shapes
from jaxweights.models._convert import params_from_checkpoint as params_from_checkpoint
from jaxweights.models._export import check_export as check_export
from jaxweights.models._export import export_checkpoint as export_checkpoint
from jaxweights.models._generate import generate as generate
from jaxweights.models._hf_json import config_to_dict as config_to_dict
from jaxweights.models._llama import Llama as Llama
from jaxweights.models._llama_config import LlamaConfig as LlamaConfig
from jaxweights.models._load import Pretrained as Pretrained
from jaxweights.models._load import load_pretrained as load_pretrained
from jaxweights.models._mixtral import mixtral_checkpoint as mixtral_checkpoint
from jaxweights.models._registry import ModelConfig as ModelConfig
from jaxweights.models._registry import build as build
from jaxweights.models._registry import config_from_dict as config_from_dict
from jaxweights.models._registry import config_from_gguf as config_from_gguf
from jaxweights.models._rope import RopeScaling as RopeScaling
from jaxweights.models._tokenizer import load_tokenizer as load_tokenizer

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
