"""The model's classes, where scripts look for transformers' (`transformers.models.opt.modeling_flax_opt`)."""

from .layers import PositionalEmbedding as FlaxOPTLearnedPositionalEmbedding
from .model import FlaxOPTForCausalLM, FlaxOPTModel
from .model import OPTAttention as FlaxOPTAttention
from .model import OPTDecoder as FlaxOPTDecoder
from .model import OPTDecoderLayer as FlaxOPTDecoderLayer
from .pretrained import FlaxOPTPreTrainedModel

__all__ = [
    "FlaxOPTAttention",
    "FlaxOPTDecoder",
    "FlaxOPTDecoderLayer",
    "FlaxOPTForCausalLM",
    "FlaxOPTLearnedPositionalEmbedding",
    "FlaxOPTModel",
    "FlaxOPTPreTrainedModel",
]
