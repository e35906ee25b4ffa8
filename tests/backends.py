"""Every implementation behind one numpy interface, so that one test body covers all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_common.frameworks import Framework, registered

COMPLETE = {"flax", "pt", "tf"}  # implement everything; of any other, a test skips what is not there, by name


class Backend:
    """A loaded model; numpy arrays in, float64 (or int) numpy arrays out."""

    def __init__(self, key: str, path: str | Path, architecture: str = "OPTForCausalLM", **options: Any) -> None:
        self.framework = registered()[key]
        with skip_what_it_lacks(self.framework):
            self.model = self.framework.model_class(architecture).from_pretrained(path, **options)

    def tensors(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: self.framework.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}

    def __call__(self, **arguments: Any) -> Any:
        with skip_what_it_lacks(self.framework):
            out = self.model(**self.tensors(arguments))
        as_float64 = self.as_float64
        convert = {
            "loss": lambda loss: float(self.framework.numpy(loss)),
            "past_key_values": lambda cache: cache,
            "hidden_states": lambda tensors: tuple(map(as_float64, tensors)),
            "attentions": lambda tensors: tuple(map(as_float64, tensors)),
        }
        return type(out)(**{name: convert.get(name, as_float64)(value) for name, value in out.items()})

    def generate(self, **arguments: Any) -> np.ndarray:
        with skip_what_it_lacks(self.framework):
            return self.framework.numpy(self.model.generate(**self.tensors(arguments)))

    def init_cache(self, B: int, slots: int) -> Any:
        with skip_what_it_lacks(self.framework):
            return self.model.init_cache(B, slots)

    def as_float64(self, tensor: Any) -> np.ndarray:
        return self.framework.numpy(tensor).astype(np.float64)


@contextmanager
def skip_what_it_lacks(framework: Framework) -> Iterator[None]:
    """Skip the test where a framework that is not COMPLETE has no such class, method or argument."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        lacks = re.search("has no attribute|unexpected keyword argument", str(error))
        if framework.key in COMPLETE or not lacks:
            raise
        pytest.skip(f"{framework.package}: {error}")


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error over largest magnitude."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
