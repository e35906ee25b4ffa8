"""OPT in NumPy: the float64 reference as a fourth framework. Shows that adding one takes no edit elsewhere."""

from opt_common import __version__ as __version__
from opt_common.config import OPTConfig
from opt_common.tokenizer import GPT2Tokenizer

from .model import NPOPTForCausalLM

__all__ = ["GPT2Tokenizer", "NPOPTForCausalLM", "OPTConfig"]
