"""JAX as the shared code sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from opt_common.frameworks import Framework
from opt_common.weights import FLAX


class JAX(Framework):
    title, prefix, tensors, ids, naming = "JAX", "Flax", "jax", "int32", FLAX

    def tensor(self, array: np.ndarray) -> Any:
        import jax

        return jax.device_put(array)  # jnp.asarray compiles a program for each shape

    def on(self, device: str | None) -> AbstractContextManager[Any]:
        import jax

        if device is None:
            return nullcontext()
        kind, _, number = device.partition(":")
        try:
            return jax.default_device(jax.devices(kind)[int(number or 0)])
        except (RuntimeError, IndexError, ValueError) as error:
            here = ", ".join(f"{one.platform}:{one.id}" for one in jax.devices())
            raise ValueError(f"device: found {device!r}, wanted one of {here}") from error

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(tensor)
