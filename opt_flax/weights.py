"""From a checkpoint to a model, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.checkpoints.pretrained import save_pretrained as save
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.weights import FLAX, Spec, table

from .attention import default_device

if TYPE_CHECKING:
    from .model import FlaxOPTPreTrainedModel

Model = TypeVar("Model", bound="FlaxOPTPreTrainedModel")


def from_pretrained(
    cls: type[Model],
    path_or_name: str | Path,
    *,
    dtype: str | DTypeLike = "float32",
    attn_implementation: str = "sdpa",
    sharding: Sharding | Callable[[str], Sharding] | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Model:
    """The model of a checkpoint.

    path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
    dtype: a jax dtype, its name, or "auto" for the checkpoint's.
    attn_implementation: "sdpa", "eager" or "cudnn"; see `opt_flax.attention`.
    sharding: how the weights lie on several devices: a jax Sharding for all, or a function from a tensor's name in the
        checkpoint ("model.decoder.layers.0.fc1.weight", [out, in]) to its own, over mesh axes of type Auto, as `Mesh`
        makes them. Default: all on jax's default device.
    rngs: what a head is drawn with that the checkpoint does not hold; nnx.Rngs(0) by default.
    options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and keys of the config that are to be
        others than the checkpoint's: num_labels, id2label, problem_type, dropout ...
    Such a head, and one that is not this model's and so is left out, are named in a warning.
    The weights go to their devices tensor by tensor as they are read, and no device gets more than its shards.
    Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    # a CPU's arrays may be the very memory that was read
    copied = default_device().platform != "cpu"
    opened = open_pretrained(path_or_name, cls.architecture, name, copied=copied, **options)
    wanted = jnp.dtype(opened.dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError("dtype: found float64, which jax has only after jax.config.update('jax_enable_x64', True)")
    # shapes without memory, and no random numbers
    model = nnx.eval_shape(lambda: cls(opened.config, wanted, attn_implementation, rngs=nnx.Rngs(0)))  # pyright: ignore[reportCallIssue]

    def place(spec: Spec) -> Sharding | None:
        return sharding if sharding is None or isinstance(sharding, Sharding) else sharding(spec.name)

    normal, key = nnx.initializers.normal(opened.config.init_std), (rngs or nnx.Rngs(0)).params()
    for spec in opened.new:
        array = np.asarray(normal(key, spec.shape)) if spec.kind == "linear" else np.zeros(spec.shape)
        FLAX.parameter(model, spec).set_value(_put(array, wanted, place(spec)))
    for spec, array in opened.tensors:
        # waited for: a transfer holds the host's memory until it is done
        FLAX.parameter(model, spec).set_value(_put(array, wanted, place(spec)).block_until_ready())
        del array  # or it would be held while the next is read
    return model


def _put(array: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(np.ascontiguousarray(array, dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda part: np.ascontiguousarray(array[part], dtype))


def save_pretrained(
    model: FlaxOPTPreTrainedModel, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a folder that every framework here and transformers load: config.json, generation_config.json and
    safetensors of at most `max_shard_size` bytes a file. Killed half-way, it leaves the old folder or the new one."""

    def get(spec: Spec) -> np.ndarray:
        return np.asarray(FLAX.parameter(model, spec)[...])

    first = next(table(model.config, model.architecture))
    dtype = FLAX.parameter(model, first).dtype.name
    save(folder, model.config, model.architecture, dtype, get, max_shard_size)
