"""The model's passes of one `generate`: over the prompt, then over new tokens. `passes` takes the quickest way that
computes what calling the modules computes.

B prompts   R rows: each prompt as often as it has texts or beams   T columns of a prompt   V vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from opt_common.generation import Prompt

from ..cache import KVCache
from ..fast import cpu, gpu
from ..inputs import can_cache
from ..parallel import anyone, fully_sharded
from .choosing import Chooser
from .text import Text


def passes(model: Any, given: Prompt, ids: Tensor, mask: Tensor, text: Text, inputs: dict[str, Any]) -> Passes:
    """The passes of `given`. ids and mask [B, T]; inputs: further arguments of the model's call."""
    settings = given.settings
    usual = settings.use_cache and not inputs.keys() - {"inputs_embeds"}
    if usual and gpu.can_step(model, ids):
        return OnGPU(model, given, ids, mask, text, inputs)
    if usual and cpu.can_step(model, ids):
        return OnCPU(model, given, ids, mask, text, inputs)
    return Passes(model, given, ids, mask, text, inputs)


class Passes:
    """By calling the model with what its `prepare_inputs_for_generation` makes of the tokens so far, as transformers
    does.

    attentions, hidden_states: of each pass, what the model returned of them.
    """

    def __init__(
        self, model: Any, given: Prompt, ids: Tensor, mask: Tensor, text: Text, inputs: dict[str, Any]
    ) -> None:
        settings, n = given.settings, text.copies
        self.model, self.text, self.in_step = model, text, fully_sharded(model)
        self.ids, self.mask = ids.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
        self.inputs = {k: v.repeat_interleave(n, dim=0) if _of_rows(v, ids) else v for k, v in inputs.items()}
        self.cache = self.inputs.pop("past_key_values", None)
        if n > 1 and isinstance(self.cache, KVCache) and self.cache.rows == len(ids):
            self.cache.batch_repeat_interleave(n)
        embeds = "inputs_embeds" in inputs  # they are seen through a cache alone
        self.use_cache = (settings.use_cache or embeds) and can_cache(model.get_decoder())
        self.draft = settings.draft
        self.attentions: list[Any] = []
        self.hidden_states: list[Any] = []

    def first(self) -> Tensor:
        """The logits [R, V] of the tokens behind the prompts."""
        T = self.mask.shape[1]
        last = T - 1 - self.mask.flip(1).argmax(dim=1)  # the rightmost real token of each row
        keep = {}
        if bool((last == T - 1).all()) and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            keep["logits_to_keep"] = 1
        logits = self._call(**keep)
        self.inputs.pop("inputs_embeds", None)
        if keep:
            return logits[:, -1]
        columns = last + logits.shape[1] - T  # behind those that a prompt tuning puts in front
        return logits[torch.arange(len(logits), device=logits.device), columns.to(logits.device)]

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [R, k, V] behind each of further tokens [R, k]."""
        n, k = tokens.shape
        self.ids = torch.cat([self.ids, tokens.to(self.ids)], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(n, k)], dim=1)
        if (positions := self.inputs.get("position_ids")) is not None:
            more = positions[:, -1:] + torch.arange(1, k + 1, device=positions.device)
            self.inputs["position_ids"] = torch.cat([positions, more], dim=1)
        return self._call()[:, -k:]

    def _call(self, **keep: int) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, past_key_values=self.cache, attention_mask=self.mask, use_cache=self.use_cache, **self.inputs
        )
        if self.in_step:
            anyone(True, self.ids.device)
        out = self.model(**inputs, **keep, return_dict=True)
        self.cache = out.past_key_values
        self.attentions.append(out.attentions)
        self.hidden_states.append(out.hidden_states)
        return out.logits.to(self.text.ids.device)

    def finish(self) -> None:
        """Of a model whose weights are gathered for each pass: take part in those that others still make."""
        while self.in_step and anyone(False, self.ids.device):
            self.model(self.ids[:1, :1], use_cache=False)

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row rows[i] is."""
        self.ids = self.ids[rows]
        if hasattr(self.model, "_reorder_cache"):
            self.cache = self.model._reorder_cache(self.cache, rows)
        elif self.cache is not None:
            self.cache.reorder_cache(rows)

    def forget(self, n: int) -> None:
        """Take the last n columns back."""
        if n:
            self.ids, self.mask = self.ids[:, :-n], self.mask[:, :-n]
            if "position_ids" in self.inputs:
                self.inputs["position_ids"] = self.inputs["position_ids"][:, :-n]
            if self.cache is not None:
                self.cache.crop(self.cache.get_seq_length() - n)

    def kept(self) -> Any:
        """The cache, for the user."""
        return self.cache

    def turn(self, choose: Chooser) -> Callable[[], None]:
        """What one more token takes: a pass over the last one, and the choice behind it."""

        def turn() -> None:
            self.text.write(choose(self.next(self.text.token[:, None])[:, 0]))

        return turn


