"""The three implementations by their short names, found without importing any."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Framework:
    """`key` is also the extra that installs it; `prefix` begins the names of its classes; `tensors` is what the
    tokenizer calls its tensors."""

    key: str
    title: str
    package: str
    prefix: str
    needs: tuple[str, ...]
    tensors: str

    @property
    def missing(self) -> str | None:
        """None, or how to install what is not there."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install 'opt-zoo[{self.key}]'" if absent else None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.needs[0])

    def model_class(self, architecture: str = "OPTForCausalLM") -> Any:
        """Its class for one of `weights.HEADS`; imports the framework."""
        with _without_greetings() if self.key == "tf" else nullcontext():
            return getattr(importlib.import_module(self.package), self.prefix + architecture)

    def tensor(self, array: np.ndarray) -> Any:
        """A numpy array as a tensor of the framework."""
        if self.key == "pt":
            return importlib.import_module("torch").from_numpy(array)
        if self.key == "tf":
            return importlib.import_module("tensorflow").constant(array)
        return importlib.import_module("jax.numpy").asarray(array)


@contextmanager
def _without_greetings() -> Iterator[None]:
    """TensorFlow's C++ half greets on file descriptor 2 when imported, whatever its log level; errors are Python's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


FRAMEWORKS = {
    f.key: f
    for f in (
        Framework("pt", "PyTorch", "opt_pt", "", ("torch",), "pt"),
        Framework("tf", "TensorFlow", "opt_tf", "TF", ("tensorflow", "keras"), "tf"),
        Framework("flax", "JAX", "opt_flax", "Flax", ("jax", "flax"), "jax"),
    )
}


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of any of the three as a numpy array."""
    return np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor)
