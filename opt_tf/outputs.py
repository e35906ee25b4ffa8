"""Outputs, registered with Keras's functions over nested structures. Keras sees the fields that are there: it would
take a None for an output, and functional models refuse outputs that are not tensors."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import optree

from opt_common.outputs import OUTPUTS, ModelOutput


def _register(cls: type[ModelOutput]) -> None:
    def flatten(output: ModelOutput) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
        return list(output.values()), tuple(output), tuple(output)

    def unflatten(names: tuple[str, ...], values: Any) -> ModelOutput:
        return cls(**dict(zip(names, values, strict=True)))

    with suppress(ValueError):  # registered before: this module is being imported again
        optree.register_pytree_node(cls, flatten, unflatten, namespace="keras")


for _cls in OUTPUTS:
    _register(_cls)
