"""OPT with a language-model head, without a cache. Letters: B batch, T tokens, V vocabulary."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from opt_common.generation import Options, Settings, prompt
from opt_common.inputs import check_call, check_positions, check_tokens
from opt_common.outputs import CausalLMOutput
from opt_common.reference import forward

from .pretrained import NPOPTPreTrainedModel

Array = np.ndarray


class NPOPTForCausalLM(NPOPTPreTrainedModel):
    architecture = "OPTForCausalLM"

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        labels: Array | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits [B, T, V], and the loss if `labels` [B, T] are given; -100 is no label."""
        ids, masked = (None if given is None else given.shape for given in (input_ids, attention_mask))
        B, T = check_call(self.config, ids, None, masked)
        assert input_ids is not None
        if labels is not None and labels.shape != (B, T):
            raise ValueError(f"labels: found shape {list(labels.shape)}, wanted [{B}, {T}]")
        check_tokens(self.config, int(input_ids.min()), int(input_ids.max()))
        mask = np.ones((B, T), bool) if attention_mask is None else attention_mask != 0
        check_positions(self.config, int(mask.sum(axis=1).max()) - 1, "input_ids")
        logits, hidden = forward(self.config, self.weights.get, input_ids, mask)
        loss = None if labels is None else _cross_entropy(logits[:, :-1], labels[:, 1:])
        return CausalLMOutput(loss, logits, hidden_states=tuple(hidden) if output_hidden_states else None)

    def generate(self, input_ids: Array, attention_mask: Array | None = None, **options: Unpack[Options]) -> Array:
        """Continue each row of `input_ids` [B, T]. Returns [B, T + new]; `Options` has the options."""
        given = prompt(self.config, input_ids, attention_mask, options, self.generation_config)
        ids, mask, settings = given.ids, given.mask, given.settings
        lacks = settings.processors.keys() - {"min_new_tokens", "temperature", "top_k", "top_p"}
        if lacks := lacks | ({"num_beams"} if settings.num_beams > 1 else set()):
            raise TypeError(f"generate() got an unexpected keyword argument {', '.join(lacks)}")
        done, rng = np.zeros(len(ids), bool), np.random.default_rng(settings.seed)
        for step in range(settings.max_new_tokens):
            last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)  # the rightmost real token of each row
            logits = self(ids, mask).logits[np.arange(len(ids)), last]
            if step < settings.processors.get("min_new_tokens", 0):
                logits[:, settings.eos_token_ids] = -np.inf
            token = np.where(done, settings.pad_token_id, _choose(logits, settings, rng))
            done |= np.isin(token, settings.eos_token_ids)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
            if done.all():
                break
        return ids


def _choose(logits: Array, settings: Settings, rng: np.random.Generator) -> Array:
    """The next token of each row, from its logits [B, V]."""
    if not settings.do_sample:
        return logits.argmax(axis=-1)
    order = (-logits).argsort(axis=-1)[:, : settings.processors.get("top_k")]  # the likeliest first
    scores = np.take_along_axis(logits, order, axis=-1) / settings.processors.get("temperature", 1.0)
    chances = np.exp(scores - scores[:, :1])
    chances /= chances.sum(axis=-1, keepdims=True)
    chances[chances.cumsum(axis=-1) - chances >= settings.processors.get("top_p", 1.0)] = (
        0  # the tokens before are already enough
    )
    # p / Exp(1) is largest where a draw from p would fall
    drawn = (chances / rng.exponential(size=chances.shape)).argmax(axis=-1)
    return order[np.arange(len(order)), drawn]


def _cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over all labels but -100."""
    logits, labels = logits[labels != -100], labels[labels != -100]
    logits = logits - logits.max(axis=-1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -chances[np.arange(len(labels)), labels].mean()
