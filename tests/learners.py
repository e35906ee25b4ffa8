"""Loss, gradients and AdamW steps of each framework behind one numpy interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from backends import Backend
from opt_common.frameworks import to_numpy
from opt_common.weights import FLAX, KERAS, TORCH, Spec, table

Arrays = dict[str, np.ndarray]
# A small rate: float32 and float64 may see a ReLU on two sides of zero, and its rows then move by the rate.
# Adam divides by the gradient's own size, so with the usual 1e-8 the rounding errors that are all the gradient of a
# k_proj.bias would move it as far as any other.
ADAMW: dict[str, float] = {"learning_rate": 3e-5, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-4, "weight_decay": 0.01}


class Learner(Backend):
    """A loaded model in training, without dropout unless the config is changed by `options`."""

    def __init__(self, key: str, path: str | Path, architecture: str = "OPTForCausalLM", **options: Any) -> None:
        super().__init__(key, path, architecture, **({"dropout": 0.0} | options))
        self.key, self.specs = key, list(table(self.model.config, architecture))

    def gradients(self, **arguments: Any) -> tuple[float, Arrays]:
        """The loss, and each parameter's gradient by its Hub name, in the checkpoint's orientation."""
        return {"pt": self._torch, "tf": self._keras, "flax": self._flax}[self.key](self.tensors(arguments))

    def _torch(self, given: dict[str, Any]) -> tuple[float, Arrays]:
        self.model.train()
        self.model.zero_grad()
        loss = self.model(**given).loss
        loss.backward()
        assert len(list(self.model.parameters())) == len(self.specs), "a tied head is one parameter"
        return float(loss.detach()), {s.name: to_numpy(TORCH.parameter(self.model, s).grad) for s in self.specs}

    def _keras(self, given: dict[str, Any]) -> tuple[float, Arrays]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.model(**given, training=True).loss
        variables = self.model.trainable_variables
        assert len(variables) == len(self.specs), "a tied head is one variable"
        found = {id(v): g for v, g in zip(variables, tape.gradient(loss, variables), strict=True)}

        def oriented(spec: Spec) -> np.ndarray:
            gradient = tf.convert_to_tensor(found[id(KERAS.parameter(self.model, spec))]).numpy()
            return gradient.T if spec.kind == "linear" else gradient

        return float(loss), {s.name: oriented(s) for s in self.specs}

    def _flax(self, given: dict[str, Any]) -> tuple[float, Arrays]:
        import jax
        from flax import nnx

        loss, state = nnx.value_and_grad(lambda model: model(**given).loss)(self.model)
        found = nnx.to_pure_dict(state)
        assert len(jax.tree.leaves(found)) == len(self.specs), "a tied head is one parameter"

        def at(spec: Spec) -> np.ndarray:
            here: Any = found
            for part in spec.path.split("."):
                here = here[int(part) if part.isdigit() else part]
            return np.asarray(here[getattr(FLAX, spec.kind)])

        return float(loss), {s.name: at(s) for s in self.specs}

    def train(self, batches: list[dict[str, np.ndarray]]) -> Arrays:
        """The weights after a step of the framework's own AdamW for each batch."""
        given = [self.tensors(batch) for batch in batches]
        rate, beta_1, beta_2, epsilon, decay = ADAMW.values()
        if self.key == "pt":
            import torch

            self.model.train()
            optimizer = torch.optim.AdamW(self.model.parameters(), rate, (beta_1, beta_2), epsilon, decay)
            for batch in given:
                optimizer.zero_grad()
                self.model(**batch).loss.backward()
                optimizer.step()
            return {s.name: to_numpy(TORCH.parameter(self.model, s)) for s in self.specs}
        if self.key == "tf":
            import keras
            import tensorflow as tf

            optimizer = keras.optimizers.AdamW(rate, decay, beta_1, beta_2, epsilon)
            for step, batch in enumerate(given, 1):
                # Keras adds its epsilon before the second moment's bias is corrected, the others after
                optimizer.epsilon = epsilon * (1 - beta_2**step) ** 0.5
                with tf.GradientTape() as tape:
                    loss = self.model(**batch, training=True).loss
                variables = self.model.trainable_variables
                optimizer.apply(tape.gradient(loss, variables), variables)
            arrays = {s.name: KERAS.parameter(self.model, s).numpy() for s in self.specs}
            return {s.name: arrays[s.name].T if s.kind == "linear" else arrays[s.name] for s in self.specs}
        import optax
        from flax import nnx

        chain = optax.adamw(rate, beta_1, beta_2, epsilon, weight_decay=decay)
        optimizer = nnx.Optimizer(self.model, chain, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any, batch: Any) -> None:
            optimizer.update(model, nnx.grad(lambda m: m(**batch).loss)(model))

        for batch in given:
            step(self.model, optimizer, batch)
        return {s.name: np.asarray(FLAX.parameter(self.model, s)[...]) for s in self.specs}
