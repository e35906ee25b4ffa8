"""OPT in TensorFlow, as Keras 3 models."""

import os
import sys

if "keras" in sys.modules:
    _backend = sys.modules["keras"].config.backend()
else:
    _backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if _backend != "tensorflow":
    raise ImportError(
        f"opt_tf runs on Keras with TensorFlow, and Keras is set to {_backend!r}: set KERAS_BACKEND=tensorflow in the "
        "environment before anything imports keras"
    )

from opt_common import __version__ as __version__
from opt_common.config import OPTConfig
from opt_common.tokenizer import AutoTokenizer, GPT2Tokenizer

from . import outputs as outputs  # registers them
from .cache import KVCache
from .heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification
from .model import TFOPTForCausalLM, TFOPTModel
from .pretrained import TFOPTPreTrainedModel as TFOPTPreTrainedModel
from .pretrained import register

for _model in (TFOPTModel, TFOPTForCausalLM, TFOPTForSequenceClassification, TFOPTForQuestionAnswering):
    register(_model)

# transformers' names for what finds out itself which model it loads: here an OPT, or an error
AutoConfig = OPTConfig
TFAutoModel = TFOPTModel
TFAutoModelForCausalLM = TFOPTForCausalLM
TFAutoModelForQuestionAnswering = TFOPTForQuestionAnswering
TFAutoModelForSequenceClassification = TFOPTForSequenceClassification

__all__ = [
    "AutoConfig",
    "AutoTokenizer",
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
    "TFAutoModel",
    "TFAutoModelForCausalLM",
    "TFAutoModelForQuestionAnswering",
    "TFAutoModelForSequenceClassification",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
]
