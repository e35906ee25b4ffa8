"""The model's classes, where scripts look for transformers' (`transformers.models.opt.modeling_tf_opt`)."""

from .layers import PositionalEmbedding as TFOPTLearnedPositionalEmbedding
from .model import OPTAttention as TFOPTAttention
from .model import OPTDecoder as TFOPTDecoder
from .model import OPTDecoderLayer as TFOPTDecoderLayer
from .model import TFOPTForCausalLM, TFOPTModel
from .pretrained import TFOPTPreTrainedModel

__all__ = [
    "TFOPTAttention",
    "TFOPTDecoder",
    "TFOPTDecoderLayer",
    "TFOPTForCausalLM",
    "TFOPTLearnedPositionalEmbedding",
    "TFOPTModel",
    "TFOPTPreTrainedModel",
]
