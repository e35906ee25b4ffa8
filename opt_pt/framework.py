"""PyTorch as the shared code sees it."""

from __future__ import annotations

import os
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

    def launch(self, command: list[str], processes: int, device: str | None) -> None:
        import torch

        from .launch import launch

        there = torch.cuda.device_count()
        if device not in (None, "cuda", "cpu"):
            raise ValueError(f"--device: found {device!r} beside --devices {processes}, wanted cuda or cpu")
        if device != "cpu" and processes > there:
            more = "" if there else "; with --device cpu they are processes on the CPU"
            raise ValueError(f"--devices: found {processes}, wanted at most the GPUs of this machine, {there}{more}")
        if device == "cpu":  # or each would take all cores
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        launch(command, processes)

    def meet(self, seen: dict[str, Any], split: bool, device: str | None) -> dict[str, Any]:
        import torch

        from . import parallel

        parallel.processes(device if split else "cpu")
        parallel.same("torchrun", seen)
        if split:
            return {"tp_plan": "auto"} | ({} if device is None else {"device": device})
        parallel.leave()  # from here on each works alone
        if torch.cuda.is_available() and device in (None, "cuda"):
            parallel.take_gpu()
        return {}

    def of_first(self, value: Any) -> Any:
        from .parallel import of_first

        return of_first(value)

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
