"""OPT's tokenizer: GPT-2's byte-level BPE, with `</s>` in front of every text. The calls are transformers 5's."""

from .auto import AutoTokenizer
from .encoding import BatchEncoding
from .gpt2 import GPT2Tokenizer

__all__ = ["AutoTokenizer", "BatchEncoding", "GPT2Tokenizer"]
