"""Learning in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from opt_common.weights import TORCH, Spec


def gradients(model: Any, specs: list[Spec], given: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    model.train()
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    assert len(list(model.parameters())) == len(specs), "a tied head is one parameter"
    return float(loss.detach()), {spec.name: TORCH.parameter(model, spec).grad for spec in specs}


def train(
    model: Any, batches: list[Any], rate: float, beta_1: float, beta_2: float, epsilon: float, decay: float
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, (beta_1, beta_2), epsilon, decay)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
