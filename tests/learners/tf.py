"""Learning in TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from opt_common.weights import KERAS, Spec


def gradients(model: Any, specs: list[Spec], given: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    variables = model.trainable_variables
    assert len(variables) == len(specs), "a tied head is one variable"
    loss, found = _loss_and_gradients(model, given)
    at = {id(variable): gradient for variable, gradient in zip(variables, found, strict=True)}
    return float(loss), {s.name: tf.convert_to_tensor(at[id(KERAS.parameter(model, s))]) for s in specs}


def train(
    model: Any, batches: list[Any], rate: float, beta_1: float, beta_2: float, epsilon: float, decay: float
) -> None:
    optimizer = keras.optimizers.AdamW(rate, decay, beta_1, beta_2, epsilon)
    for step, batch in enumerate(batches, 1):
        # Keras adds its epsilon before it corrects the second moment's bias, the others after
        optimizer.epsilon = epsilon * (1 - beta_2**step) ** 0.5
        optimizer.apply(_loss_and_gradients(model, batch)[1], model.trainable_variables)


def _loss_and_gradients(model: Any, given: dict[str, Any]) -> tuple[Any, list[Any]]:
    with tf.GradientTape() as tape:
        loss = model(**given, training=True).loss
    return loss, tape.gradient(loss, model.trainable_variables)
