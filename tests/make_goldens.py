"""What transformers' TensorFlow and Flax OPT answered, kept for the tests, since transformers 5 no longer has them.

Run once, in an environment of its own:

    pip install transformers==4.57.6 tensorflow==2.21 tf-keras==2.21 jax==0.10.2 flax==0.12.8 torch==2.13.0
    python tests/make_goldens.py

Writes tests/goldens/NAME/ with a tiny random checkpoint (config.json, model.safetensors) and outputs.npz, whose arrays
are float32: {tf,flax}_logits, {tf,flax}_hidden_0.., {tf,flax}_tokens, and the inputs. And goldens/safetensors/: one
model, as PyTorch, TensorFlow (whole and in shards) and Flax wrote it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # 4.57 knows Keras 2 only

import jax
import numpy as np
import tensorflow as tf
import torch
import transformers

CONFIGS = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
}
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
             max_position_embeddings=48, init_std=0.4)  # fmt: skip
NEW = 16


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    for name, changes in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, **changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            model.model.decoder.embed_positions.weight *= 3
        folder = Path(__file__).parent / "goldens" / name
        model.save_pretrained(folder)
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 64, (3, 10))
        mask = np.ones((3, 10), np.int64)
        mask[1, :4] = 0
        mask[2, :9] = 0
        ids[mask == 0] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        with tempfile.TemporaryDirectory() as bin_folder:  # its loaders read a .bin only
            model.save_pretrained(bin_folder, safe_serialization=False)
            tf_model = transformers.TFOPTForCausalLM.from_pretrained(bin_folder, from_pt=True)
            flax_model = transformers.FlaxOPTForCausalLM.from_pretrained(bin_folder, from_pt=True)
        for key, old in (("tf", tf_model), ("flax", flax_model)):
            given = {"input_ids": ids, "attention_mask": mask}
            if key == "tf":
                given = {k: tf.constant(v, tf.int32) for k, v in given.items()}
            out = old(**given, output_hidden_states=True)
            tokens = old.generate(**given, max_new_tokens=NEW, do_sample=False)
            arrays[f"{key}_logits"] = np.asarray(out.logits)
            for i, state in enumerate(out.hidden_states):
                arrays[f"{key}_hidden_{i}"] = np.asarray(state)
            arrays[f"{key}_tokens"] = np.asarray(tokens.sequences if key == "flax" else tokens)
            print(name, key, [len(set(row[10:])) for row in arrays[f"{key}_tokens"].tolist()], "distinct new tokens")
        np.savez_compressed(folder / "outputs.npz", **arrays)


def safetensors() -> None:
    folder = Path(__file__).parent / "goldens" / "safetensors"
    torch.manual_seed(2)
    tiny = dict(vocab_size=24, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16)
    config = transformers.OPTConfig(**tiny, max_position_embeddings=10, word_embed_proj_dim=4, init_std=0.4)
    model = transformers.OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder / "torch")
    with tempfile.TemporaryDirectory() as bin_folder:
        model.save_pretrained(bin_folder, safe_serialization=False)
        tf_model = transformers.TFOPTForCausalLM.from_pretrained(bin_folder, from_pt=True)
        flax_model = transformers.FlaxOPTForCausalLM.from_pretrained(bin_folder, from_pt=True)
    for name, limit in (("tf", "5GB"), ("tf-sharded", "3KB")):
        tf_model.save_pretrained(folder / name, safe_serialization=True, max_shard_size=limit)
    flax_model.save_pretrained(folder / "flax", safe_serialization=True)


if __name__ == "__main__":
    main()
    safetensors()
