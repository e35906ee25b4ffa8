"""What the models share besides the network: loading, saving, settings, and what Keras asks of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.checkpoints.pretrained import open_pretrained, save_pretrained
from opt_common.checkpoints.shards import MAX_SHARD_SIZE
from opt_common.checkpoints.tensors import numpy_dtype
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.weights import KERAS, Spec

from .cache import KVCache
from .layers import build_parts, normal

register = keras.saving.register_keras_serializable(package="opt_zoo")  # for keras.saving.load_model


class TFOPTPreTrainedModel(keras.Model):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`."""

    architecture: str
    generation_config: GenerationConfig | None = None  # the config's token ids, if None

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """initializer: of the matrices and embeddings, in place of N(0, init_std²). kwargs: those of keras.Model, such
        as dtype, a name or a policy."""
        super().__init__(**kwargs)
        self.config, self.initializer = config, initializer or normal(config)

    def build(self, input_shape: Any = None) -> None:
        build_parts(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Its tensors may come in a dictionary, as `fit` and its like pass them."""
        if args and isinstance(args[0], Mapping):
            return super().__call__(*args[1:], **args[0], **kwargs)
        return super().__call__(*args, **kwargs)

    @property
    def _decoder(self) -> Any:
        return getattr(self, "model", self).decoder

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self.compute_dtype)

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only each layer's input for the backward pass, which recomputes the rest. Calls with a
        cache or output_attentions are not affected, nor is a tf.function already traced, such as `fit`'s."""
        self._decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything that the backward pass needs, as by default."""
        self._decoder.gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, *, dtype: str | tf.DType = "float32", **options: Any) -> Self:
        """Load a checkpoint.

        path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
        dtype: a TensorFlow dtype, its name, or "auto" for the checkpoint's.
        options: revision, cache_dir, token, local_files_only, as in huggingface_hub; and config overrides: num_labels,
            id2label, problem_type, dropout ...
        A head missing from the checkpoint is newly initialized, and one that is not this model's is dropped; a warning
        names their weights.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        name = dtype if isinstance(dtype, str) else tf.as_dtype(dtype).name
        opened = open_pretrained(path_or_name, cls.architecture, name, **options)
        model = cls(opened.config, initializer=_empty, dtype=opened.dtype)
        draw = normal(opened.config)
        for spec in opened.new:
            parameter = KERAS.parameter(model, spec)
            parameter.assign((draw if spec.kind == "linear" else tf.zeros)(parameter.shape, parameter.dtype))
        for spec, array in opened.tensors:
            array = KERAS.oriented(spec, array).astype(numpy_dtype(opened.dtype), copy=False)
            KERAS.parameter(model, spec).assign(array)
            del array  # or it would be held while the next is read
        model.generation_config = opened.generation
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one."""

        def get(spec: Spec) -> np.ndarray:
            return KERAS.oriented(spec, KERAS.parameter(self, spec).numpy())

        save_pretrained(
            folder,
            self.config,
            self.architecture,
            self.variable_dtype,
            get,
            max_shard_size,
            generation=self.generation_config,
        )

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The loss given to `compile` is of the logits. Without targets, as in `fit` on dictionaries with labels, it is
        the model's own."""
        if y is None and y_pred.loss is not None:
            return y_pred.loss
        return super().compute_loss(x, y, self.scores(y_pred), *args, **kwargs)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The metrics given to `compile` are of the logits."""
        return super().compute_metrics(x, y, self.scores(y_pred), *args, **kwargs)

    def scores(self, output: Any) -> Any:
        """The part of an output that the loss and the metrics given to `compile` are computed from."""
        return output.logits

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | str | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keras's export. A SavedModel has one endpoint, `serve`, also as `signatures["serving_default"]`. It takes
        input_ids and attention_mask, [B, T] int32, or those of the two in input_signature, and returns a dictionary of
        the output's tensors by their names."""
        if format != "tf_saved_model":
            return super().export(filepath, format, verbose, input_signature, **kwargs)

        def serve(input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
            out = self(input_ids, attention_mask=attention_mask, training=False)
            return {name: tensor for name, tensor in out.items() if isinstance(tensor, Tensor)}

        names = ("input_ids", "attention_mask")
        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint(
            "serve", serve, input_signature or [tf.TensorSpec((None, None), "int32", n) for n in names]
        )
        archive.write_out(filepath, verbose=True if verbose is None else verbose, **kwargs)

    def get_config(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.config)
        del fields["_attn_implementation"]  # of the model that runs, not of the file
        return super().get_config() | {"config": fields}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return cls(**config | {"config": OPTConfig(**config["config"])})


def _empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    # neither random numbers nor zeros: memory that is never written to is never taken
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
