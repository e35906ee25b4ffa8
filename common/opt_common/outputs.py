"""What the models return: dictionaries in order, without the fields that are not there, that are also read by attribute
and, as transformers' outputs, by number among the fields that are there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar

from .kin import Kin


class ModelOutput(Kin, OrderedDict[str, Any]):
    """The base of all outputs. A missing field is None as an attribute, and absent as a key.

    Each framework registers the subclasses with its own functions over nested structures.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__()
        if len(values) == 1 and not named and _are_items(values[0]):  # as frameworks copy dictionaries
            named, values = dict(values[0]), ()
        named |= dict(zip(self.fields, values, strict=False))
        if unknown := named.keys() - {*self.fields}:
            wanted = ", ".join(self.fields)
            raise TypeError(f"{type(self).__name__}: found {', '.join(sorted(unknown))}, wanted {wanted}")
        for name in self.fields:
            if named.get(name) is not None:
                self[name] = named[name]

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        if name == "cache":  # transformers 5.24's name
            return self.get("past_key_values")
        raise AttributeError(f"{type(self).__name__} has no field {name!r}, it has {', '.join(self.fields)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).fields:
            super().__setattr__(name, value)
        elif value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in order."""
        return tuple(self.values())


def _are_items(value: Any) -> bool:
    return isinstance(value, (dict, Iterator)) or (
        isinstance(value, (list, tuple))
        and all(isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str) for item in value)
    )


class BaseModelOutput(ModelOutput):
    """Result of an OPTModel. Letters: B batch, T tokens, E embedding width, H hidden, N heads, S slots.

    last_hidden_state: [B, T, E], after the final norm and `project_out`.
    past_key_values: the KVCache that now holds these tokens, if `use_cache`.
    hidden_states: if asked for, the input of each layer, [B, T, H], then last_hidden_state.
    attentions: if asked for, the attention weights of each layer, [B, N, T, S].
    """

    last_hidden_state: Any
    past_key_values: Any
    hidden_states: Any
    attentions: Any


class CausalLMOutput(ModelOutput):
    """Result of an OPTForCausalLM: `loss` (a float32 scalar, if labels were given) and `logits` [B, T, V], then as
    BaseModelOutput."""

    loss: Any
    logits: Any
    past_key_values: Any
    hidden_states: Any
    attentions: Any


class SequenceClassifierOutput(ModelOutput):
    """Result of an OPTForSequenceClassification: `loss` (a float32 scalar, if labels were given) and `logits`
    [B, labels] of the last token of each row, then as BaseModelOutput."""

    loss: Any
    logits: Any
    past_key_values: Any
    hidden_states: Any
    attentions: Any


class QuestionAnsweringOutput(ModelOutput):
    """Result of an OPTForQuestionAnswering: `loss` (a float32 scalar, if positions were given), `start_logits` and
    `end_logits` [B, T], then as BaseModelOutput."""

    loss: Any
    start_logits: Any
    end_logits: Any
    past_key_values: Any
    hidden_states: Any
    attentions: Any


class GenerateOutput(ModelOutput):
    """Result of a `generate` with `return_dict_in_generate`, as transformers' GenerateDecoderOnlyOutput and
    GenerateBeamDecoderOnlyOutput. R rows: B · num_return_sequences.

    sequences: [R, T + new], the prompts included.
    sequences_scores: [R], beam search: each text's log probability over its length to the power of length_penalty.
    scores: if asked for, of each new token the [B, V] it was chosen from; of beams, [B · num_beams, V].
    logits: if asked for, of each new token the model's logits, of as many rows.
    beam_indices: [R, new], beam search: the row that each token's scores are in, -1 behind an end.
    attentions, hidden_states: if asked for, of each pass a tuple of its layers'.
    past_key_values: the cache of all tokens but the last, if there is one.
    """

    sequences: Any
    sequences_scores: Any
    scores: Any
    logits: Any
    beam_indices: Any
    attentions: Any
    hidden_states: Any
    past_key_values: Any


OUTPUTS = (BaseModelOutput, CausalLMOutput, SequenceClassifierOutput, QuestionAnsweringOutput, GenerateOutput)


def can_return_tuple(call: Callable[..., Any]) -> Callable[..., Any]:
    """Give a model's call the argument return_dict: False returns a tuple; the config's by default."""

    @wraps(call)
    def run(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        if return_dict is None:  # the config speaks to users, not to the models around a decoder
            return_dict = self.config.return_dict if hasattr(type(self), "architecture") else True
        return out if return_dict else out.to_tuple()

    return run
