"""PyTorch as the shared code sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opt_common.frameworks import Framework
from opt_common.quantization import QuantizationConfig
from opt_common.weights import TORCH


class PyTorch(Framework):
    title, prefix, tensors, ids, naming = "PyTorch", "", "pt", "int64", TORCH

    def tensor(self, array: np.ndarray) -> Any:
        import torch

        return torch.as_tensor(array)

    def on(self, device: str | None) -> AbstractContextManager[Any]:
        import torch

        try:
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: found {device!r}, which PyTorch refuses: {error}") from error
        return chosen

    def calibrate(
        self, source: str | Path, layout: str | None, rows: np.ndarray, quantization: QuantizationConfig, dtype: str
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from .calibration import calibrate, streamed

        model, layers = streamed(self.model_class(), source, layout)
        return calibrate(model, self.tensor(rows), quantization, dtype, layers)

    def numpy(self, tensor: Any) -> np.ndarray:
        import torch

        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # unknown to numpy, so its bits travel as integers
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
