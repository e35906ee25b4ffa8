"""`generate`: arguments, which way to write, and the result.

B prompts   R rows: each prompt as often as it has texts   T columns of a prompt   V vocabulary
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from opt_common.generation import Options, Prompt, pieces, prompt
from opt_common.outputs import GenerateOutput

from ..parallel import agreed
from . import beams, drafts, loop
from .choosing import Chooser
from .passes import Passes, passes
from .text import Text


@torch.no_grad()
def generate(
    self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Unpack[Options]
) -> Any:
    """Continue each row of `input_ids` [B, T]; returns [R, T + new] int64, the prompts included, where R is B, or B ·
    num_return_sequences. With `return_dict_in_generate`, a GenerateOutput.

    attention_mask: [B, T], 0 for padding on either side. Default: everything but `pad_token_id`.
    options: see `opt_common.generation.Options`, or further arguments of the model's call.
    A model in half precision on a GPU takes each step as one replay of a CUDA graph (`opt_pt.fast.gpu`), one on a CPU
    without its modules' overhead (`opt_pt.fast.cpu`), if its modules are as they were made; otherwise it is called.
    In training mode dropout stays on, as in transformers, and a warning says so.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is invalid.
    """
    writer = Writer(self, input_ids, attention_mask, options)
    streamer = writer.given.options.get("streamer")
    if writer.given.settings.num_beams > 1:
        new, indices, scores = writer.search()
        return writer.result(new, beam_indices=indices, sequences_scores=scores)
    if streamer is not None:
        streamer.put(writer.prompts().cpu())
    for token in writer.tokens(watched=streamer is not None):
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return writer.result(writer.text.new())


def stream(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Any,
    **options: Any,
) -> Iterator[str]:
    """Like `generate` for one row, but yields the new text in pieces, as it is written. tokenizer: decodes it."""
    writer = Writer(self, input_ids, attention_mask, {**options, "tokenizer": tokenizer})
    if (rows := len(writer.text.ids)) != 1:
        raise ValueError(f"stream: found {rows} rows or beams, wanted one")
    return pieces((token.cpu().numpy() for token in writer.tokens(watched=True)), tokenizer)


class Writer:
    """One `generate`: what its arguments make, and what it returns."""

    def __init__(self, model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> None:
        if hasattr(attention_mask, "to_dict"):  # transformers' second argument
            attention_mask, options = None, {**options, "generation_config": attention_mask}
        options, inputs = _divided(model, options)
        if model.tp_size > 1:
            options["seed"] = agreed(options.get("seed"))
        given = prompt(model.config, _numpy(input_ids), _numpy(attention_mask), options, model.generation_config)
        config = model.config
        if model.training and (config.dropout or config.attention_dropout or config.layerdrop):
            warnings.warn(
                "generate: found a model in training mode, where dropout is on; wanted model.eval()", stacklevel=3
            )
        settings, sources = given.settings, (input_ids, options.get("inputs"), options.get("inputs_embeds"))
        self.home = next((x.device for x in sources if isinstance(x, Tensor)), model.device)  # where the result goes
        device = self.home if model.device.type == "meta" else model.device
        shown = {name: True for name in ("output_attentions", "output_hidden_states") if getattr(settings, name)}
        self.model, self.given = model, given
        self.ids, mask = (torch.tensor(x, device=device, dtype=torch.long) for x in (given.ids, given.mask))
        if shown:  # padding too, which in transformers' generate stands at position 0
            inputs = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0) * mask} | inputs | shown
        T = mask.shape[1] - given.held
        # with embeddings alone, what stands in their columns is not looked at
        ids = self.ids if self.ids.shape[1] == T else self.ids.new_zeros(len(mask), T)
        past: Any = inputs.get("past_key_values")
        if past is not None:
            given.unread(int(past.get_seq_length()))
        self.text = Text(given, model.config.vocab_size, device)
        self.passes = passes(model, given, ids, mask, self.text, inputs)
        self.choose = Chooser(settings, self.text, Guide(model, given, self.text))
        self.stops = loop.Stops(settings, given.options, self.choose.scores)
        self.drafter = drafts.drafter(given, ids, mask[:, given.held :], self.text)

    def prompts(self) -> Tensor:
        """[R, T]"""
        return self.ids.repeat_interleave(self.text.copies, dim=0)

    @torch.no_grad()
    def tokens(self, watched: bool) -> Iterator[Tensor]:
        """The new tokens, [R] a step; watched: whether somebody looks at each."""
        if self.drafter is None:
            watched = watched or bool(self.stops)
            yield from loop.write(self.text, self.passes, self.choose, self.stops.over, watched)
        else:
            yield from drafts.write(self.text, self.passes, self.choose, self.stops, self.drafter)
        self.passes.finish()

    def search(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `beams.search`."""
        found = beams.search(self.given.settings, self.text, self.passes, self.choose, self.stops)
        self.passes.finish()
        return found

    def result(self, new: Tensor, **of_beams: Tensor) -> Any:
        """What `generate` returns, of the new tokens [R, new]."""
        settings, choose = self.given.settings, self.choose
        ids = self.ids.repeat_interleave(len(new) // len(self.ids), dim=0)
        sequences = torch.cat([ids, new], dim=1).to(self.home)
        if not settings.return_dict_in_generate:
            return sequences
        if not settings.output_scores:
            of_beams.pop("sequences_scores", None)
        return GenerateOutput(
            sequences=sequences,
            scores=None if choose.scores is None else tuple(choose.scores),
            logits=None if choose.logits is None else tuple(choose.logits),
            attentions=tuple(self.passes.attentions) if settings.output_attentions else None,
            hidden_states=tuple(self.passes.hidden_states) if settings.output_hidden_states else None,
            past_key_values=self.passes.kept(),
            **of_beams,
        )


def _divided(model: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `generate`, and the further arguments of the model's call."""
    own = Options.__annotations__.keys() | {"logits_to_keep", "return_dict"}
    further = inspect.signature(model.forward).parameters.keys() - own
    left = {"past_key_values" if name == "cache" else name: value for name, value in options.items()}
    left.pop("labels", None)  # Seq2SeqTrainer gives the batch as it is
    inputs = {name: left.pop(name) for name in [*left] if name in further}
    criteria: Any = left.get("stopping_criteria")
    for criterion in criteria if isinstance(criteria, list) else [criteria]:
        if type(criterion).__name__ == "MaxLengthCriteria":  # transformers' own takes the place of the option
            left["max_length"], left["max_new_tokens"] = criterion.max_length, None
    for name in ("inputs_embeds", "past_key_values"):
        if left.get(name) is not None:
            inputs[name] = left[name]
    return left, {name: value for name, value in inputs.items() if value is not None}


def _numpy(x: Any) -> Any:
    return x.cpu().numpy() if isinstance(x, Tensor) else x


class Guide:
    """The logits that `guidance_scale` moves away from."""

    def __init__(self, model: Any, given: Prompt, text: Text) -> None:
        self.model, self.given, self.text = model, given, text
        self.passes: Passes | None = None

    def __call__(self) -> Tensor:
        """[R, V], behind the negative prompts and what is written since."""
        text, device = self.text, self.text.ids.device
        if self.passes is not None:
            return self.passes.next(text.token[:, None])[:, 0]
        options: Any = self.given.options
        ids, mask = (options.get(f"negative_prompt_{name}") for name in ("ids", "attention_mask"))
        ids = text.so_far()[:: text.copies, -1:] if ids is None else torch.as_tensor(ids, device=device)
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=device)
        self.passes = Passes(self.model, self.given, ids, mask, text, {})
        return self.passes.first()


def compute_transition_scores(
    self: Any,
    sequences: Tensor,
    scores: tuple[Tensor, ...],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """The score of each new token, [R, new], of what a GenerateOutput says: its `sequences`, `scores` and, of beams,
    `beam_indices`; 0 behind the end of a beam. normalize_logits: make log probabilities of the scores first."""
    stacked = torch.stack(scores)  # [new, rows, V]
    if normalize_logits:
        stacked = stacked.log_softmax(dim=-1)
    if beam_indices is None:
        beam_indices = torch.arange(stacked.shape[1], device=sequences.device)[:, None].expand(-1, len(scores))
    new = int((beam_indices >= 0).sum(dim=1).max())
    rows, tokens = beam_indices[:, :new].long(), sequences[:, sequences.shape[1] - new :]
    steps = torch.arange(new, device=rows.device)
    return stacked[steps, rows.clamp(min=0), tokens].masked_fill(rows < 0, 0.0)
