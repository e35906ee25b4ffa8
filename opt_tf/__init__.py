"""OPT in TensorFlow, as Keras 3 models."""

import os
import sys

if (
    _backend := sys.modules["keras"].config.backend()
    if "keras" in sys.modules
    else os.environ.setdefault("KERAS_BACKEND", "tensorflow")
) != "tensorflow":
    raise ImportError(
        f"opt_tf runs on Keras with TensorFlow, and Keras is set to {_backend!r}: set KERAS_BACKEND=tensorflow in the "
        "environment before anything imports keras"
    )

from opt_common.config import OPTConfig
from opt_common.tokenizer import GPT2Tokenizer

from .cache import KVCache
from .heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification
from .model import TFOPTForCausalLM, TFOPTModel

__all__ = [
    "GPT2Tokenizer",
    "KVCache",
    "OPTConfig",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
]
