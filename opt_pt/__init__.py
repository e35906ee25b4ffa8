"""OPT in PyTorch."""

from opt_common import __version__ as __version__
from opt_common.config import OPTConfig
from opt_common.tokenizer import AutoTokenizer, GPT2Tokenizer

from . import outputs as outputs  # registers them
from .cache import KVCache
from .fast.plain import register
from .heads import OPTForQuestionAnswering, OPTForSequenceClassification
from .layers import OPTLearnedPositionalEmbedding
from .model import OPTAttention, OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel
from .parallel import LinearByInputs, LinearByOutputs, QuantizedByInputs, QuantizedByOutputs
from .pretrained import OPTPreTrainedModel as OPTPreTrainedModel
from .quantized import QuantizedLinear

register(
    OPTLearnedPositionalEmbedding, OPTAttention, OPTDecoderLayer, OPTDecoder, OPTModel, OPTForCausalLM, QuantizedLinear,
    LinearByOutputs, LinearByInputs, QuantizedByOutputs, QuantizedByInputs,
)  # fmt: skip

# transformers' names for what finds out itself which model it loads: here an OPT, or an error
AutoConfig = OPTConfig
AutoModel = OPTModel
AutoModelForCausalLM = OPTForCausalLM
AutoModelForQuestionAnswering = OPTForQuestionAnswering
AutoModelForSequenceClassification = OPTForSequenceClassification

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
]
