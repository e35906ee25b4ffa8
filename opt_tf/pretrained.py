"""What the models share besides the network: loading, saving, settings, and what Keras asks of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

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
from .layers import Embedding, Network, normal, wide
from .training import of_tokens, prepare_tf_dataset, with_labels

register = keras.saving.register_keras_serializable(package="opt_zoo")  # for keras.saving.load_model


class TFOPTPreTrainedModel(Network, keras.Model):
    """The base of all models. `architecture` is the name of a model's weights in `opt_common.weights.HEADS`."""

    architecture: str
    generation_config: GenerationConfig | None = None  # the config's token ids, if None
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    score_names: ClassVar[tuple[str, ...]] = ("logits",)  # what a compiled loss compares with those

    # What scripts and libraries read, with transformers' values
    config_class = OPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    framework = "tf"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """initializer: of the matrices and embeddings, in place of N(0, init_std²). kwargs: those of keras.Model, such
        as dtype, a name or a policy."""
        super().__init__(**kwargs)
        self.config, self.initializer = config, initializer or normal(config)

    # === Its parts ===

    def __getattr__(self, name: str) -> Any:
        # a model without a head is its own `model`, as in transformers; Keras would save a property as one more part
        if name == "model" and self.architecture == "OPTModel":
            return self
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def _decoder(self) -> Any:
        return self.model.decoder

    def get_input_embeddings(self) -> Embedding:
        """The token embedding."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding: by a layer, or by a table [rows, E] of new values."""
        if isinstance(value, keras.layers.Layer):
            self._decoder.embed_tokens = value
        else:
            self.get_input_embeddings().resize(tf.convert_to_tensor(value))
        rows = self.get_input_embeddings().input_dim
        self.config.vocab_size = self._decoder.vocab_size = rows
        self.train_function = self.test_function = self.predict_function = None  # made for the old table

    def get_output_embeddings(self) -> keras.layers.Layer | None:
        """The language-modelling head, which is the token embedding if they are tied; None if it has none."""
        head = getattr(self, "lm_head", None)
        return self.get_input_embeddings() if head is None and hasattr(self, "lm_head") else head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Embedding:
        """Make the token embedding and the head `new_num_tokens` rows long, rounded up to `pad_to_multiple_of`, and
        return the embedding. New rows are the mean of the old ones, or with mean_resizing=False N(0, init_std²).
        Compile after it, not before: an optimizer that has begun keeps the old shape."""
        embedding, head = self.get_input_embeddings(), getattr(self, "lm_head", None)
        rows = embedding.input_dim if new_num_tokens is None else new_num_tokens
        rows += -rows % (pad_to_multiple_of or 1)

        def resized(table: Any) -> Tensor:
            table = tf.convert_to_tensor(table)
            more = max(0, rows - table.shape[0])
            mean = tf.repeat(tf.reduce_mean(wide(table), axis=0, keepdims=True), more, axis=0)
            new = mean if mean_resizing else tf.random.normal(mean.shape, stddev=self.config.init_std, dtype=mean.dtype)
            return tf.concat([table[:rows], tf.cast(new, table.dtype)], axis=0)

        if head is not None:
            head.resize(tf.transpose(resized(tf.transpose(head.kernel))))
        self.set_input_embeddings(resized(embedding.embeddings))
        return self.get_input_embeddings()

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(math.prod(w.shape) for w in (self.trainable_weights if only_trainable else self.weights))

    # === How it runs ===

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self.compute_dtype)

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only each layer's input for the backward pass, which recomputes the rest. Calls with a
        cache or output_attentions are not affected, nor is a tf.function already traced, such as `fit`'s."""
        self._decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._decoder.gradient_checkpointing = False

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return hasattr(self, "generate")

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Some ids and their mask, for tracing."""
        return {name: tf.ones((1, 2), "int32") for name in ("input_ids", "attention_mask")}

    def prepare_inputs_for_generation(
        self, inputs: Tensor, past_key_values: Any = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of a call that continues a cache, for a loop of your own."""
        return {
            "input_ids": inputs if past_key_values is None else inputs[:, -1:],
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    # === Loading and saving ===

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        dtype: str | tf.DType | keras.DTypePolicy | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self:
        """Load a checkpoint.

        path_or_name: a folder, "opt-demo", or a Hub name; safetensors or pytorch_model.bin, sharded or not.
        dtype: a TensorFlow dtype, its name, "auto" for the checkpoint's, or one of Keras's policies, such as
            "mixed_bfloat16"; `keras.config.dtype_policy()` by default, which is float32 unless it is set.
        output_loading_info: also return which weights were newly initialized or unused.
        options: those of `opt_common.checkpoints.pretrained.open_pretrained`: config=, revision, cache_dir, token,
            local_files_only, use_safetensors ..., and config overrides: num_labels, id2label, output_hidden_states ...
        A head missing from the checkpoint is newly initialized, and one that is not this model's is dropped; a warning
        names their weights. Under the scope of a tf.distribute.MirroredStrategy each of its devices has the weights,
        and `fit` shares out the rows of a batch.
        Raises FileNotFoundError or ValueError, naming the file and the tensors, before anything is allocated.
        """
        for name in ("tp_plan", "sharding"):
            if options.pop(name, None) is not None:
                why = "Keras on TensorFlow has no tensor parallelism; use tf.distribute to train, or opt_pt or opt_flax"
                raise ValueError(f"{name}: found one, wanted none: {why}")
        policy: Any = tf.as_dtype(dtype).name if isinstance(dtype, tf.DType) else dtype
        if policy != "auto":
            policy = keras.dtype_policies.get(policy or keras.config.dtype_policy())
        name = policy if policy == "auto" else policy.variable_dtype
        opened = open_pretrained(path_or_name, cls.architecture, name, **options)
        model = cls(opened.config, initializer=_empty, dtype=opened.dtype if policy == "auto" else policy)
        draw = normal(opened.config)
        for spec in opened.new:
            parameter = KERAS.parameter(model, spec)
            parameter.assign((draw if spec.kind == "linear" else tf.zeros)(parameter.shape, parameter.dtype))
        for spec, array in opened.tensors:
            if spec.kind != "shape":  # which the layer knows
                array = KERAS.oriented(spec, array).astype(numpy_dtype(spec.dtype(opened.dtype)), copy=False)
                KERAS.parameter(model, spec).assign(array)
            del array  # or it would be held while the next is read
        model.config.name_or_path, model.generation_config = str(path_or_name), opened.generation
        if not output_loading_info:
            return model
        missing = [spec.name for spec in opened.new]
        info = {"missing_keys": missing, "unexpected_keys": opened.unused, "mismatched_keys": [], "error_msgs": []}
        return model, info  # type: ignore[return-value]

    @property
    def name_or_path(self) -> str:
        """The name or folder it was loaded from; empty for a new one."""
        return self.config.name_or_path

    def save_pretrained(
        self,
        save_directory: str | Path,
        saved_model: bool = False,
        version: int = 1,
        push_to_hub: bool = False,
        signatures: Any = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        safe_serialization: bool | None = None,
    ) -> None:
        """Write a folder that every framework here and transformers load: config.json, generation_config.json and
        safetensors of at most `max_shard_size` bytes a file. If killed, it leaves the old folder or the new one.

        saved_model: also write a SavedModel to saved_model/`version`, with `signatures` as in tf.saved_model.save, or
            without any as `export` writes it, and the same for int64 as "int64_serving".
        safe_serialization: False writes tf_model.h5 in place of safetensors.
        Raises ValueError for push_to_hub: upload the folder with `huggingface_hub.upload_folder`.
        """
        if push_to_hub:
            raise ValueError(f"push_to_hub: found {push_to_hub!r}; save, then huggingface_hub.upload_folder")
        if quantized := [w.path for w in self.weights if "int8" in w.dtype]:
            raise ValueError(
                f"save_pretrained: found quantized weights, {quantized[0]} ..., wanted those of a checkpoint"
            )

        def get(spec: Spec) -> np.ndarray:
            return KERAS.oriented(spec, KERAS.parameter(self, spec).numpy())

        layout = "tf-h5" if safe_serialization is False else "safetensors"
        save_pretrained(
            save_directory,
            self.config,
            self.architecture,
            self.variable_dtype,
            get,
            max_shard_size,
            layout,
            self.generation_config,
        )
        if saved_model:
            if signatures is None:
                dtypes = {"serving_default": "int32", "int64_serving": "int64"}
                signatures = {
                    name: self.serving.get_concrete_function(_inputs(dtype)) for name, dtype in dtypes.items()
                }
            tf.saved_model.save(self, str(Path(save_directory, "saved_model", str(version))), signatures)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type != "savedmodel":
            return children
        # in place of Keras's variables, in which TFLite does not find the values
        values = {f"variables.{i}": variable.value for i, variable in enumerate(self.variables)}
        return {name: child for name, child in children.items() if not isinstance(child, keras.layers.Layer)} | values

    # === Keras's training ===

    prepare_tf_dataset = prepare_tf_dataset

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Keras's. As in transformers, the loss "passthrough" is the model's own, as None is, and a list may have None
        for what a call returns besides its scores."""
        n = len(self.score_names)
        if isinstance(loss, str) and loss == "passthrough":
            loss = None
        elif isinstance(loss, (list, tuple)) and not any(loss[n:]):
            loss = loss[0] if n == 1 else loss[:n]
        self._compile_loss = self._compile_metrics = None  # Keras would keep those of an earlier call
        super().compile(optimizer, loss, *args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a loaded file says; Keras's leaves it to classes that have a `compile` of their own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> Any:
        """Keras's; without a compiled loss, the labels go to the model, whose own it then is."""
        return super().train_step(with_labels(self, data))

    def test_step(self, data: Any) -> Any:
        """As `train_step`."""
        return super().test_step(with_labels(self, data))

    def predict_step(self, data: Any) -> Any:
        """Keras's, without the cache."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(x, training=False, use_cache=False)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """The loss given to `compile` is of the scores. Without one it is the model's own; of several replicas, each
        one's share of it."""
        own = y_pred.get("loss") if isinstance(y_pred, Mapping) else None
        if own is not None and (y is None or self._compile_loss is None):
            return own / tf.distribute.get_strategy().num_replicas_in_sync
        scores = self.scores(y_pred)
        return super().compute_loss(x, y, scores, of_tokens(sample_weight, scores), training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Metrics given to `compile` are computed from the scores."""
        return super().compute_metrics(x, y, self.scores(y_pred), *args, **kwargs)

    def scores(self, output: Any) -> Any:
        """The part of an output that the loss and the metrics given to `compile` are computed from; all that a subclass
        returns in place of one."""
        if not isinstance(output, Mapping):
            return output
        found = tuple(output[name] for name in self.score_names)
        return found if len(found) > 1 else found[0]

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
            use_cache, self.config.use_cache = self.config.use_cache, False
            try:
                return super().export(filepath, format, verbose, input_signature, **kwargs)
            finally:
                self.config.use_cache = use_cache

        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", self._serve, input_signature or [*self.input_signature.values()])
        archive.write_out(filepath, verbose=True if verbose is None else verbose, **kwargs)

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """What `serving` takes."""
        return _inputs("int32")

    @tf.function(autograph=False)
    def serving(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The output's tensors by their names, from input_ids and attention_mask: what a SavedModel of
        `save_pretrained` computes, unless a subclass says something else."""
        return self._serve(**inputs)

    def _serve(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        out = self(input_ids, attention_mask=attention_mask, training=False, use_cache=False, return_dict=True)
        return {name: tensor for name, tensor in out.items() if isinstance(tensor, Tensor)}

    # === Keras's files ===

    def get_config(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.config)
        del fields["_attn_implementation"]  # of the model that runs, not of the file
        quantization = self.config.quantization_config
        fields["quantization_config"] = quantization and quantization.to_dict()
        return super().get_config() | {"config": fields}

    @classmethod
    def from_config(cls, config: dict[str, Any] | OPTConfig, custom_objects: Any = None) -> Any:
        """A model with new weights, from an OPTConfig or from what `get_config` returns."""
        return (
            cls(config) if isinstance(config, OPTConfig) else cls(**config | {"config": OPTConfig(**config["config"])})
        )


def _inputs(dtype: str) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec((None, None), dtype, name) for name in ("input_ids", "attention_mask")}


def _empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    # neither random numbers nor zeros: memory that is never written to is never taken
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
