"""OPT in Flax NNX."""

from opt_common.config import OPTConfig
from opt_common.tokenizer import GPT2Tokenizer

from .cache import KVCache
from .model import FlaxOPTForCausalLM, FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification, FlaxOPTModel

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
]
