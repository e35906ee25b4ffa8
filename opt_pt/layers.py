"""What the model is built of besides PyTorch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_common.config import OPTConfig
from opt_common.inputs import check_classes, check_kind
from opt_common.kin import Kin

from .fast.layer import layer_forward
from .fast.products import linear as linear  # a Linear, by its fastest route
from .inputs import recording
from .quantized import QuantizedLinear

# As modules, so that hooks see them and users can replace them
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


class OPTLearnedPositionalEmbedding(Kin, nn.Embedding):
    """The position table. Position p is row p + 2: OPT's table starts two rows in, and padding, at -1, is row 1."""

    offset = 2

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        rows = num_embeddings + self.offset
        super().__init__(rows, embedding_dim, _weight=torch.empty(rows, embedding_dim))

    def forward(
        self, attention_mask: Tensor | None, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Look up position_ids [B, T]; by default the count of real tokens before each in attention_mask [B, S]."""
        if position_ids is None:
            if attention_mask is None:
                raise ValueError("attention_mask, position_ids: found neither, wanted one to count positions by")
            real = attention_mask.long()
            position_ids = (real.cumsum(1) * real - 1)[:, past_key_values_length:]
        return super().forward(position_ids + self.offset)


def embedding(rows: int, width: int, padding_idx: int | None) -> nn.Embedding:
    """An nn.Embedding whose padding row takes no gradient. Its weights are not drawn here: `init_weights` does, and on
    the meta device drawing would import half of PyTorch's compiler."""
    return nn.Embedding(rows, width, padding_idx=padding_idx, _weight=torch.empty(rows, width))


def runner(decoder: Any, layer: nn.Module, cache: Any) -> Callable[..., Tensor]:
    """What to call for a layer of a decoder: a faster route where it computes the same; in training, with the decoder's
    gradient checkpointing and layerdrop."""
    run: Callable[..., Tensor] = partial(layer_forward, layer)
    if decoder.gradient_checkpointing and decoder.training and cache is None and torch.is_grad_enabled():
        # no options where only the flag was set, by hand
        run = partial(checkpointed, layer, {"use_reentrant": False} | decoder.__dict__.get("checkpoint_options", {}))
    return partial(layerdrop, decoder.layerdrop, run) if decoder.training and decoder.layerdrop > 0 else run


def checkpointed(layer: nn.Module, options: dict[str, Any], hidden_states: Tensor, **how: Any) -> Tensor:
    """Run a layer under torch.utils.checkpoint, whose reentrant way takes no keywords for it."""
    if options["use_reentrant"]:
        return checkpoint(partial(layer, **how), hidden_states, **options)  # type: ignore[return-value]
    return checkpoint(layer, hidden_states, **how, **options)  # type: ignore[return-value]


def layerdrop(rate: float, run: Callable[..., Tensor], hidden_states: Tensor, **how: Any) -> Tensor:
    """Skip a layer with probability `rate`. The draw is a tensor, so that compiling does not freeze it."""
    after = run(hidden_states, **how)
    return torch.where(torch.rand((), device=after.device) < rate, hidden_states, after)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The mean loss of logits [B, T, V] against the next token's label [B, T], -100 left out; or against
    `shift_labels`, the labels already shifted. `num_items_in_batch`: the sum over this number, in place of the mean.
    vocab_size: V, which transformers gives its losses."""
    if labels.numel() != logits.shape[0] * logits.shape[1]:
        raise ValueError(f"labels: found shape {list(labels.shape)}, wanted {list(logits.shape[:2])}")
    if shift_labels is None:
        # the labels are shifted, not the logits: part of the logits would be copied, and its gradient once more
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=-100)
    scores, targets = wide(logits).flatten(0, 1), classes("labels", shift_labels.flatten(), logits.shape[-1])
    targets = targets.to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets)
    items = num_items_in_batch.to(logits.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return F.cross_entropy(scores, targets, reduction="sum") / items


def classes(name: str, labels: Tensor, number: int) -> Tensor:
    """Labels as int64. Raises ValueError, naming the argument, for other kinds of numbers, and for one that is neither
    a class of this number of them nor -100; on a GPU, looking would wait for it."""
    check_kind(name, labels.dtype)
    if labels.device.type == "cpu" and not recording(labels.device):
        check_classes(name, labels[labels != -100], number)
    return labels.long()


def wide(x: Tensor) -> Tensor:
    """float32 in place of half precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def init_weights(module: nn.Module, config: OPTConfig) -> None:
    """Draw the weights of a Linear or Embedding from N(0, init_std²); its bias and padding row are 0."""
    if isinstance(module, QuantizedLinear):
        module.reset_parameters(config.init_std)
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
        return
    module.weight.normal_(0.0, config.init_std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()
