"""Outputs, registered with PyTorch's functions over nested structures: torch.export, FSDP and others take a call's
result apart and put it together again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils import _pytree

from opt_common import outputs
from opt_common.outputs import OUTPUTS, ModelOutput

from .inputs import takes_arrays


def _register(cls: type[ModelOutput]) -> None:
    def flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
        return list(output.values()), list(output)

    def flatten_with_keys(output: ModelOutput) -> tuple[list[Any], list[str]]:
        return [(_pytree.MappingKey(name), value) for name, value in output.items()], list(output)

    def unflatten(values: Any, names: list[str]) -> ModelOutput:
        return cls(**dict(zip(names, values, strict=True)))

    _pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"opt_common.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )  # fmt: skip


for _cls in OUTPUTS:
    _register(_cls)


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let past_key_values be called `cache`, as from transformers 5.24 on."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(self, *args, **kwargs)

    return call


def can_return_tuple(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`opt_common.outputs.can_return_tuple`, `takes_cache` and `takes_arrays`."""
    return outputs.can_return_tuple(takes_cache(takes_arrays(forward)))
