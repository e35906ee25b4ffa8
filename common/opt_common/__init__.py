"""What the three OPTs share: config, the table of weights, checkpoints, the Hub, the tokenizer, the command line.

Importing this imports no framework.
"""

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.save import save_checkpoint
from .config import SIZES, OPTConfig
from .outputs import BaseModelOutput, CausalLMOutput
from .tokenizer import GPT2Tokenizer
from .weights import byte_count, parameter_count, table

__version__ = "0.1.0"  # the distribution's, and each package's

__all__ = [
    "SIZES",
    "BaseModelOutput",
    "CausalLMOutput",
    "Checkpoint",
    "GPT2Tokenizer",
    "OPTConfig",
    "byte_count",
    "parameter_count",
    "save_checkpoint",
    "table",
]
