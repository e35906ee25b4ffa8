"""Random settings of a deterministic `generate`, with the texts that transformers writes under them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from conftest import make_reference

MODELS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "vocab_size": 101},
}
SIZE = dict(num_hidden_layers=2, init_std=0.4)
FORMS = 25  # settings of one form differ in numbers only, so that a framework compiles one program for all of them


@dataclass(frozen=True)
class Case:
    """One `generate`: a model of MODELS, ids and mask [B, T], the options, and the text that transformers writes."""

    model: str
    ids: np.ndarray
    mask: np.ndarray
    options: dict[str, Any]
    wanted: np.ndarray

    def __str__(self) -> str:
        return f"{self.model}, ids {self.ids.tolist()}, mask {self.mask.tolist()}, {self.options}"


@cache
def reference(model: str, distance: float = 0.0) -> transformers.OPTForCausalLM:
    """A float64 model, or one whose weights are so far from its, relatively."""
    made = make_reference(7, **(SIZE | MODELS[model]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + distance * torch.randn_like(parameter))
    return made


def text(model: transformers.OPTForCausalLM, ids: np.ndarray, mask: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """What a model of transformers' writes."""
    result = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    return result.numpy()  # pyright: ignore[reportAttributeAccessIssue]


def cases(seed: int, count: int, forms: int = FORMS, distance: float = 1e-5) -> list[Case]:
    """`count` cases whose texts are the same at a distance; always the same ones, those of a form one after another.
    distance: that of float32 by default."""
    rng, found, tried = np.random.default_rng(seed), list[tuple[int, Case]](), 0
    while len(found) < count:
        tried += 1
        assert tried < 20 * count, "most texts hang on the last digits"
        form = int(rng.integers(forms))
        model, ids, mask, options = one(np.random.default_rng([seed, form]), rng)
        wanted = text(reference(model), ids, mask, options)
        if np.array_equal(wanted, text(reference(model, distance), ids, mask, options)):
            found.append((form, Case(model, ids, mask, options, wanted)))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def one(form: np.random.Generator, number: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray, dict[str, Any]]:
    """A model, ids, a mask, and options: `form` decides which options there are, `number` their values."""

    def maybe(chance: float) -> bool:
        return bool(form.random() < chance)

    def tokens(n: int) -> list[int]:
        return number.integers(3, 96, n).tolist()

    model = str(form.choice([*MODELS]))
    B, beams = int(form.integers(1, 4)), int(form.choice([1, 1, 2, 3, 4]))
    T = 1 if maybe(0.1) else int(number.integers(2, 10))
    ids, mask = np.array([tokens(T) for _ in range(B)]), np.ones((B, T), int)
    for row in range(1, B):
        padding = int(number.integers(0, T))
        ids[row, :padding], mask[row, :padding] = 1, 0
    new = int(number.integers(4, 16))
    options: dict[str, Any] = {"max_length": T + new} if maybe(0.2) else {"max_new_tokens": new}
    options |= {"do_sample": False, "num_beams": beams, "eos_token_id": tokens(form.integers(0, 5)), "pad_token_id": 1}
    if beams > 1:
        options["num_return_sequences"] = int(form.integers(1, beams + 1))
        options["early_stopping"] = [False, True, "never"][form.integers(3)]
        options["length_penalty"] = float(number.choice([-1.0, 0.0, 0.5, 1.0, 2.0]))
    elif maybe(0.1):
        options["guidance_scale"] = float(number.uniform(0.5, 2.0))
    if not options["eos_token_id"]:
        options["eos_token_id"] = None
    elif maybe(0.3):
        options["min_new_tokens"] = int(number.integers(1, new))
    elif maybe(0.2):
        options["min_length"] = int(number.integers(T + 1, T + new))
    if options["eos_token_id"] and maybe(0.15):
        options["exponential_decay_length_penalty"] = (int(number.integers(0, new)), float(number.uniform(1.0, 1.5)))
    if maybe(0.3):
        options["repetition_penalty"] = float(number.uniform(0.7, 2.0))
    if maybe(0.1):
        options["encoder_repetition_penalty"] = float(number.uniform(0.7, 1.5))
    if maybe(0.25):
        options["no_repeat_ngram_size"] = int(number.integers(2, 4))
    if maybe(0.1):
        options["encoder_no_repeat_ngram_size"] = int(number.integers(2, 4))
    if maybe(0.2):
        options["bad_words_ids"] = [tokens(n) for n in (1, 1, 2, 3)]
    if maybe(0.2):
        options["sequence_bias"] = {tuple(tokens(n)): float(number.normal() * 8) for n in (1, 1, 2, 3)}
    if maybe(0.2):
        options["suppress_tokens"] = [11 + token % 80 for token in tokens(6)]  # never the one that is forced
    if maybe(0.15):
        options["begin_suppress_tokens"] = tokens(20)
    if maybe(0.15):
        options["forced_eos_token_id"] = 3 + tokens(1)[0] % 8
    if T == 1 and maybe(0.5):
        options["forced_bos_token_id"] = 3 + tokens(1)[0] % 8
    if maybe(0.1):
        options["renormalize_logits"] = True
    if maybe(0.1):
        options["remove_invalid_values"] = True
    if maybe(0.1):
        options["use_cache"] = False
    return model, ids, mask, options
