"""From a checkpoint to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.checkpoints.pretrained import open_pretrained
from opt_common.checkpoints.pretrained import save_pretrained as save
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.checkpoints.tensors import numpy_dtype
from opt_common.weights import KERAS, Spec

if TYPE_CHECKING:
    from .model import TFOPTPreTrainedModel

Model = TypeVar("Model", bound="TFOPTPreTrainedModel")


def from_pretrained(
    cls: type[Model], path_or_name: str | Path, *, dtype: str | tf.DType = "float32", **options: Any
) -> Model:
    """The model of a checkpoint.

    path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
    dtype: a TensorFlow dtype, its name, or "auto" for the checkpoint's.
    options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and keys of the config that are to be
        others than the checkpoint's: num_labels, id2label, problem_type, dropout ...
    A head that the checkpoint does not hold is drawn anew, and one that is not this model's is left out; a warning
    names their weights.
    Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
    """
    name = dtype if isinstance(dtype, str) else tf.as_dtype(dtype).name
    opened = open_pretrained(path_or_name, cls.architecture, name, **options)
    model = cls(opened.config, initializer=_empty, dtype=opened.dtype)
    normal = keras.initializers.RandomNormal(stddev=opened.config.init_std, seed=keras.random.SeedGenerator())
    for spec in opened.new:
        parameter = KERAS.parameter(model, spec)
        parameter.assign((normal if spec.kind == "linear" else tf.zeros)(parameter.shape, parameter.dtype))
    for spec, array in opened.tensors:
        array = array.T if KERAS.transposed and spec.kind == "linear" else array
        KERAS.parameter(model, spec).assign(array.astype(numpy_dtype(opened.dtype), copy=False))
        del array  # or it would be held while the next is read
    return model


def save_pretrained(
    model: TFOPTPreTrainedModel, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write a folder that every framework here and transformers load: config.json, generation_config.json and
    safetensors of at most `max_shard_size` bytes a file. Killed half-way, it leaves the old folder or the new one."""

    def get(spec: Spec) -> np.ndarray:
        array = KERAS.parameter(model, spec).numpy()
        return array.T if KERAS.transposed and spec.kind == "linear" else array

    save(folder, model.config, model.architecture, model.variable_dtype, get, max_shard_size)


def _empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    # neither random numbers nor zeros: memory that is never written to is never taken
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
