"""What the models share besides the network: loading, saving, and all that users ask of a model besides running it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from opt_common.checkpoints.pretrained import open_pretrained, save_pretrained
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.checkpoints.tensors import Source
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.kin import Kin
from opt_common.weights import TORCH, table

from . import parallel
from .attention import check_implementation
from .cache import KVCache
from .devices import check_device_map, device_of, dispatch, single_device
from .fast.products import pack
from .layers import init_weights


class OPTPreTrainedModel(Kin, nn.Module):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`; those of
    a user's own class, an OPTModel as its `model` and heads of its own, are a language model's."""

    architecture: ClassVar[str]

    # What Trainer, accelerate, peft and others read, with transformers' values
    config_class = OPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["OPTDecoderLayer"]
    _tied_weights_keys: ClassVar[dict[str, str] | None] = None
    _keys_to_ignore_on_save = None
    _is_stateful = False

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__()
        if not isinstance(config, OPTConfig):  # transformers'
            config = OPTConfig.from_pretrained(config)
        if attn_implementation is not None:
            config = dataclasses.replace(config, _attn_implementation=attn_implementation)
        check_implementation(config._attn_implementation)
        self.config = config
        self.generation_config: Any = GenerationConfig.from_model_config(config)
        self.warnings_issued: dict[str, bool] = {}

    # === Where it is and how large ===

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def name_or_path(self) -> str:
        """The name or folder it was loaded from; empty for a new one."""
        return self.config.name_or_path

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters; a tied head counts once."""
        left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else {}
        parameters = (p for p in self.parameters() if id(p) not in left_out)
        return sum(p.numel() for p in parameters if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The size in bytes of the parameters and, by default, the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    # === Its parts ===

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_decoder(self) -> nn.Module:
        """The decoder."""
        return getattr(self.base_model, "decoder", self)  # a decoder is its own

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the decoder."""
        self.base_model.decoder = decoder

    @property
    def _decoder(self) -> Any:
        return self.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._decoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The language-modelling head, if it has one."""
        return self._modules.get("lm_head")

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language-modelling head."""
        self.lm_head = value

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Make the head share the token embedding's weight, if it has one and the config says so."""
        head: Any = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Make the token embedding and the head `new_num_tokens` rows long, rounded up to `pad_to_multiple_of`, and
        return the embedding. New rows are the mean of the old ones, or with mean_resizing=False N(0, init_std²)."""
        old: Any = self.get_input_embeddings()
        rows = old.weight.shape[0] if new_num_tokens is None else new_num_tokens
        rows += -rows % (pad_to_multiple_of or 1)
        head: Any = self.get_output_embeddings()
        for module in {id(m): m for m in (old, head) if m is not None}.values():
            if module is old or not self.config.tie_word_embeddings:
                module.weight = self._resized(module.weight, rows, mean_resizing)
        if isinstance(old, nn.Embedding):
            old.num_embeddings = rows
            if old.padding_idx is not None and old.padding_idx >= rows:
                old.padding_idx = None
        if head is not None:
            head.out_features = rows
        self.config.update({"vocab_size": rows})
        self._decoder.vocab_size = rows
        self.tie_weights()
        return self.get_input_embeddings()

    @torch.no_grad()
    def _resized(self, weight: Tensor, rows: int, mean: bool) -> nn.Parameter:
        kept = weight[:rows].detach()
        new = weight.new_empty(max(0, rows - len(kept)), weight.shape[1])
        if mean:
            new.copy_(weight.float().mean(dim=0).to(weight.dtype).expand_as(new))
        else:
            new.normal_(0.0, self.config.init_std)
        return nn.Parameter(torch.cat([kept, new]), weight.requires_grad)

    tp_size, tp_rank = 1, 0  # of how many processes that share the model this is which

    # === How it runs ===

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row, all of it allocated now."""
        weight, layers = self._decoder.embed_positions.weight, self._decoder.layers
        heads = layers[0].self_attn.num_heads if layers else None  # fewer than the config's on each of several devices
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype, heads)

    def set_attn_implementation(self, name: str) -> None:
        """Switch to "eager", "sdpa" or "flash_attention_2"; see `opt_pt.attention`."""
        check_implementation(name)
        self.config._attn_implementation = name

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input for the backward pass, which recomputes the rest. Calls with a
        cache are not affected. gradient_checkpointing_kwargs: those of torch.utils.checkpoint; use_reentrant=False is
        the default."""
        self._decoder.gradient_checkpointing = True
        self._decoder.checkpoint_options = gradient_checkpointing_kwargs or {}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """transformers' newer name for `gradient_checkpointing_enable`, for every layer and without offloading."""
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers, offload: found {every_n_layers}, {offload}, wanted 1 and False")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._decoder.gradient_checkpointing = False

    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self._decoder.gradient_checkpointing

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let gradients flow to the token embedding's output, for adapters around frozen weights."""
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        self._require_grads_hook = hook

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if hook := self.__dict__.pop("_require_grads_hook", None):
            hook.remove()

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return hasattr(self, "generate")

    pack = pack

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of a call that continues a cache, as peft's language models request them: of what is given, the
        last `next_sequence_length` columns, by default those that the cache does not hold. (transformers 5 gives all
        columns by default, which its model cannot take beside the cache.) inputs_embeds replace the ids. A mask wider
        than the ids has columns of the cache in front, of which there are no ids."""
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        elif past_key_values is not None:  # prompt tuning's cache holds more tokens than there are ids
            T = input_ids.shape[1]
            held = 0 if attention_mask is None else max(0, attention_mask.shape[1] - T)
            input_ids = input_ids[:, max(0, min(int(past_key_values.get_seq_length()) - held, T - 1)) :]
        T = input_ids.shape[1]
        if position_ids is not None:
            kwargs["position_ids"] = position_ids[:, -T:]
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds[:, -T:]
        return kwargs | {
            "input_ids": input_ids if inputs_embeds is None else None,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """The other half of a decoding loop by hand: `prepare_inputs_for_generation`'s arguments for the next pass,
        with the cache of `outputs`, and mask and positions for `num_new_tokens` more."""
        if outputs.past_key_values is not None:
            model_kwargs["past_key_values"] = outputs.past_key_values
        if (mask := model_kwargs.get("attention_mask")) is not None:
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), num_new_tokens)], dim=1)
        if (positions := model_kwargs.get("position_ids")) is not None:
            more = positions[:, -1:] + torch.arange(1, num_new_tokens + 1, device=positions.device)
            model_kwargs["position_ids"] = torch.cat([positions, more], dim=1)
        return model_kwargs

    # === Smaller things that scripts and libraries ask for ===

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of a Linear or Embedding. A subclass may have its own way."""
        init_weights(module, self.config)

    def post_init(self) -> None:
        """Initialize the modules that a subclass added, as at the end of a constructor in transformers."""
        known = {id(m) for m in self.base_model.modules()} | {id(self.get_output_embeddings())}
        for module in self.modules():
            if id(module) not in known:
                self._init_weights(module)

    def add_model_tags(self, tags: Iterable[str] | str) -> None:
        """Add tags for the Hub's model card, kept in `model_tags`."""
        self.model_tags = [*getattr(self, "model_tags", []), *([tags] if isinstance(tags, str) else tags)]

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: its code comes from this package."""
        return False

    is_custom_code = is_remote_code

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Some input ids, for tracing."""
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)}

    # === Loading and saving ===

    @classmethod
    def from_config(cls, config: OPTConfig, attn_implementation: str | None = None, **kwargs: Any) -> Self:
        """A model with new weights, in the dtype that `dtype` or `torch_dtype` names."""
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        kwargs.pop("trust_remote_code", None)  # there is none
        if kwargs:
            raise TypeError(f"from_config: found unknown arguments {', '.join(sorted(kwargs))}")
        model = cls(config, attn_implementation)
        return model if dtype is None else model.to(getattr(torch, str(dtype).removeprefix("torch.")))

    _from_config = from_config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        attn_implementation: str | None = None,
        tp_plan: str | None = None,
        output_loading_info: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint, in eval mode.

        pretrained_model_name_or_path: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or
            not.
        dtype: a torch dtype, its name, or "auto" for the checkpoint's; float32 by default. `torch_dtype` is the
            older name.
        device: where the weights go, tensor by tensor as they are read; by default PyTorch's default device.
        device_map: the same, or "auto", "balanced", "sequential" or a dictionary from modules to devices, for several;
            with max_memory and offload_folder as in accelerate, which must be installed.
        attn_implementation: "sdpa" (the default), "eager" or "flash_attention_2"; see `opt_pt.attention`.
        tp_plan: "auto" under torchrun splits each layer over its processes, one per GPU; each reads its part of the
            files. To train with dropout, give all processes the same seed.
        output_loading_info: also return which weights were newly initialized or unused.
        state_dict: the weights, with None for pretrained_model_name_or_path and config=.
        options: those of `opt_common.checkpoints.pretrained.open_pretrained`: config=, revision, cache_dir, token,
            local_files_only, use_safetensors ..., and config overrides: num_labels, id2label, dropout ...
        Modules that a subclass adds are loaded too. They, or a head, are newly initialized where the checkpoint lacks
        them, and a head that is not this model's is dropped; a warning names their weights.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        name = str(torch_dtype if torch_dtype is not None else dtype or "float32").removeprefix("torch.")
        if state_dict is not None or pretrained_model_name_or_path is None:
            if state_dict is None or pretrained_model_name_or_path is not None or options.keys() != {"config"}:
                wanted = "None for pretrained_model_name_or_path beside it, and config= alone"
                raise ValueError(f"state_dict: found {'None' if state_dict is None else 'one'}, wanted {wanted}")
            model = cls.from_config(options["config"], attn_implementation, dtype=name)
            model.load_state_dict(state_dict)
            return model.to(device or single_device(device_map)).eval()
        if tp_plan is not None and (tp_plan != "auto" or device_map is not None):
            found = f"{tp_plan!r}" + (f" with device_map {device_map!r}" if device_map is not None else "")
            raise ValueError(f'tp_plan: found {found}, wanted "auto" alone')
        rank, world = (0, 1) if tp_plan is None else parallel.processes()
        if tp_plan is not None and device is None and torch.distributed.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        check_device_map(device_map, max_memory, offload_folder)
        device = single_device(device_map) if device is None else device
        if device is None and device_map is None:
            device = torch.get_default_device()
        elsewhere = torch.device(device or "cpu").type != "cpu"
        opened = open_pretrained(
            pretrained_model_name_or_path, _architecture(cls), name, copied=elsewhere, added=cls._added,
            part=lambda spec: parallel.index(spec, rank, world), **options,
        )  # fmt: skip
        wanted = getattr(torch, opened.dtype)
        with torch.device("meta"):  # shapes without memory, and no random numbers
            model = cls(opened.config) if attn_implementation is None else cls(opened.config, attn_implementation)
        model.to(wanted)
        if tp_plan is not None:
            values = json.loads(opened.config.to_json()) | {"dtype": opened.dtype}
            parallel.same(str(pretrained_model_name_or_path), values)
            parallel.split(model, rank, world)
        devices = device_of(model, device_map, max_memory, device)
        state, seen = {}, hashlib.sha256()
        for spec, array in opened.tensors:
            kind = getattr(torch, spec.dtype(opened.dtype))
            mine = tensor(array) if spec.kind != "shape" else parallel.shape_of_part(spec, world)
            if world > 1 and mine.shape == spec.shape and "vocab" not in spec.axes:  # what all read: norms, biases ...
                seen.update(array.tobytes())
            state[spec.name] = mine.to(device=devices(spec.path), dtype=kind)
            del array, mine  # or it would be held while the next is read
        if world > 1:
            parallel.same(str(pretrained_model_name_or_path), {"weights of digest": seen.hexdigest()[:16]})
        for spec in opened.new:
            state[spec.name] = torch.zeros(spec.shape, device=devices(spec.path), dtype=wanted)
            if spec.kind == "linear":
                state[spec.name].normal_(0.0, opened.config.init_std)
        # strict: the table has checked already, and the tied head is not in it
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        added = _initialize_added(model, opened.config, devices)
        model.load_state_dict({name: tensor(read()) for name, read in opened.added.items()}, strict=False)
        model.config.name_or_path, model.generation_config = str(pretrained_model_name_or_path), opened.generation
        model = dispatch(model.eval(), devices, offload_folder)
        if not output_loading_info:
            return model
        missing = [spec.name for spec in opened.new] + [name for name in added if name not in opened.added]
        info = {"missing_keys": missing, "unexpected_keys": opened.unused, "mismatched_keys": [], "error_msgs": []}
        return model, info  # type: ignore[return-value]

    @classmethod
    def _added(cls, config: OPTConfig) -> list[str]:
        """The names of the tensors that a subclass has besides OPT's."""
        if cls.__module__.startswith(f"{__package__}."):
            return []
        with torch.device("meta"):
            return list(_besides_the_table(cls(config)))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        variant: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one. The
        weights of modules that a subclass adds are written too; only it can load them.

        state_dict: weights to write in place of the model's, as from accelerate's `get_state_dict`.
        A model that lies in parts in several processes is written by the first of them, tensor by tensor, and must be
        saved by all.
        is_main_process: False writes nothing. safe_serialization: False writes pytorch_model.bin.
        save_function and token are accepted and have no effect. Raises ValueError for push_to_hub and variant: upload
        the folder with `huggingface_hub.upload_folder`.
        """
        if push_to_hub or variant is not None:
            name = "push_to_hub" if push_to_hub else "variant"
            raise ValueError(f"{name}: found {push_to_hub or variant!r}; save, then huggingface_hub.upload_folder")
        architecture = _architecture(type(self))
        weights, specs = state_dict or {}, [*table(self.config, architecture)]
        # first: it asks for the state dict, for which FSDP2 takes back the weights that a pass has left whole and cast
        added = _besides_the_table(self, weights)
        own = {s.name: weights[s.name] if s.name in weights else TORCH.parameter(self, s) for s in specs}
        dtype = str(next(iter(weights.values())).dtype if weights else self.dtype).removeprefix("torch.")
        layout = "safetensors" if safe_serialization else "torch"

        def write(get: Callable[[str], Tensor]) -> None:
            sources = [
                Source(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), lambda name=name: _array(get(name)))
                for name, x in added.items()
            ]
            save_pretrained(
                save_directory, self.config, architecture, dtype, lambda spec: _array(get(spec.name)), max_shard_size,
                layout, self.generation_config, sources,
            )  # fmt: skip

        tensors = own | added
        if parallel.spread(tensors.values()) or (self.tp_size > 1 and state_dict is None):
            parallel.gather(tensors, specs, write if is_main_process else None)
        elif is_main_process:
            write(tensors.__getitem__)


def _architecture(cls: type[OPTPreTrainedModel]) -> str:
    return getattr(cls, "architecture", "OPTForCausalLM")


def _besides_the_table(model: OPTPreTrainedModel, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of a state dict, the model's own by default, the tensors of modules that are not OPT's. Raises ValueError for one
    that is no floating-point tensor, which nothing here reads."""
    own = {spec.path for spec in table(model.config, _architecture(type(model)))} | {"lm_head"}
    added = {name: x for name, x in (weights or model.state_dict()).items() if name.rpartition(".")[0] not in own}
    for name, x in added.items():
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError(f"{name}: found {getattr(x, 'dtype', type(x).__name__)}, wanted floating-point numbers")
    return added


def _initialize_added(model: OPTPreTrainedModel, config: OPTConfig, devices: Callable[[str], Any]) -> list[str]:
    """Give memory and new weights to the modules that a subclass adds; returns their names."""
    added = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    for path in dict.fromkeys(name.rpartition(".")[0] for name in added):
        module = model.get_submodule(path)
        module.to_empty(device=devices(path), recurse=False)
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            model._init_weights(module)
        elif reset is not None:
            reset()
        else:
            for p in module.parameters(recurse=False):
                nn.init.normal_(p, 0.0, config.init_std)
    return added


def tensor(array: np.ndarray) -> Tensor:
    """An array's numbers, in the same memory."""
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know numpy's bfloat16: hand over the bits
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
