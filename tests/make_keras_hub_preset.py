"""Writes tests/goldens/keras-hub: a tiny OPT preset as keras-hub saves it, and its logits. Wants keras-hub:

KERAS_BACKEND=torch python tests/make_keras_hub_preset.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
from keras_hub.models import OPTBackbone, OPTCausalLM, OPTCausalLMPreprocessor, OPTTokenizer

FOLDER = Path(__file__).parent / "goldens" / "keras-hub"

rng = np.random.default_rng(0)
backbone = OPTBackbone(
    vocabulary_size=24, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=8
)
for weight in backbone.weights:
    weight.assign(rng.standard_normal(weight.shape))
words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrs", "ab"]
tokenizer = OPTTokenizer(vocabulary={word: i for i, word in enumerate(words)}, merges=["a b"])
model = OPTCausalLM(backbone, OPTCausalLMPreprocessor(tokenizer, sequence_length=8))
shutil.rmtree(FOLDER, ignore_errors=True)
model.save_to_preset(str(FOLDER))
for name in ("task.json", "preprocessor.json"):
    (FOLDER / name).unlink()
ids = rng.integers(3, 24, (2, 8))
logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
np.savez(FOLDER / "outputs.npz", ids=ids, logits=keras.ops.convert_to_numpy(logits))
