"""Tiny checkpoints with the structure of each published size, made with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opt_common.checkpoints.checkpoint import Checkpoint
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


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: entry.read() for name, entry in Checkpoint(folder).items()}


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any], **config: Any) -> Path:
    """Save a folder's tensors again, changed, and with other keys in its config.json."""
    tensors = arrays(folder)
    change(tensors)
    values = json.loads((folder / "config.json").read_text()) | config
    sources = [Source(name, x.shape, x.dtype.name, lambda x=x: x) for name, x in tensors.items()]
    save_checkpoint(folder, sources, {"config.json": json.dumps(values)})
    return folder


def gptq_columns(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [n, m] as int32 [n·bits/32, m], the first of a column in the lowest bits."""
    each = 32 // bits
    parts = numbers.astype(np.uint32).reshape(-1, each, numbers.shape[1])
    return (parts << (bits * np.arange(each, dtype=np.uint32))[:, None]).sum(1, dtype=np.uint32).view(np.int32)


def gptq_folder(
    folder: Path,
    config: OPTConfig,
    bits: int,
    size: int,
    symmetric: bool = True,
    shuffled: bool = False,
    form: str | None = None,
) -> dict[str, np.ndarray]:
    """Write random weights in GPTQ's format; returns them as floats by the Hub's names."""
    rng = np.random.default_rng(3)
    random_checkpoint(folder, config)
    tensors, floats = arrays(folder), {}
    for name in [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]:
        (out, into), path = tensors.pop(name).shape, name.removesuffix(".weight")
        group = np.arange(into) // (into if size == -1 else size)
        group = rng.permutation(group) if shuffled else group
        scales = rng.uniform(0.01, 0.1, (group.max() + 1, out)).astype(np.float16)
        numbers = rng.integers(0, 2**bits, (into, out))
        zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, scales.shape)
        stored = zeros if form == "gptq_v2" else (zeros - 1) % 2**bits
        tensors[f"{path}.qweight"], tensors[f"{path}.scales"] = gptq_columns(numbers, bits), scales
        tensors[f"{path}.qzeros"] = np.ascontiguousarray(gptq_columns(stored.T, bits).T)
        tensors[f"{path}.g_idx"] = group.astype(np.int32)
        floats[name] = ((numbers - zeros[group]) * scales[group].astype(np.float64)).T
    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": shuffled}
    if form is not None:
        said["checkpoint_format"] = form

    def replace(old: dict[str, np.ndarray]) -> None:
        old.clear()
        old.update(tensors)

    rewrite(folder, replace, quantization_config=said)
    return floats
