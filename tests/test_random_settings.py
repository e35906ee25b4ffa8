"""`generate` under random settings, token for token as transformers; and the distribution that it samples from.

A few settings are quick; many are slow, 200 in five parts. OPT_ZOO_SETTINGS=2000 tests so many, in ten. TensorFlow
keeps every program that XLA compiles, so there each part of 2,000 takes a process of its own: -m slow -k tf-3."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import save_reference
from random_settings import FORMS, Case, cases, reference

COUNT = int(os.environ.get("OPT_ZOO_SETTINGS", 200))
PARTS = max(5, COUNT // 200)
few_cases = cache(lambda: cases(1, 20, 3))
all_cases = cache(lambda: cases(0, COUNT, FORMS * COUNT // 200))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("settings")
    return {model: save_reference(reference(model), folder / model) for model in ("pre-norm", "350m")}


def test_few_random_settings(framework, folders, load):
    check(framework, folders, load, few_cases())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_settings(framework, part, folders, load):
    check(framework, folders, load, all_cases()[part * COUNT // PARTS : (part + 1) * COUNT // PARTS])


def check(framework, folders, load, settings: list[Case]) -> None:
    wrong = []
    for case in settings:
        found = write(load(framework, folders[case.model]), case)
        if not np.array_equal(found, case.wanted):
            wrong.append(f"{case}\nfound {found.tolist()}\nwanted {case.wanted.tolist()}")
    assert not wrong, f"{len(wrong)} differ:\n\n" + "\n\n".join(wrong[:3])


def write(model, case: Case) -> np.ndarray:
    try:
        return model.generate(input_ids=case.ids, attention_mask=case.mask, **case.options)
    except Exception as error:
        error.add_note(str(case))
        raise


FILTERS = [
    dict(top_k=0, min_p=0.2), dict(top_k=0, epsilon_cutoff=0.012), dict(top_k=0, eta_cutoff=0.02),
    dict(top_k=20, top_p=0.9, typical_p=0.8), dict(top_k=30, repetition_penalty=1.4, renormalize_logits=True),
]  # fmt: skip
ALONE = [dict(top_k=7), dict(top_k=0, top_p=0.7), dict(top_k=0, typical_p=0.5)]  # slow: they run together above


@pytest.mark.parametrize(
    "options", [*FILTERS, *(pytest.param(options, marks=pytest.mark.slow) for options in ALONE)], ids=str
)
def test_the_distribution_that_is_sampled(framework, options, folders, load):
    """Judged by the probabilities themselves: those of transformers to 1e-6."""
    ids = np.random.default_rng(3).integers(3, 96, (2, 6))
    arguments = dict(do_sample=True, temperature=8.0, max_new_tokens=1, return_dict_in_generate=True,
                     output_scores=True, output_logits=True) | options  # fmt: skip
    wanted = reference("350m").generate(torch.tensor(ids), **arguments)
    backend = load(framework, folders["350m"])
    found = backend.model.generate(**backend.tensors({"input_ids": ids}), **arguments)
    probabilities = torch.tensor(backend.as_float64(found.scores[0])).softmax(-1)
    assert (probabilities - wanted.scores[0].double().softmax(-1)).abs().max() < 1e-6
    kept = (probabilities > 0).sum(-1)
    assert (kept < 101).any() and (kept > 1).all(), "the filter did nothing, or left nothing to draw"
    errors = backend.as_float64(found.logits[0]) - wanted.logits[0].double().numpy()
    assert np.abs(errors).max() < 1e-4


@pytest.mark.parametrize("calls", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_frequencies(framework, calls, folders, load):
    """20,000 draws, and 100,000 when slow, of independent rows, against the probabilities: chi-square, five standard
    deviations."""
    ids, rows = np.random.default_rng(3).integers(3, 96, (1, 2)), 4000
    with torch.no_grad():
        chances = (reference("350m")(torch.tensor(ids)).logits[0, -1] / 12).softmax(-1).numpy()
    model, counts = load(framework, folders["350m"]), np.zeros(101)
    for seed in range(calls):
        drawn = model.generate(input_ids=np.repeat(ids, rows, axis=0), do_sample=True, temperature=12.0, top_k=0,
                               max_new_tokens=1, seed=seed)[:, -1]  # fmt: skip
        counts += np.bincount(drawn, minlength=101)
    expected = chances * rows * calls
    seen = expected > 5
    chi = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    freedom = int(seen.sum()) - 1
    assert freedom > 50
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
