"""What the models share besides the network: loading, saving, settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from opt_common.checkpoints.pretrained import open_pretrained, save_pretrained
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.config import OPTConfig
from opt_common.weights import TORCH, Spec

from .attention import check_implementation
from .cache import KVCache
from .fast.products import pack


class OPTPreTrainedModel(nn.Module):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`."""

    architecture: str

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__()
        if attn_implementation is not None:
            check_implementation(attn_implementation)
            config = dataclasses.replace(config, _attn_implementation=attn_implementation)
        self.config = config

    @property
    def _decoder(self) -> Any:
        return getattr(self, "model", self).decoder

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        weight = self._decoder.embed_positions.weight
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    def set_attn_implementation(self, name: str) -> None:
        """Attend by "eager", "sdpa" or "flash_attention_2" from now on; see `opt_pt.attention`."""
        check_implementation(name)
        self.config._attn_implementation = name

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only each layer's input for the backward pass, which recomputes the rest. Calls with a
        cache are not affected."""
        self._decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything that the backward pass needs, as by default."""
        self._decoder.gradient_checkpointing = False

    def tie_weights(self) -> None:
        """Make `lm_head`, if there is one, share the token embedding, if the config says so."""
        head = self._modules.get("lm_head")
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self._decoder.embed_tokens.weight

    pack = pack

    # peft's language models look these up
    generation_config = None

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: KVCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of a call that continues a cache."""
        input_ids = input_ids if past_key_values is None else input_ids[:, int(past_key_values.length) :]
        return kwargs | {"input_ids": input_ids, "past_key_values": past_key_values}

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> Self:
        """Load a checkpoint, in eval mode.

        path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
        dtype: a torch dtype, its name, or "auto" for the checkpoint's; `torch_dtype` is its old spelling.
        device: where the weights go, tensor by tensor as they are read; the CPU by default.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; see `opt_pt.attention`.
        options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and config overrides: num_labels,
            id2label, problem_type, dropout ...
        A head missing from the checkpoint is newly initialized, and one that is not this model's is dropped; a warning
        names their weights.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        name = str(torch_dtype if torch_dtype is not None else dtype).removeprefix("torch.")
        elsewhere = torch.device(device or "cpu").type != "cpu"
        opened = open_pretrained(path_or_name, cls.architecture, name, copied=elsewhere, **options)
        wanted = getattr(torch, opened.dtype)
        with torch.device("meta"):  # shapes without memory, and no random numbers
            model = cls(opened.config, attn_implementation=attn_implementation)
        state = {}
        for spec, array in opened.tensors:
            state[spec.name] = _tensor(array).to(device=device, dtype=wanted)
            del array  # or it would be held while the next is read
        for spec in opened.new:
            state[spec.name] = torch.zeros(spec.shape, device=device, dtype=wanted)
            if spec.kind == "linear":
                state[spec.name].normal_(0.0, opened.config.init_std)
        # strict: the table has checked already, and the tied head is not in it
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one."""

        def get(spec: Spec) -> np.ndarray:
            return _array(TORCH.parameter(self, spec).detach())

        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        save_pretrained(folder, self.config, self.architecture, dtype, get, max_shard_size)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know numpy's bfloat16: hand over the bits
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()
