"""The model's classes, where scripts look for transformers' (`transformers.models.opt.modeling_opt`)."""

from .heads import OPTForQuestionAnswering, OPTForSequenceClassification
from .layers import OPTLearnedPositionalEmbedding
from .model import OPTAttention, OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel
from .pretrained import OPTPreTrainedModel

__all__ = [
    "OPTAttention",
    "OPTDecoder",
    "OPTDecoderLayer",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTLearnedPositionalEmbedding",
    "OPTModel",
    "OPTPreTrainedModel",
]
