"""What `fit` and `evaluate` are given: labels beside the inputs or apart from them, and data sets of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def with_labels(model: Any, data: Any) -> Any:
    """The data of a step, its targets among the inputs too, where no loss is compiled: the model's own needs them."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    if y is None or model._compile_loss is not None or not model.label_names:
        return data
    if weights is not None:
        raise ValueError("sample_weight: found one, which the model's own loss does not take; compile a loss")
    inputs = x if isinstance(x, Mapping) else {"input_ids": x}
    if not isinstance(y, Mapping):
        y = dict(zip(model.label_names, y if isinstance(y, (list, tuple)) else [y], strict=True))
    return {**inputs, **y}, y


def of_tokens(weights: Any, scores: Any) -> Any:
    """The sample weights of a loss of `scores`. Of tokens' scores, [B, T, V], they are [B, T]: those of the rows, [B],
    which Keras would take for the columns' where B is T, count for all tokens of their row."""
    if weights is None or not isinstance(scores, tf.Tensor) or len(scores.shape) != 3:
        return weights
    B, T = tf.unstack(tf.shape(scores)[:2])
    return tf.broadcast_to(tf.reshape(weights, (B, -1)), (B, T))


def prepare_tf_dataset(
    self: Any,
    dataset: Any,
    batch_size: int = 8,
    shuffle: bool = True,
    tokenizer: Any = None,
    collate_fn: Callable[..., Any] | None = None,
    collate_fn_args: dict[str, Any] | None = None,
    drop_remainder: bool | None = None,
    prefetch: bool = True,
) -> tf.data.Dataset:
    """A tf.data.Dataset of (inputs, labels) for `fit`, of a `datasets.Dataset`'s columns that a call takes.

    tokenizer: pads the rows of a batch. collate_fn: makes a batch of a list of rows, with collate_fn_args, in place of
        padding or stacking them. drop_remainder: leave out a smaller last batch; by default if shuffled.
    """

    def stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if tokenizer is None:
            batch = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        else:
            batch = dict(tokenizer.pad(rows, return_tensors="np"))
        for name in {"label", "label_ids"} & batch.keys():
            batch["labels"] = batch.pop(name)
        return batch

    collate, args = collate_fn or stack, collate_fn_args or {}
    taken = {*inspect.signature(self.call).parameters}
    kept = [name for name in dataset.column_names if name in taken | {"label", "label_ids"}]
    dataset = dataset.select_columns(kept)
    columns = [name for name in collate([dataset[i] for i in range(min(2, len(dataset)))], **args) if name in taken]
    labels = [name for name in columns if name in self.label_names]
    inputs = [name for name in columns if name not in labels]
    return dataset.to_tf_dataset(
        columns=inputs[0] if len(inputs) == 1 else inputs,
        label_cols=labels[0] if len(labels) == 1 else labels or None,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_remainder=shuffle if drop_remainder is None else drop_remainder,
        collate_fn=collate,
        collate_fn_args=args,
        prefetch=prefetch,
    )
