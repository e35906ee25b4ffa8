"""OPT with the heads of fine-tuning: sequence classification and question answering.

B batch   T tokens of this call   E embedding width
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import kind
from opt_common.outputs import QuestionAnsweringOutput, SequenceClassifierOutput, can_return_tuple

from .cache import KVCache, past_length
from .inputs import check_labels, check_spans, integers
from .layers import Linear, classes, mean_cross_entropy, wide
from .model import TFOPTModel
from .pretrained import TFOPTPreTrainedModel


class TFOPTForSequenceClassification(TFOPTPreTrainedModel):
    """OPT for sequence classification: `score` maps the last token of a row to one or more labels."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, initializer, **kwargs)
        self.model = TFOPTModel(self.config, self.initializer, dtype=self.dtype_policy, name="model")
        self.score = Linear(config.embed_dim, config.num_labels, bias=False)
        self.build()

    @can_return_tuple
    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        training: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `OPTDecoder.call`, and:

        labels: for config.problem_type, which if None follows from num_labels and the labels as in transformers:
            "regression" (num_labels 1): [B] or, with several labels, [B, num_labels] numbers; the mean squared error.
            "single_label_classification" (whole numbers): [B], -100 for rows to leave out; the mean cross-entropy.
            "multi_label_classification" (numbers 0 to 1): [B, num_labels]; the mean binary cross-entropy.
            The loss is float32.
        """
        kwargs |= {"use_cache": use_cache, "position_ids": position_ids, "training": training, "return_dict": True}
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **kwargs)
        x = out.last_hidden_state  # [B, T, E]
        B, T, _ = ops.shape(x)
        real = tf.ones((B, T), tf.bool)
        if attention_mask is not None:
            real = ops.cast(tf.slice(attention_mask, (0, past_length(past_key_values)), (B, T)), "bool")
        if input_ids is not None and self.config.pad_token_id is not None:
            real = ops.logical_and(real, ops.not_equal(input_ids, self.config.pad_token_id))
        last = ops.argmax(ops.where(real, ops.arange(T), 0), axis=1)
        logits = self.score(tf.gather(x, last, axis=1, batch_dims=1))  # [B, labels]
        loss = None
        if labels is not None:
            rows = None if None in labels.shape else logits.shape[0]
            problem = check_labels(self.config, rows, labels.shape, whole=kind(labels.dtype)[0] in "iu")
            scores = wide(logits)
            if problem == "single_label_classification":
                loss = mean_cross_entropy(scores, classes("labels", ops.reshape(labels, (-1,)), scores.shape[1]))
            else:
                targets = ops.cast(ops.reshape(labels, ops.shape(scores)), scores.dtype)
                binary = tf.nn.sigmoid_cross_entropy_with_logits
                loss = ops.mean((scores - targets) ** 2 if problem == "regression" else binary(targets, scores))
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class TFOPTForQuestionAnswering(TFOPTPreTrainedModel):
    """OPT for question answering: two scores per token, for the start and the end of the answer."""

    architecture = "OPTForQuestionAnswering"
    label_names, score_names = ("start_positions", "end_positions"), ("start_logits", "end_logits")

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, initializer, **kwargs)
        self.model = TFOPTModel(self.config, self.initializer, dtype=self.dtype_policy, name="model")
        self.qa_outputs = Linear(config.embed_dim, 2)
        self.build()

    @can_return_tuple
    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        training: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.call`, and:

        start_positions, end_positions: [B], the columns of the answer's first and last token. Those outside the row's T
            columns are left out. (transformers treats negative ones as 0.) The loss is the mean of the two mean
            cross-entropies, in float32.
        """
        kwargs |= {"use_cache": use_cache, "position_ids": position_ids, "training": training, "return_dict": True}
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **kwargs)
        starts, ends = ops.unstack(self.qa_outputs(out.last_hidden_state), 2, axis=-1)  # [B, T] each
        loss = None
        given = (start_positions, end_positions)
        shapes = [None if positions is None else positions.shape for positions in given]
        known = all(shape is None or None not in shape for shape in shapes)
        if check_spans(starts.shape[0] if known else None, *shapes):
            losses = []
            for scores, positions in zip((starts, ends), given, strict=True):
                columns = integers(ops.reshape(positions, (-1,)))
                within = ops.logical_and(columns >= 0, columns < ops.shape(scores)[1])
                losses.append(mean_cross_entropy(scores, ops.where(within, columns, -100)))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, out.past_key_values, out.hidden_states, out.attentions)
