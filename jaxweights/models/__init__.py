"""Flax models of public checkpoints, and the names under which their weights are stored."""

from jaxweights.models._bert import Bert as Bert
from jaxweights.models._bert import BertConfig as BertConfig
from jaxweights.models._bert import sentence_embedding as sentence_embedding
from jaxweights.models._cache import KVCache as KVCache
from jaxweights.models._cache import init_cache as init_cache
from jaxweights.models._generate import generate as generate
from jaxweights.models._llama import Llama as Llama
from jaxweights.models._llama_config import LlamaConfig as LlamaConfig
from jaxweights.models._rope import RopeScaling as RopeScaling