def _of_rows(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == ids.shape[0]


class OnCPU(Passes):
    """Over the prompt by the model's call, into a cache of the size that the text will have; then a token a row by
    `fast.cpu.Step`."""

    def first(self) -> Tensor:
        n, R, T = self.text.copies, *self.mask.shape
        room = T + self.text.ids.shape[1] - self.text.width - 1  # the last token is not fed back
        prompt = {k: x[::n] for k, x in {"input_ids": self.ids, **self.inputs, "attention_mask": self.mask}.items()}
        if "inputs_embeds" in prompt:
            del prompt["input_ids"]
        ends, row = (T - 1 - prompt["attention_mask"].flip(1).argmax(dim=1)).unique(return_inverse=True)
        cache = self._room(room)
        out = self.model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=ends, return_dict=True)
        logits = out.logits[torch.arange(R // n, device=row.device), row]
        # which row computed what each row sees in a slot: of the prompt's, the first of its rows
        self.wrote = torch.arange(R, device=row.device, dtype=torch.int32)[:, None].repeat(1, room)
        self.wrote[:, :T] -= self.wrote[:, :T] % n
        self.step = self._step(cache)
        return logits.repeat_interleave(n, dim=0)

    def _room(self, slots: int) -> KVCache:
        """An empty cache for the prompts."""
        return self.model.init_cache(len(self.mask) // self.text.copies, slots)

    def _step(self, cache: KVCache) -> Any:
        """What makes a pass over one token a row, behind the cache of the prompts."""
        cache.batch_repeat_interleave(self.text.copies)
        self.cache = cache
        return cpu.Step(self.model, cache, self.mask, self.mask.sum(dim=1), self.text.token)

    def next(self, tokens: Tensor) -> Tensor:
        k = tokens.shape[1]
        if k == 1:
            self.text.token.copy_(tokens[:, 0])
            return self.step()[:, None]
        return self._several(tokens)

    def _several(self, tokens: Tensor) -> Tensor:
        k = tokens.shape[1]
        self._mark(self._taken() - 1)
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, return_dict=True).logits
        self.step.position = self.step.position + k
        return logits

    def _taken(self) -> int:
        """How many slots the text takes."""
        return self.mask.shape[1] + self.text.length - self.text.width

    def _mark(self, length: int) -> None:
        """Tell the cache how many slots are taken, and which of them are padding."""
        R, T = self.mask.shape
        self.cache.length = length
        padded = not bool(self.mask.all())
        self.cache.segments = torch.cat([self.mask, self.mask.new_ones(R, length - T)], dim=1) if padded else None

    def reorder(self, rows: Tensor) -> None:
        """Beams share their beginnings: only the slots from where they differ are copied."""
        length, wrote = self.cache.length, self.wrote[rows]
        differs = (wrote != self.wrote)[:, :length].any(dim=0)
        if differs.any():
            first = int(differs.int().argmax())
            self.wrote[:, :length] = wrote[:, :length]
            for tensor in (*self.cache.k, *self.cache.v):
                tensor[:, :, first:length] = tensor[rows, :, first:length]

    def forget(self, n: int) -> None:
        self.cache.length -= n
        self.step.position = self.step.position - n

    def kept(self) -> KVCache:
        self._mark(self._taken() - 1)  # the last token is not fed back
        self.cache.fixed = False
        return self.cache


class OnGPU(OnCPU):
    """As OnCPU, by `fast.gpu.Step`, which is captured as a CUDA graph together with the choice behind it. Rows of one
    prompt share their beginnings in the cache, which stays in place: `wrote` says where a row finds what it sees."""

    def first(self) -> Tensor:
        self.graphs: dict[int, Callable[[], None]] = {}  # by tokens a row
        with _current(self.mask.device):
            logits = super().first()
        self.steps = {1: self.step}
        return logits

    def _room(self, slots: int) -> KVCache:
        n = self.text.copies
        self.cache = self.model.init_cache(len(self.mask), slots + self.draft)
        if n == 1:
            return self.cache
        prompts = KVCache()  # the first row of each
        prompts.k, prompts.v = ([x[::n] for x in tensors] for tensors in (self.cache.k, self.cache.v))
        prompts.taken, prompts.fixed = [0] * len(prompts.k), True
        return prompts

    def _step(self, cache: KVCache) -> gpu.Step:
        self.cache.length = cache.length
        table = self.wrote if self.text.copies > 1 else None
        return gpu.Step(self.model, self.cache, self.mask, self.mask.sum(dim=1), self.text.token, table)

    def turn(self, choose: Chooser) -> Callable[[], None]:
        step, text, graph = self.step, self.text, None

        def pass_and_choice() -> None:
            logits = step()
            step.keep(text, None if choose.greedy else choose(logits))

        captured, variant = pass_and_choice if choose.fixed else step, (*step.variant, choose.variant)

        def turn() -> None:
            nonlocal graph
            with _current(self.mask.device):
                if variant not in _loaded:
                    step.compile(text, choose.greedy)
                    captured()  # for real, since loading does not go into a graph
                    _loaded.add(variant)
                elif graph is None and text.length + 1 == text.ids.shape[1]:
                    captured()
                else:
                    graph = graph or _captured(captured, choose.rng)
                    graph()
                if not choose.fixed:
                    step.keep(text, choose(step.logits))

        return turn

    def next(self, tokens: Tensor) -> Tensor:
        """Shorter drafts are filled up: one graph serves all of them, and what it writes behind them is written again
        before it is seen."""
        k = tokens.shape[1]
        with _current(self.mask.device):
            if k > self.step.block:
                logits = self._several(tokens)
            else:
                logits = self._at_once(tokens, 1 if k == 1 else min(self.draft + 1, self.step.block))[:, :k]
        self.step.position += k
        self.step.slot += k
        return logits

    def _at_once(self, tokens: Tensor, n: int) -> Tensor:
        """The logits [R, n, V] of a step for n tokens a row, of which `tokens` [R, k] are the first."""
        step = self.steps.get(n)
        if step is None:
            room = torch.zeros(n, device=tokens.device, dtype=torch.long)
            step = self.steps[n] = gpu.Step(self.model, self.cache, self.mask, self.step.position, room, tail=n)
            step.visible = self.step.visible
        step.token[: tokens.numel()] = tokens.flatten()
        if n > 1:
            after = torch.arange(n, device=tokens.device, dtype=torch.int32)
            step.slot.copy_(self.step.slot + after)
            step.position.copy_((self.step.position + after).clamp(max=self.model.config.max_position_embeddings - 1))
        if step.variant not in _loaded:
            step.compile(self.text, greedy=False)
            step()  # for real, since loading does not go into a graph
            _loaded.add(step.variant)
        else:
            if n not in self.graphs:
                self.graphs[n] = _captured(step, None)
            self.graphs[n]()
        return step.logits.view(len(tokens), n, -1)

    def _several(self, tokens: Tensor) -> Tensor:
        self._mark(self._taken() - 1)
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, return_dict=True).logits
        self.step.visible[:, self._taken() - 1 : self._taken() - 1 + tokens.shape[1]] = 1
        return logits

    def reorder(self, rows: Tensor) -> None:
        at, T, W = self.text.at[0], self.mask.shape[1], self.text.width
        slots = torch.arange(self.wrote.shape[1], device=rows.device)
        self.wrote.copy_(torch.where(slots < T + at - W, self.wrote[rows], self.wrote))

    def forget(self, n: int) -> None:
        self.step.position -= n
        self.step.slot -= n

    def kept(self) -> KVCache:
        if self.text.copies > 1:
            rows = self.wrote.long()[:, None, :, None]
            for tensors in (self.cache.k, self.cache.v):
                for i, x in enumerate(tensors):
                    tensors[i] = x.gather(0, rows.expand(x.shape))
        return super().kept()


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # Triton launches on the current one


_loaded: set[tuple] = set()  # the variants of a step and its choice whose kernels this process has loaded


def _captured(turn: Callable[[], Any], rng: torch.Generator | None) -> Callable[[], None]:
    """`turn`, whose kernels are loaded, as a CUDA graph: launched kernel by kernel once, then replayed."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    if rng is not None:
        graph.register_generator_state(rng)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        turn()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
