"""TensorFlow as the shared code sees it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from opt_common.frameworks import Framework
from opt_common.weights import KERAS


class TensorFlow(Framework):
    title, prefix, tensors, ids, naming = "TensorFlow", "TF", "tf", "int32", KERAS

    def module(self) -> ModuleType:
        with _quiet():
            return super().module()

    def tensor(self, array: np.ndarray) -> Any:
        import tensorflow as tf

        return tf.constant(array)

    def on(self, device: str | None) -> AbstractContextManager[Any]:
        import tensorflow as tf

        if device is None:
            return nullcontext()
        name = f"/{device}" if ":" in device else f"/{device}:0"
        here = [one.name.removeprefix("/physical_device:").lower() for one in tf.config.list_physical_devices()]
        if name[1:].lower() not in here:
            raise ValueError(f"device: found {device!r}, wanted one of {', '.join(here)}")
        return tf.device(name)

    def numpy(self, tensor: Any) -> np.ndarray:
        return np.asarray(tensor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what TensorFlow's C++ part writes to file descriptor 2 on import, whatever its log level. Python's errors
    are raised, not written."""
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
