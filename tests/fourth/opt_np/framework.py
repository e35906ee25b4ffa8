"""NumPy as the shared code sees it."""

from __future__ import annotations

import numpy as np

from opt_common.frameworks import Framework
from opt_common.weights import TORCH


class NumPy(Framework):
    title, prefix, tensors, ids, naming = "NumPy", "NP", "np", "int64", TORCH

    def tensor(self, array: np.ndarray) -> np.ndarray:
        return array

    def numpy(self, tensor: np.ndarray) -> np.ndarray:
        return np.asarray(tensor)
