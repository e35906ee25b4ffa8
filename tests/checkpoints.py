"""Tiny checkpoints with the structure of each published size, made with numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source, numpy_dtype
from opt_common.config import SIZES, OPTConfig
from opt_common.weights import table

VOCABULARY = '{"a": 4, "b": 5}'


def tiny_config(size: str = "125m", layers: int | None = None, **changes: Any) -> OPTConfig:
    """The layers, norms, projections and config keys of a published size; one number wide a head, 4 for 350m."""
    heads = SIZES[size]["num_attention_heads"] if layers is None else 4
    values: dict[str, Any] = dict(
        num_hidden_layers=layers or SIZES[size]["num_hidden_layers"],
        hidden_size=2 * heads,
        num_attention_heads=heads,
        ffn_dim=8 * heads,
        vocab_size=24,
        max_position_embeddings=10,
        dtype="float16",
        do_layer_norm_before=SIZES[size].get("do_layer_norm_before", True),
        unknown={"prefix": "</s>", "activation_dropout": 0.0} | ({"output_projection": True} if size == "13b" else {}),
    )
    if size == "350m":
        values["word_embed_proj_dim"] = heads
    return OPTConfig(**(values | changes))


def random_checkpoint(
    folder: Path, config: OPTConfig, seed: int = 0, layout: str = "safetensors", shards: int | str = "5GB"
) -> Path:
    """Random weights of `config` in its dtype, with a tokenizer's files beside them."""
    dtype, rng = config.dtype or "float32", np.random.default_rng(seed)
    arrays = {s.name: rng.standard_normal(s.shape).astype(numpy_dtype(dtype)) for s in table(config)}
    sources = [Source(name, array.shape, dtype, lambda a=array: a) for name, array in arrays.items()]
    texts = {"config.json": config.to_json(), "vocab.json": VOCABULARY, "merges.txt": "#version: 0.2\n",
             "generation_config.json": '{"eos_token_id": 2}\n'}  # fmt: skip
    save_checkpoint(folder, sources, texts, shards, layout=layout, config=config)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
