"""JAX as the shared code sees it."""

from __future__ import annotations

from typing import Any

import numpy as np

from opt_common.frameworks import Framework
from opt_common.weights import FLAX


class JAX(Framework):
    title, prefix, tensors, ids, naming = "JAX", "Flax", "jax", "int32", FLAX

    def tensor(self, array: np.ndarray) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(array)

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(tensor)
