"""Training: one body for all frameworks, against transformers' PyTorch in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from conftest import CONFIGS, SMALL, save_reference
from learners import ADAMW, Learner

B, T = 24, 10
ARCHITECTURES = ["OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"]
LEFT = np.array([[1] * 10, [0] * 4 + [1] * 6, [0] * 9 + [1]] * 8)


def batch(architecture: str, seed: int = 0, masked: bool = True) -> dict[str, np.ndarray]:
    """What a step learns from; nothing in it looks at padding."""
    rng = np.random.default_rng(seed)
    mask = LEFT if masked else np.ones_like(LEFT)
    ids = np.where(mask, rng.integers(3, 96, (B, T)), 1)
    given = {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}
    if architecture == "OPTForCausalLM":
        return given | {"labels": np.where(mask & np.roll(mask, 1, axis=1), ids, -100)}
    if architecture == "OPTForSequenceClassification":
        return given | {"labels": rng.integers(0, 3, B)}
    # the scores of padding are in the loss, and what padding says means nothing: rows without
    given = {name: array[::3] for name, array in given.items()}
    return given | {"start_positions": rng.integers(0, T, B // 3), "end_positions": rng.integers(0, T, B // 3)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(architecture, name of a config) -> (checkpoint folder, transformers' float64 model of it)."""
    made = {}

    def make(architecture: str, name: str):
        if (architecture, name) not in made:
            torch.manual_seed(0)
            own = {"num_labels": 3, "dropout": 0.0, "init_std": 0.2}
            config = transformers.OPTConfig(**(SMALL | CONFIGS[name] | own))
            model = getattr(transformers, architecture)(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            made[architecture, name] = save_reference(model, tmp_path_factory.mktemp("models") / name), model.double()
        return made[architecture, name]

    return make


def judge(model: Any, given: dict[str, np.ndarray], dtype: Any = torch.float64) -> tuple[float, dict[str, np.ndarray]]:
    model = copy.deepcopy(model).to(dtype).train()
    loss = model(**{name: torch.tensor(array) for name, array in given.items()}).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in model.named_parameters()}


def gradient_errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """‖Δ‖/‖g‖ by name. Softmax does not see what all keys have in common, nor all tokens' scores, so a k_proj.bias, and
    in question answering the last biases, have no gradient but rounding: they are held against the largest."""
    assert found.keys() == wanted.keys()
    sizes = {name: float(np.linalg.norm(g)) for name, g in wanted.items()}
    largest = max(sizes.values())
    rounding = {name for name, size in sizes.items() if size < 1e-12 * largest}
    assert all(name.endswith(".bias") for name in rounding)
    return {
        name: float(np.linalg.norm(found[name] - g) / (largest if name in rounding else sizes[name]))
        for name, g in wanted.items()
    }


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(config, "OPTForCausalLM") for config in CONFIGS]
    # the decoder below is the same, so two of its configs, with and without a final norm and projections, are enough
    + [(config, head) for config in ("pre-norm", "350m") for head in ARCHITECTURES[1:]],
)
def test_gradients(framework, config, architecture, models):
    """The loss to 1e-6 and every gradient to 1e-5, or transformers' own float32 error where that is larger, padding and
    all."""
    folder, reference = models(architecture, config)
    learner = Learner(framework, folder, architecture)
    for masked in (True, False):
        given = batch(architecture, masked=masked)
        loss, wanted = judge(reference, given)
        found_loss, found = learner.gradients(**given)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        own = gradient_errors(judge(reference, given, torch.float32)[1], wanted)
        for name, error in gradient_errors(found, wanted).items():
            assert error <= max(1e-5, own[name]), name


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "OPTForQuestionAnswering"])
def test_gradients_of_padding_columns(framework, architecture, models):
    """Right padding, whose columns are in the loss: every label of labels=input_ids, every score of an answer."""
    folder, reference = models(architecture, "pre-norm")
    given = batch(architecture, masked=False)
    rows = len(given["input_ids"])
    given["attention_mask"] = np.tile([[1] * 10, [1] * 6 + [0] * 4, [1] + [0] * 9], (rows // 3 + 1, 1))[:rows]
    if architecture == "OPTForCausalLM":
        given["labels"] = given["input_ids"]
    loss, wanted = judge(reference, given)
    found_loss, found = Learner(framework, folder, architecture).gradients(**given)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    own = gradient_errors(judge(reference, given, torch.float32)[1], wanted)
    for name, error in gradient_errors(found, wanted).items():
        assert error <= max(1e-5, own[name]), name


def test_one_disturbed_weight_shows(framework, models):
    """Distrust: a hundredth added to a single number of the first layer turns the gradients red."""
    folder, reference = models("OPTForCausalLM", "pre-norm")
    disturbed = copy.deepcopy(reference)
    with torch.no_grad():
        disturbed.model.decoder.layers[0].fc1.bias[7] += 1e-2
    given = batch("OPTForCausalLM")
    _, found = Learner(framework, folder).gradients(**given)
    assert max(gradient_errors(found, judge(disturbed, given)[1]).values()) > 1e-5


@pytest.mark.parametrize(
    ("config", "architecture"),
    [(config, "OPTForCausalLM") for config in ("pre-norm", "350m", "untied")]
    + [("350m", head) for head in ARCHITECTURES[1:]],  # which no decoder's weights know of
)
def test_ten_steps_of_adamw(framework, config, architecture, models):
    """Each framework's own optimizer, ten batches: the weights stay within 1e-4."""
    folder, reference = models(architecture, config)
    batches = [batch(architecture, seed) for seed in range(10)]
    model = copy.deepcopy(reference).train()
    rate, *betas, epsilon, decay = ADAMW.values()
    optimizer = torch.optim.AdamW(model.parameters(), rate, (betas[0], betas[1]), epsilon, decay)
    for given in batches:
        optimizer.zero_grad()
        model(**{name: torch.tensor(array) for name, array in given.items()}).loss.backward()
        optimizer.step()
    found = Learner(framework, folder, architecture).train(batches)
    start = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = parameter.detach().numpy()
        moved = np.linalg.norm(wanted - start[name].detach().numpy()) / np.linalg.norm(wanted)
        assert moved > 1e-4 or name.endswith(".bias"), f"{name} has learnt nothing"
        assert np.linalg.norm(found[name] - wanted) <= 1e-4 * np.linalg.norm(wanted), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing(framework, architecture, models):
    """The same gradients to the bit or nearly, also with a cache in the call, where nothing is recomputed."""
    folder, _ = models(architecture, "350m")
    given = batch(architecture)
    learner = Learner(framework, folder, architecture)
    loss, wanted = learner.gradients(**given)
    learner.model.gradient_checkpointing_enable()
    for extra in ({}, {"use_cache": True}):
        found_loss, found = learner.gradients(**given, **extra)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert max(gradient_errors(found, without_rounding(wanted)).values()) <= 1e-5
    learner.model.gradient_checkpointing_disable()
    assert learner.gradients(**given)[0] == loss


def without_rounding(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float32 gradients, 0 where they are rounding errors alone."""
    largest = max(float(np.linalg.norm(g)) for g in gradients.values())
    return {name: g * (np.linalg.norm(g) > 1e-6 * largest) for name, g in gradients.items()}
