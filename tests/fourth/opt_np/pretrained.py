"""From a checkpoint to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from opt_common.checkpoints.pretrained import open_pretrained, save_pretrained
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.checkpoints.tensors import numpy_dtype
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.weights import table


class NPOPTPreTrainedModel:
    architecture: ClassVar[str]

    def __init__(self, config: OPTConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self.weights, self.generation_config = config, weights, GenerationConfig.from_model_config(config)

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, *, dtype: str = "float32", **options: Any) -> Self:
        """`dtype` is that of the weights. Every result is computed in float64."""
        opened = open_pretrained(path_or_name, cls.architecture, dtype, **options)
        wanted = numpy_dtype(opened.dtype)
        model = cls(opened.config, {spec.name: array.astype(wanted) for spec, array in opened.tensors})
        model.generation_config = opened.generation
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        dtype = self.weights[next(table(self.config)).name].dtype.name
        save_pretrained(
            folder, self.config, self.architecture, dtype, lambda s: self.weights[s.name], max_shard_size,
            generation=self.generation_config,
        )  # fmt: skip
