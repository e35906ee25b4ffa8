"""The model's classes, where scripts look for transformers' (`transformers.models.opt.modeling_opt`)."""

from opt_common.config import OPTConfig

from .heads import OPTForQuestionAnswering, OPTForSequenceClassification
from .layers import OPTLearnedPositionalEmbedding
from .model import OPTAttention, OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel
from .pretrained import OPTPreTrainedModel

__all__ = [
    "OPTAttention",
    "OPTConfig",
    "OPTDecoder",
    "OPTDecoderLayer",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTLearnedPositionalEmbedding",
    "OPTModel",
    "OPTPreTrainedModel",
]
