"""Learning in Flax."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from opt_common.weights import FLAX, Spec


def gradients(model: Any, specs: list[Spec], given: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    loss, state = nnx.value_and_grad(lambda model: model(**given).loss)(model)
    found = nnx.to_pure_dict(state)
    assert len(jax.tree.leaves(found)) == len(specs), "a tied head is one parameter"

    def at(spec: Spec) -> jax.Array:
        here: Any = found
        for part in spec.path.split("."):
            here = here[int(part) if part.isdigit() else part]
        return here[getattr(FLAX, spec.kind)]

    return float(loss), {spec.name: at(spec) for spec in specs}


def train(
    model: Any, batches: list[Any], rate: float, beta_1: float, beta_2: float, epsilon: float, decay: float
) -> None:
    optimizer = nnx.Optimizer(model, optax.adamw(rate, beta_1, beta_2, epsilon, weight_decay=decay), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> None:
        optimizer.update(model, nnx.grad(lambda m: m(**batch).loss)(model))

    for batch in batches:
        step(model, optimizer, batch)
