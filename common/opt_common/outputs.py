"""What the models return: named tuples, so that torch, TensorFlow and JAX all carry them through their transformations,
that can also be read by key and, as transformers' outputs, by index among the fields that are there."""

from __future__ import annotations

from typing import Any, NamedTuple


def _get(output: Any, key: Any) -> Any:
    if isinstance(key, str):
        if key not in output._fields:
            raise KeyError(key)
        return getattr(output, key)
    return tuple(value for value in output if value is not None)[key]


class BaseModelOutput(NamedTuple):
    """Result of an OPTModel. Letters: B batch, T tokens, E embedding width, H hidden, N heads, S slots.

    last_hidden_state: [B, T, E], after the final norm and `project_out`.
    past_key_values: the KVCache that now holds these tokens, if `use_cache`.
    hidden_states: if asked for, the input of each layer, [B, T, H], then last_hidden_state.
    attentions: if asked for, the attention weights of each layer, [B, N, T, S].
    """

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None

    def __getitem__(self, key: Any) -> Any:
        return _get(self, key)


class CausalLMOutput(NamedTuple):
    """Result of an OPTForCausalLM: `loss` (a float32 scalar, if labels were given) and `logits` [B, T, V], then as
    BaseModelOutput."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None

    def __getitem__(self, key: Any) -> Any:
        return _get(self, key)


class SequenceClassifierOutput(NamedTuple):
    """Result of an OPTForSequenceClassification: `loss` (a float32 scalar, if labels were given) and `logits`
    [B, labels] of the last token of each row, then as BaseModelOutput."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None

    def __getitem__(self, key: Any) -> Any:
        return _get(self, key)


class QuestionAnsweringOutput(NamedTuple):
    """Result of an OPTForQuestionAnswering: `loss` (a float32 scalar, if positions were given), `start_logits` and
    `end_logits` [B, T], then as BaseModelOutput."""

    loss: Any = None
    start_logits: Any = None
    end_logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None

    def __getitem__(self, key: Any) -> Any:
        return _get(self, key)
