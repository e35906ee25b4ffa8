"""PyTorch as the shared code sees it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from opt_common.frameworks import Framework
from opt_common.weights import TORCH


class PyTorch(Framework):
    title, prefix, tensors, ids, naming = "PyTorch", "", "pt", "int64", TORCH

    def tensor(self, array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(array)

    def numpy(self, tensor: Any) -> np.ndarray:
        import torch

        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # unknown to numpy, so its bits travel as integers
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
