"""OPT in Flax NNX."""

from opt_common import __version__ as __version__
from opt_common.config import OPTConfig
from opt_common.tokenizer import AutoTokenizer, GPT2Tokenizer

from . import outputs as outputs  # registers them
from .cache import KVCache
from .heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
from .model import FlaxOPTForCausalLM, FlaxOPTModel
from .pretrained import FlaxOPTPreTrainedModel as FlaxOPTPreTrainedModel
from .sharding import shardings

# transformers' names for what finds out itself which model it loads: here an OPT, or an error
AutoConfig = OPTConfig
FlaxAutoModel = FlaxOPTModel
FlaxAutoModelForCausalLM = FlaxOPTForCausalLM
FlaxAutoModelForQuestionAnswering = FlaxOPTForQuestionAnswering
FlaxAutoModelForSequenceClassification = FlaxOPTForSequenceClassification

__all__ = [
    "AutoConfig",
    "AutoTokenizer",
    "FlaxAutoModel",
    "FlaxAutoModelForCausalLM",
    "FlaxAutoModelForQuestionAnswering",
    "FlaxAutoModelForSequenceClassification",
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
    "shardings",
]
