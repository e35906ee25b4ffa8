"""What the models share besides the network: loading, saving, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from opt_common.checkpoints.pretrained import open_pretrained, save_pretrained
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.checkpoints.tensors import contiguous
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.weights import FLAX, Spec, table

from .attention import check_implementation
from .cache import KVCache
from .products import default_device


class FlaxOPTPreTrainedModel(nnx.Module):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`."""

    architecture: str
    generation_config: GenerationConfig | None = None  # the config's token ids, if None

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        if attn_implementation is not None:
            check_implementation(attn_implementation)
            config = dataclasses.replace(config, _attn_implementation=attn_implementation)
        self.config = config

    @property
    def _decoder(self) -> Any:
        return getattr(getattr(self, "model", self), "decoder")  # noqa: B009

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self._decoder.embed_positions.dtype)

    def set_attn_implementation(self, name: str) -> None:
        """Attend by "eager", "sdpa" or "cudnn" from now on; see `opt_flax.attention`."""
        check_implementation(name)
        # A new config: jit knows a model by the config object it was traced with, and would miss a change inside it
        config = dataclasses.replace(self.config, _attn_implementation=name)
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "config"):
                module.config = config  # pyright: ignore[reportAttributeAccessIssue]

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each layer's input for the backward pass, which recomputes the rest. Calls with a cache or
        output_attentions are not affected."""
        self._decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything that the backward pass needs, as by default."""
        self._decoder.gradient_checkpointing = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        dtype: str | DTypeLike = "float32",
        attn_implementation: str = "sdpa",
        sharding: Sharding | Callable[[str], Sharding] | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint.

        path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
        dtype: a jax dtype, its name, or "auto" for the checkpoint's.
        attn_implementation: "sdpa", "eager" or "cudnn"; see `opt_flax.attention`.
        sharding: how the weights lie on several devices: a jax Sharding for all, or a function from a tensor's name in
            the checkpoint ("model.decoder.layers.0.fc1.weight") to its own, over mesh axes of type Auto, as `Mesh`
            makes them. A NamedSharding names the axes of the checkpoint's tensor, [out, in]; the kernel is [in, out]
            and is sharded to match. Default: all on jax's default device.
        rngs: what a head is drawn with that the checkpoint does not hold; nnx.Rngs(0) by default.
        options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and config overrides: num_labels,
            id2label, problem_type, dropout ...
        A head missing from the checkpoint is newly initialized, and one that is not this model's is dropped; a warning
        names their weights.
        The weights go to their devices tensor by tensor as they are read, and no device gets more than its shards.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        # on a CPU an array may share the memory that was read
        copied = default_device().platform != "cpu"
        opened = open_pretrained(path_or_name, cls.architecture, name, copied=copied, **options)
        wanted = jnp.dtype(opened.dtype)
        if jax.dtypes.canonicalize_dtype(wanted) != wanted:
            raise ValueError("dtype: found float64, which jax has only after jax.config.update('jax_enable_x64', True)")
        # shapes without memory, and no random numbers
        model = nnx.eval_shape(lambda: cls(opened.config, wanted, attn_implementation, rngs=nnx.Rngs(0)))  # pyright: ignore[reportCallIssue]

        def put(spec: Spec, array: np.ndarray) -> None:
            given = sharding(spec.name) if callable(sharding) else sharding
            array, placement = FLAX.oriented(spec, array), _oriented(spec, given)
            # waited for: a transfer holds the host's memory until it is done
            FLAX.parameter(model, spec).set_value(_put(array, wanted, placement).block_until_ready())

        normal, key = nnx.initializers.normal(opened.config.init_std), (rngs or nnx.Rngs(0)).params()
        for spec in opened.new:
            put(spec, np.asarray(normal(key, spec.shape)) if spec.kind == "linear" else np.zeros(spec.shape))
        for spec, array in opened.tensors:
            put(spec, array)
            del array  # or it would be held while the next is read
        model.generation_config = opened.generation
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one."""

        def get(spec: Spec) -> np.ndarray:
            return contiguous(FLAX.oriented(spec, np.asarray(FLAX.parameter(self, spec)[...])))

        first = next(table(self.config, self.architecture))
        dtype = FLAX.parameter(self, first).dtype.name
        save_pretrained(
            folder, self.config, self.architecture, dtype, get, max_shard_size, generation=self.generation_config
        )


def _oriented(spec: Spec, sharding: Sharding | None) -> Sharding | None:
    """The sharding of a parameter, from that of its tensor in the checkpoint."""
    if not FLAX.transposes(spec) or not isinstance(sharding, NamedSharding):
        return sharding
    rows, columns, *_ = (*sharding.spec, None, None)
    return NamedSharding(sharding.mesh, PartitionSpec(columns, rows), memory_kind=sharding.memory_kind)


def _put(array: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(contiguous(array).astype(dtype, copy=False))
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: contiguous(array[part]).astype(dtype, copy=False)
    )
