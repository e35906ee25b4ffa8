"""OPT in Flax NNX."""

from opt_common.config import OPTConfig
from opt_common.tokenizer import GPT2Tokenizer

from . import outputs as outputs  # registers them
from .cache import KVCache
from .heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
from .model import FlaxOPTForCausalLM, FlaxOPTModel

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
]
