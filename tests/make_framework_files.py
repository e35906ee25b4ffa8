"""Writes tests/goldens/frameworks: one tiny 350m-shaped OPT as transformers' TensorFlow and Flax classes save it, for
tests where these are not installed. Wants transformers 4.57 with TensorFlow and Flax:

    python tests/make_framework_files.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import torch
from transformers import FlaxOPTForCausalLM, OPTConfig, OPTForCausalLM, TFOPTForCausalLM

FOLDER = Path(__file__).parent / "goldens" / "frameworks"

config = OPTConfig(
    vocab_size=24,
    hidden_size=8,
    word_embed_proj_dim=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=16,
    max_position_embeddings=8,
    do_layer_norm_before=False,
)
torch.manual_seed(0)
model = OPTForCausalLM(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
shutil.rmtree(FOLDER, ignore_errors=True)
model.save_pretrained(FOLDER / "torch")
for name, cls in {"tf": TFOPTForCausalLM, "flax": FlaxOPTForCausalLM}.items():
    theirs = cls.from_pretrained(FOLDER / "torch", from_pt=True)
    theirs.save_pretrained(FOLDER / name, safe_serialization=False)
    theirs.save_pretrained(FOLDER / f"{name}-sharded", safe_serialization=False, max_shard_size="3KB")
