"""From a checkpoint to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from opt_common.checkpoint import MAX_SHARD_SIZE
from opt_common.pretrained import open_pretrained
from opt_common.pretrained import save_pretrained as save
from opt_common.weights import FLAX, Spec, table

if TYPE_CHECKING:
    from .model import FlaxOPTForCausalLM, FlaxOPTModel

Model = TypeVar("Model", bound="FlaxOPTModel | FlaxOPTForCausalLM")


def from_pretrained(
    cls: type[Model],
    path_or_name: str | Path,
    *,
    dtype: str | DTypeLike = "float32",
    attn_implementation: str = "sdpa",
    **hub: Any,
) -> Model:
    """The model of a checkpoint.

    path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
    dtype: a jax dtype, its name, or "auto" for the checkpoint's.
    attn_implementation: "sdpa", "eager" or "cudnn"; see `opt_flax.attention`.
    hub: revision, cache_dir, token, local_files_only, as in huggingface_hub.
    The weights go to jax's default device, tensor by tensor as they are read.
    Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    opened = open_pretrained(path_or_name, cls.weights_prefix, name, **hub)
    wanted = jnp.dtype(opened.dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError("dtype: found float64, which jax has only after jax.config.update('jax_enable_x64', True)")
    # shapes without memory, and no random numbers
    model = nnx.eval_shape(lambda: cls(opened.config, wanted, attn_implementation, rngs=nnx.Rngs(0)))
    for spec, array in opened.tensors:
        array = np.ascontiguousarray(array, wanted)
        FLAX.parameter(model, spec).set_value(jnp.asarray(array))
        del array  # or it would be held while the next is read
    return model


def save_pretrained(
    model: FlaxOPTModel | FlaxOPTForCausalLM, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a folder that every framework here and transformers load: config.json, generation_config.json and
    safetensors of at most `max_shard_size` bytes a file. Killed half-way, it leaves the old folder or the new one."""

    def get(spec: Spec) -> np.ndarray:
        return np.asarray(FLAX.parameter(model, spec)[...])

    first = next(table(model.config, model.weights_prefix))
    dtype = FLAX.parameter(model, first).dtype.name
    save(folder, model.config, model.weights_prefix, dtype, get, max_shard_size)
