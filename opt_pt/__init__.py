"""OPT in PyTorch."""

from opt_common.config import OPTConfig
from opt_common.tokenizer import GPT2Tokenizer

from .cache import KVCache
from .model import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel

__all__ = [
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
]
