"""OPT with the heads of fine-tuning: sequence classification and question answering.

B batch   T tokens of this call   E embedding width
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from opt_common.inputs import array, check_labels, check_spans, kind
from opt_common.outputs import QuestionAnsweringOutput, SequenceClassifierOutput, can_return_tuple

from .cache import KVCache
from .functional import functional
from .layers import classes, mean_loss, wide
from .model import FlaxOPTModel
from .pretrained import FlaxOPTPreTrainedModel
from .products import linear


class FlaxOPTForSequenceClassification(FlaxOPTPreTrainedModel):
    """OPT for sequence classification: `score` maps the last token of a row to one or more labels."""

    architecture = "OPTForSequenceClassification"

    def build(self, **how: Any) -> None:
        config = self.config
        self.model = FlaxOPTModel(config, **how)
        self.score = linear(config, config.embed_dim, config.num_labels, bias=False, **how)

    @functional
    @can_return_tuple
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        position_ids: ArrayLike | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `OPTDecoder.__call__` and `functional`, and:

        labels: for config.problem_type, which if None follows from num_labels and the labels as in transformers:
            "regression" (num_labels 1): [B] or, with several labels, [B, num_labels] numbers; the mean squared error.
            "single_label_classification" (whole numbers): [B], -100 for rows to leave out; the mean cross-entropy.
            "multi_label_classification" (numbers 0 to 1): [B, num_labels]; the mean binary cross-entropy.
            The loss is float32.
        """
        out = self.model.decoder(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, **kwargs
        )
        x = out.last_hidden_state  # [B, T, E]
        B, T = x.shape[:2]
        real = jnp.ones((B, T), bool)
        if attention_mask is not None:
            first = 0 if past_key_values is None else past_key_values.length
            real = lax.dynamic_slice_in_dim(jnp.asarray(attention_mask), first, T, axis=1) != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            real = real & (jnp.asarray(input_ids) != self.config.pad_token_id)
        last = (real * jnp.arange(T)).argmax(1)
        logits = self.score(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])  # [B, labels]
        loss = None
        if labels is not None:
            given: Any = labels if hasattr(labels, "dtype") else array("labels", labels)
            problem = check_labels(self.config, B, given.shape, whole=kind(given.dtype)[0] in "iu")
            if problem == "single_label_classification":
                labels = classes("labels", given.reshape(-1), logits.shape[1])
                loss = mean_loss(logits, labels, labels != -100)
            else:
                scores = wide(logits)
                targets = jnp.asarray(given).reshape(scores.shape).astype(scores.dtype)
                binary = jax.nn.softplus(scores) - targets * scores  # log(1 + eˢ) - targets·s
                loss = ((scores - targets) ** 2 if problem == "regression" else binary).mean()
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class FlaxOPTForQuestionAnswering(FlaxOPTPreTrainedModel):
    """OPT for question answering: two scores per token, for the start and the end of the answer."""

    architecture = "OPTForQuestionAnswering"

    def build(self, **how: Any) -> None:
        config = self.config
        self.model = FlaxOPTModel(config, **how)
        self.qa_outputs = linear(config, config.embed_dim, 2, **how)

    @functional
    @can_return_tuple
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        start_positions: ArrayLike | None = None,
        end_positions: ArrayLike | None = None,
        use_cache: bool | None = None,
        position_ids: ArrayLike | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.__call__` and `functional`, and:

        start_positions, end_positions: [B], the columns of the answer's first and last token. Those outside the row's T
            columns are left out. (transformers treats negative ones as 0.) The loss is the mean of the two mean
            cross-entropies, in float32.
        """
        out = self.model.decoder(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, **kwargs
        )
        scores = self.qa_outputs(out.last_hidden_state)
        starts, ends = scores[:, :, 0], scores[:, :, 1]  # [B, T] each
        loss = None
        if check_spans(
            len(starts),
            None if start_positions is None else jnp.shape(start_positions),
            None if end_positions is None else jnp.shape(end_positions),
        ):
            losses = []
            given = {"start_positions": (starts, start_positions), "end_positions": (ends, end_positions)}
            for name, (scores, positions) in given.items():
                columns = classes(name, positions, None).reshape(-1)
                losses.append(mean_loss(scores, columns, (columns >= 0) & (columns < scores.shape[1])))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, out.past_key_values, out.hidden_states, out.attentions)
