"""The three implementations behind one numpy interface, so that one test body judges all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opt_common.frameworks import FRAMEWORKS, to_numpy


class Backend:
    """A loaded model; numpy arrays in, float64 (or int) numpy arrays out."""

    def __init__(self, key: str, path: str | Path, architecture: str = "OPTForCausalLM", **options: Any) -> None:
        self.framework = FRAMEWORKS[key]
        self.model = self.framework.model_class(architecture).from_pretrained(path, **options)

    def tensors(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: self.framework.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}

    def __call__(self, **arguments: Any) -> Any:
        out = self.model(**self.tensors(arguments))
        arrays = {name: as_float64(getattr(out, name)) for name in out._fields if name.endswith("logits")}
        return out._replace(
            loss=None if out.loss is None else float(to_numpy(out.loss)),
            hidden_states=out.hidden_states and tuple(map(as_float64, out.hidden_states)),
            attentions=out.attentions and tuple(map(as_float64, out.attentions)),
            **arrays,
        )

    def generate(self, **arguments: Any) -> np.ndarray:
        return to_numpy(self.model.generate(**self.tensors(arguments)))


def as_float64(tensor: Any) -> np.ndarray:
    if "bfloat16" in str(tensor.dtype) and hasattr(tensor, "float"):
        tensor = tensor.float()
    return to_numpy(tensor).astype(np.float64)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error over largest magnitude."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
