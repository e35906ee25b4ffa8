"""Gradients and AdamW steps of every framework behind one numpy interface. `learners/KEY.py` holds what differs."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import Backend
from opt_common.weights import Spec, table

Arrays = dict[str, np.ndarray]
# A small rate: where float32 and float64 see a ReLU on two sides of zero, its rows move by the rate.
# A large epsilon: Adam divides by the gradient's own size, so with the usual 1e-8 a k_proj.bias, whose gradient is
# rounding error only, would move as far as any other parameter.
ADAMW: dict[str, float] = {"learning_rate": 3e-5, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-4, "weight_decay": 0.01}


class Learner(Backend):
    """A loaded model in training, without dropout unless `options` override the config."""

    def __init__(self, key: str, path: str | Path, architecture: str = "OPTForCausalLM", **options: Any) -> None:
        if importlib.util.find_spec(f"learners.{key}") is None:
            pytest.skip(f"no tests/learners/{key}.py")
        self.own = importlib.import_module(f"learners.{key}")
        super().__init__(key, path, architecture, **({"dropout": 0.0} | options))
        self.specs = list(table(self.model.config, architecture))

    def gradients(self, **arguments: Any) -> tuple[float, Arrays]:
        """The loss, and each parameter's gradient by its Hub name, in the checkpoint's orientation."""
        loss, found = self.own.gradients(self.model, self.specs, self.tensors(arguments))
        return loss, {spec.name: self.oriented(spec, self.framework.numpy(found[spec.name])) for spec in self.specs}

    def train(self, batches: list[dict[str, np.ndarray]]) -> Arrays:
        """The weights after a step of the framework's own AdamW for each batch."""
        self.own.train(self.model, [self.tensors(batch) for batch in batches], *ADAMW.values())
        parameter = self.framework.naming.parameter
        return {s.name: self.oriented(s, self.framework.numpy(parameter(self.model, s))) for s in self.specs}

    def oriented(self, spec: Spec, array: np.ndarray) -> np.ndarray:
        return array.T if spec.kind == "linear" and self.framework.naming.transposed else array
