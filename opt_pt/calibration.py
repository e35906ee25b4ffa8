"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding that makes up for its errors on the inputs of a text.

A Linear's columns are rounded one after the other, and the error of each is spread over those to come, by what the
inputs of the text say of how columns go together. A layer sees what the rounded layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opt_common.checkpoints.fit import layer_number
from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.checkpoints.tensors import numpy_dtype
from opt_common.progress import counter
from opt_common.quantization import Packing, QuantizationConfig, pack
from opt_common.weights import Spec

from .pretrained import tensor

# Of a layer, Linears whose inputs depend on the rounded ones before them
_STEPS = (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))
_BLOCK = 128  # columns whose errors are spread at once over the rest
_DAMPING = 0.01  # of the mean of the diagonal, or inputs that are almost dependent would have large errors spread
_LEAST = 2**-24  # a scale, as float16 has it, in place of 0

Numbers = dict[str, tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def calibrate(
    model: Any,
    rows: Tensor,
    quantization: QuantizationConfig,
    dtype: str = "float16",
    layers: Iterable[Any] | None = None,
) -> Numbers:
    """Round the Linears of the layers, on a text.

    model: an OPTForCausalLM in floats, in eval mode; its weights are rounded in place. rows: token ids [n, T], without
    padding. dtype: that of the scales. layers: the model's, each there until the next is asked for: see `streamed`.
    Returns `weight_packed` and `weight_scale` of each Linear by its path: "model.decoder.layers.0.fc1".
    """
    found = Numbers()
    states, how = _first_inputs(model, rows)
    with counter("Calibrating", len(model.model.decoder.layers)) as advance:
        for i, layer in enumerate(model.model.decoder.layers if layers is None else layers):
            for step in _STEPS:
                linears = {name: layer.get_submodule(name) for name in step}
                path = f"model.decoder.layers.{i}"
                chosen = {name: p for name in linears if (p := quantization.of(f"{path}.{name}")) is not None}
                if not chosen:
                    continue
                products = _products(layer, linears[step[0]], states, how)
                for name, packing in chosen.items():
                    weight = linears[name].weight
                    packing.check(f"{path}.{name}", weight.shape[1])
                    numbers, scale = _round(weight.float(), products, packing, getattr(torch, dtype))
                    rounded = numbers.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
                    weight.copy_(rounded.flatten(1))
                    packed = (numbers + 2 ** (packing.bits - 1)).to(torch.uint8).cpu().numpy()
                    found[f"{path}.{name}"] = pack(packed, packing.bits), scale.cpu().numpy().astype(numpy_dtype(dtype))
            for row, x in enumerate(states):
                states[row] = layer(x, **how)
            advance(1)
    return found


def streamed(cls: type[Any], source: str | Path, layout: str | None = None) -> tuple[Any, Iterator[nn.Module]]:
    """An OPTForCausalLM, `cls`, in float32 with the weights before its layers alone, and the layers, each with its
    weights until the next is asked for."""
    opened = open_pretrained(source, "OPTForCausalLM", "float32", layout=layout)
    with torch.device("meta"):
        model = cls(opened.config).eval()

    def load(tensors: Iterable[tuple[Spec, np.ndarray]]) -> None:
        device = torch.get_default_device()
        state = {spec.name: tensor(array).to(device, torch.float32) for spec, array in tensors}
        model.load_state_dict(state, strict=False, assign=True)

    groups = groupby(opened.tensors, key=lambda found: layer_number(found[0].name))
    load(next(groups)[1])

    def layers() -> Iterator[nn.Module]:
        for number, tensors in groups:
            if number >= 0:
                load(tensors)
                yield model.model.decoder.layers[number]
                model.model.decoder.layers[number].to("meta")

    return model, layers()


def _first_inputs(model: Any, rows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first layer is called with: hidden states [1, T, H] of each row, and the other arguments."""
    states, others = [], {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        others.update(kwargs)
        raise _Enough

    calls = [partial(model, row[None].to(model.device), use_cache=False) for row in rows]
    _run(model.model.decoder.layers[0], keep, calls, with_kwargs=True)
    return states, others


class _Enough(Exception):
    """A hook has what it wants."""


def _products(layer: nn.Module, linear: nn.Module, states: list[Tensor], how: dict[str, Any]) -> Tensor:
    """The sum of x·xᵀ [in, in], in float32, over the inputs x of a Linear in a layer."""
    total: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if not total:
            total.append(x.new_zeros(x.shape[1], x.shape[1]))
        total[0].addmm_(x.T, x)
        raise _Enough

    _run(linear, add, [partial(layer, x, **how) for x in states])
    return total[0]


def _run(module: nn.Module, hook: Callable[..., None], calls: list[Callable[[], Any]], **options: Any) -> None:
    """Make calls that reach a module, with a hook before it that ends them."""
    handle = module.register_forward_pre_hook(hook, **options)
    try:
        for call in calls:
            with suppress(_Enough):
                call()
    finally:
        handle.remove()


def _round(weight: Tensor, products: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers [out, in], and scales [out, groups] that `dtype` can hold, both in the weight's dtype."""
    weight, half = weight.clone(), 2 ** (packing.bits - 1)
    size = packing.group_size or weight.shape[1]
    diagonal = products.diagonal().clone()
    products = products + torch.diag(_DAMPING * diagonal.mean() + (diagonal == 0))
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    numbers, scales = torch.empty_like(weight), []
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = weight.new_empty(len(weight), end - start)
        for i in range(start, end):
            if i % size == 0:  # of the numbers as the columns before have left them
                largest = _current(weight, errors, spread, start, i, size).abs().amax(1)
                scales.append((largest / (half - 0.5)).clamp(min=_LEAST).to(dtype).to(weight.dtype))
            column = weight[:, i]
            numbers[:, i] = (column / scales[-1]).round().clamp(-half, half - 1)
            errors[:, i - start] = error = (column - numbers[:, i] * scales[-1]) / spread[i, i]
            weight[:, i:end] -= error[:, None] * spread[i, i:end]
        weight[:, end:] -= errors @ spread[start:end, end:]
    return numbers, torch.stack(scales, dim=1)


def _current(weight: Tensor, errors: Tensor, spread: Tensor, start: int, i: int, size: int) -> Tensor:
    """The columns of the group that begins at i, less what the block's errors so far take from those behind it."""
    end, group = start + errors.shape[1], weight[:, i : i + size]
    behind = group[:, max(0, end - i) :] - errors[:, : i - start] @ spread[start:i, max(i, end) : i + size]
    return torch.cat([group[:, : max(0, end - i)], behind], dim=1)
