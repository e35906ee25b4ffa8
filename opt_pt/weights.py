"""From a checkpoint to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.checkpoints.pretrained import save_pretrained as save
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.weights import TORCH, Spec

if TYPE_CHECKING:
    from .model import OPTPreTrainedModel

Model = TypeVar("Model", bound="OPTPreTrainedModel")


def from_pretrained(
    cls: type[Model],
    path_or_name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    torch_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    **options: Any,
) -> Model:
    """The model of a checkpoint, in eval mode.

    path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
    dtype: a torch dtype, its name, or "auto" for the checkpoint's; `torch_dtype` is its old spelling.
    device: where the weights go, tensor by tensor as they are read; the CPU by default.
    attn_implementation: "sdpa", "eager" or "flash_attention_2"; see `opt_pt.attention`.
    options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and keys of the config that are to be
        others than the checkpoint's: num_labels, id2label, problem_type, dropout ...
    A head that the checkpoint does not hold is drawn anew, and one that is not this model's is left out; a warning
    names their weights.
    Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
    """
    name = str(torch_dtype if torch_dtype is not None else dtype).removeprefix("torch.")
    from .model import OPTAttention  # which takes these functions from here

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
    model.load_state_dict(state, strict=False, assign=True)  # strict: the table has checked already; lm_head is tied
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, OPTAttention):
            module.fuse()
    return model.eval()


def save_pretrained(
    model: OPTPreTrainedModel, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a folder that every framework here and transformers load: config.json, generation_config.json and
    safetensors of at most `max_shard_size` bytes a file. Killed half-way, it leaves the old folder or the new one."""

    def get(spec: Spec) -> np.ndarray:
        return _array(TORCH.parameter(model, spec).detach())

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    save(folder, model.config, model.architecture, dtype, get, max_shard_size)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know numpy's bfloat16: hand over the bits
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()
