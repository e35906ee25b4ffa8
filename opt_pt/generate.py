"""Text from a model: prefill, choose, then {step, choose} with the cache, without waiting for the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor

from opt_common.generation import Generation, Options, check_generate, merged
from opt_common.inputs import check_call

from .cache import KVCache
from .fast import cpu, gpu
from .inputs import can_cache
from .text import Text


@torch.inference_mode()
def generate(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[Options]) -> Tensor:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included.

    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not the config's `pad_token_id`.
    options: see `opt_common.generation.Options`.
    A model in half precision on a GPU takes each step as one replay of a CUDA graph (`opt_pt.fast.gpu`), one on a CPU
    without its modules' overhead (`opt_pt.fast.cpu`), if its modules are as they were made; otherwise it is called.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    B, T = check_call(self.config, input_ids.shape, None, None if attention_mask is None else attention_mask.shape)
    if attention_mask is None and self.config.pad_token_id is not None:
        attention_mask = input_ids != self.config.pad_token_id
    mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    counts = mask.sum(dim=1)
    options = merged(self.generation_config, options)
    if options.get("seed") is None:  # as torch.manual_seed says
        options["seed"] = int(torch.randint(2**63 - 1, ()))
    settings = check_generate(self.config, T, int(counts.max()), int(counts.min()), **options)
    device = input_ids.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
        text = _write(self, input_ids, mask, settings)
    return torch.cat([input_ids, text.tokens[:, : text.length()].to(input_ids.dtype)], dim=1)


def _write(self: Any, input_ids: Tensor, mask: Tensor, settings: Generation) -> Text:
    (B, T), device, new = input_ids.shape, input_ids.device, settings.max_new_tokens
    text = Text(B, self.config.vocab_size, settings, device)
    last = T - 1 - mask.flip(1).argmax(dim=1)  # the rightmost real token of each row
    on_gpu = gpu.can_step(self, input_ids)
    if not (on_gpu or cpu.can_step(self, input_ids)):
        _call(self, input_ids, mask, last, text)
        return text

    dtype = self.model.decoder.embed_positions.weight.dtype
    cache = KVCache(self.config, B, T + new - 1, device, dtype)  # the last token is never fed back
    ends, row = last.unique(return_inverse=True)
    logits = self(input_ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=ends, return_dict=True).logits
    text.write(logits[torch.arange(B, device=device), row])
    at = 1
    if new > 1 and on_gpu:
        step = gpu.Step(self, cache, mask, mask.sum(dim=1), text.token)
        greedy = not settings.do_sample and not settings.min_new_tokens

        def turn() -> None:
            logits = step()
            step.keep(text, None if greedy else text.choose(logits))

        variant = (*step.variant, greedy, settings.do_sample, settings.top_k, settings.top_p < 1)
        if variant not in _compiled:
            step.compile(text, greedy)
            turn()  # for real, since loading does not go into a graph
            _compiled.add(variant)
            at = 2
        turn = _captured(turn, text.rng) if at + 1 < new else turn
    elif new > 1:
        step = cpu.Step(self, cache, mask, mask.sum(dim=1), text.token)

        def turn() -> None:
            text.write(step())

    for i in range(at, new):
        if _ended(text, i):
            break
        turn()
    return text


def _call(self: Any, input_ids: Tensor, mask: Tensor, last: Tensor, text: Text) -> None:
    """Generate by calling the model, as transformers does: with what `prepare_inputs_for_generation` makes of the
    tokens so far."""
    B, T = input_ids.shape
    keep = {}
    if bool((last == T - 1).all()) and "logits_to_keep" in inspect.signature(self.forward).parameters:
        keep["logits_to_keep"] = 1
    cache, new, use_cache = None, text.settings.max_new_tokens, can_cache(self.get_decoder())
    for i in range(new):
        if i and _ended(text, i):
            break
        inputs = self.prepare_inputs_for_generation(
            input_ids, past_key_values=cache, attention_mask=mask, use_cache=use_cache
        )
        out = self(**inputs, **keep, return_dict=True)
        cache, logits = out.past_key_values, out.logits
        if i == 0 and not keep:  # behind the columns that a prompt tuning puts in front
            columns = last + logits.shape[1] - T
            logits = logits[torch.arange(B, device=logits.device), columns.to(logits.device), None]
        text.write(logits[:, -1].to(text.token.device))
        input_ids = torch.cat([input_ids, text.token[:, None].to(input_ids.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)


def _ended(text: Text, i: int) -> bool:
    """Whether every row has ended before token i; on a GPU this waits for the device, so it looks at every 16th."""
    every = 1 if text.done.device.type == "cpu" else 16
    return bool(text.settings.eos_token_ids) and i % every == 0 and bool(text.done.all())


_compiled: set[tuple] = set()  # the variants of a step whose kernels this process has loaded


def _captured(turn: Callable[[], None], rng: torch.Generator) -> Callable[[], None]:
    """`turn`, whose kernels are loaded, as a CUDA graph: launched kernel by kernel once, then replayed."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    graph.register_generator_state(rng)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        turn()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
