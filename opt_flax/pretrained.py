"""What the models share besides the network: loading, saving, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
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
from .functional import FunctionalModel, adopt, read, weighted, without_weights
from .products import default_device
from .sharding import Shardings


class FlaxOPTPreTrainedModel(FunctionalModel):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`; `build`
    makes its modules."""

    architecture: str
    generation_config: GenerationConfig | None = None  # the config's token ids, if None

    # What scripts read, with transformers' values
    config_class = OPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(
        self,
        config: OPTConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: DTypeLike = "float32",
        _do_init: bool = True,
        *,
        param_dtype: DTypeLike | None = None,
        attn_implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """A model with new weights.

        seed, or rngs: what they are drawn with. input_shape has no effect.
        dtype: of the computation. param_dtype: of the weights; dtype if they are drawn with rngs, else float32, as
            transformers' Flax classes have it.
        _do_init: False makes a model without weights, which takes them as the argument `params` of its calls.
        attn_implementation: "sdpa" (the default), "eager" or "cudnn"; see `opt_flax.attention`.
        """
        if attn_implementation is not None:
            check_implementation(attn_implementation)
            config = dataclasses.replace(config, _attn_implementation=attn_implementation)
        if not all(isinstance(size, int) for size in input_shape):
            raise ValueError(f"input_shape: found {input_shape!r}, wanted whole numbers, (batch, tokens)")
        self.config, self.seed, self.input_shape = config, seed, tuple(input_shape)
        dtype = jnp.dtype(dtype)
        stored = jnp.dtype(param_dtype or (jnp.float32 if rngs is None else dtype))
        if _do_init:
            self.build(dtype=dtype, param_dtype=stored, rngs=rngs or nnx.Rngs(seed))
        else:
            for name, value in vars(_shapes(type(self), config, dtype=dtype, param_dtype=stored)).items():
                if name not in vars(self):
                    setattr(self, name, value)

    def build(self, **how: Any) -> None:
        """Make the model's parts with new weights. how: dtype, param_dtype and rngs of each."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: OPTConfig, **options: Any) -> Self:
        """A model with new weights. Takes the constructor's options."""
        return cls(config, **options)

    _from_config = from_config

    # === Its parts ===

    @property
    def dtype(self) -> Any:
        """The dtype it computes in."""
        return self._decoder.embed_tokens.dtype

    @property
    def name_or_path(self) -> str:
        """The name or folder it was loaded from; empty for a new one."""
        return self.config.name_or_path

    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(x.size for x in jax.tree.leaves(read(self)))

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_decoder(self) -> Any:
        """The decoder."""
        return self.base_model.decoder

    @property
    def _decoder(self) -> Any:
        return self.get_decoder()

    def get_input_embeddings(self) -> nnx.Embed:
        """The token embedding."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: nnx.Embed) -> None:
        """Replace the token embedding."""
        self._decoder.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        """The language-modelling head, if it has one; the token embedding if it is tied."""
        if self.architecture != "OPTForCausalLM":
            return None
        return getattr(self, "lm_head") or self.get_input_embeddings()  # noqa: B009

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nnx.Embed:
        """Make the token embedding and the head `new_num_tokens` rows long, rounded up to `pad_to_multiple_of`, and
        return the embedding. New rows are the mean of the old ones, or with mean_resizing=False N(0, init_std²)."""
        adopt(self)
        table = self.get_input_embeddings()
        rows = table.num_embeddings if new_num_tokens is None else new_num_tokens
        rows += -rows % (pad_to_multiple_of or 1)
        head = getattr(self, "lm_head", None)
        table.embedding.set_value(self._resized(table.embedding[...], rows, mean_resizing))
        if head is not None:
            head.kernel.set_value(self._resized(head.kernel[...].T, rows, mean_resizing).T)
            head.out_features = rows
        table.num_embeddings = self._decoder.vocab_size = rows
        self._configure(vocab_size=rows)
        return table

    def _resized(self, weight: jax.Array, rows: int, mean: bool) -> jax.Array:
        kept, shape = weight[:rows], (max(0, rows - len(weight)), weight.shape[1])
        if mean:
            new = jnp.broadcast_to(weight.astype("float32").mean(0), shape)
        else:
            new = nnx.initializers.normal(self.config.init_std)(jax.random.key(0), shape)
        return jnp.concatenate([kept, new.astype(weight.dtype)])

    # === How it runs ===

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self._decoder.embed_positions.dtype)

    def set_attn_implementation(self, name: str) -> None:
        """Switch to "eager", "sdpa" or "cudnn"; see `opt_flax.attention`."""
        check_implementation(name)
        self._configure(_attn_implementation=name)

    def _configure(self, **changes: Any) -> None:
        config = self.config.changed(**changes)  # a new one: this one is also that of the model's clones
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "config"):
                module.config = config  # pyright: ignore[reportAttributeAccessIssue]

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each layer's input for the backward pass, which recomputes the rest. Calls with a cache or
        output_attentions are not affected."""
        self._decoder.gradient_checkpointing = True

    enable_gradient_checkpointing = gradient_checkpointing_enable  # the name in transformers' Flax classes

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._decoder.gradient_checkpointing = False

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model has `generate`."""
        return hasattr(cls, "generate")

    # === Loading and saving ===

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        dtype: str | DTypeLike = "float32",
        *,
        param_dtype: DTypeLike | None = None,
        attn_implementation: str | None = None,
        sharding: Sharding | Callable[[str], Sharding] | None = None,
        seed: int = 0,
        rngs: nnx.Rngs | None = None,
        input_shape: tuple[int, ...] = (1, 1),
        _do_init: bool = True,
        **options: Any,
    ) -> Self:
        """Load a checkpoint.

        path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
        dtype: a jax dtype, its name, or "auto" for the checkpoint's. param_dtype: the dtype of the weights, if it is
            not that of the computation.
        attn_implementation: "sdpa" (the default), "eager" or "cudnn"; see `opt_flax.attention`.
        sharding: how the weights lie on several devices: `opt_flax.shardings(mesh)`, a jax Sharding for all, or a
            function from a tensor's name in the checkpoint ("model.decoder.layers.0.fc1.weight") to its own, over mesh
            axes of type Auto, as `Mesh` makes them. A NamedSharding names the axes of the checkpoint's tensor, [out,
            in]; the kernel is [in, out] and is sharded to match. Default: all on jax's default device.
        seed, or rngs: for the new weights of a head that the checkpoint lacks. input_shape has no effect.
        _do_init: False returns a model without weights, and its params.
        options: those of `opt_common.checkpoints.pretrained.open_pretrained`: config=, revision, cache_dir, token,
            local_files_only ..., and config overrides: num_labels, id2label, problem_type, dropout ...
        A head missing from the checkpoint is newly initialized, and one that is not this model's is dropped; a warning
        names their weights.
        The weights go to their devices tensor by tensor as they are read, and no device gets more than its shards.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        if options.pop("tp_plan", None) is not None:
            raise ValueError("tp_plan: found one, wanted sharding=opt_flax.shardings(mesh)")
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        # on a CPU an array may share the memory that was read
        copied = default_device().platform != "cpu"
        opened = open_pretrained(path_or_name, cls.architecture, name, copied=copied, **options)
        if isinstance(sharding, Shardings):
            sharding.check(opened.config)
        wanted = jnp.dtype(opened.dtype)
        if jax.dtypes.canonicalize_dtype(wanted) != wanted:
            raise ValueError("dtype: found float64, which jax has only after jax.config.update('jax_enable_x64', True)")
        stored = jnp.dtype(param_dtype or wanted)
        model = _shapes(cls, opened.config, dtype=wanted, param_dtype=stored, attn_implementation=attn_implementation)

        def put(spec: Spec, array: np.ndarray) -> None:
            array, placement = FLAX.oriented(spec, array), _placement(spec, sharding)
            kind = jnp.dtype(spec.dtype(stored.name))
            # waited for: a transfer holds the host's memory until it is done
            FLAX.parameter(model, spec).set_value(_put(array, kind, placement).block_until_ready())

        normal, key = nnx.initializers.normal(opened.config.init_std), (rngs or nnx.Rngs(seed)).params()
        for spec in opened.new:
            put(spec, np.asarray(normal(key, spec.shape)) if spec.kind == "linear" else np.zeros(spec.shape))
        for spec, array in opened.tensors:
            if spec.kind != "shape":  # which the module knows
                put(spec, array)
            del array  # or it would be held while the next is read
        model.config.name_or_path, model.generation_config = str(path_or_name), opened.generation
        if _do_init:
            return model
        return without_weights(model), read(model)  # type: ignore[return-value]

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        token: str | bool | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one.

        params: weights to write in place of the model's. safe_serialization: False writes flax_model.msgpack, which
        transformers before 5 wrote. token is accepted and has no effect. Raises ValueError for push_to_hub: upload the
        folder with `huggingface_hub.upload_folder`.
        Sharded weights are gathered tensor by tensor. Where they are sharded over several processes, all must call
        this; the first one writes, and all return when the folder is there.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: found True; save, then huggingface_hub.upload_folder")
        model = weighted(self, params)

        def get(spec: Spec) -> np.ndarray:
            array = _whole(FLAX.parameter(model, spec)[...]).astype(jnp.dtype(spec.dtype(dtype.name)), copy=False)
            return contiguous(FLAX.oriented(spec, array))

        specs = [spec for spec in table(self.config, self.architecture) if spec.kind != "shape"]
        dtype = FLAX.parameter(model, specs[0]).dtype
        shared = not all(_is_here(FLAX.parameter(model, spec)[...]) for spec in specs)
        if shared and jax.process_index() > 0:
            for spec in specs:  # its part of each, in the order in which the first process writes
                get(spec)
            multihost_utils.sync_global_devices("save_pretrained")
            return
        layout = "safetensors" if safe_serialization else "flax-msgpack"
        save_pretrained(
            save_directory,
            self.config,
            self.architecture,
            dtype.name,
            get,
            max_shard_size,
            layout,
            self.generation_config,
        )
        if shared:
            multihost_utils.sync_global_devices("save_pretrained")


def _shapes(cls: Any, config: OPTConfig, **how: Any) -> Any:
    """A model that has the shapes of its weights alone: no memory, and no random numbers."""
    return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **how))


def _placement(spec: Spec, sharding: Sharding | Callable[[str], Sharding] | None) -> Sharding | None:
    """The sharding of a parameter, from that of its tensor in the checkpoint."""
    if isinstance(sharding, Shardings):
        sharding = sharding(spec.name, spec.shape)
    elif callable(sharding):
        sharding = sharding(spec.name)
    if not FLAX.transposes(spec) or not isinstance(sharding, NamedSharding):
        return sharding
    rows, columns, *_ = (*sharding.spec, None, None)
    return NamedSharding(sharding.mesh, PartitionSpec(columns, rows), memory_kind=sharding.memory_kind)


def _is_here(array: Any) -> bool:
    """Whether no part of an array lies on the devices of another process alone."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _whole(array: Any) -> np.ndarray:
    """All of an array; where it lies on the devices of several processes, all must call this."""
    return np.asarray(array) if _is_here(array) else multihost_utils.process_allgather(array, tiled=True)


def _put(array: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(contiguous(array).astype(dtype, copy=False))
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: contiguous(array[part]).astype(dtype, copy=False)
    )
