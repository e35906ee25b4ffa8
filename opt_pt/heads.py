"""OPT with the heads of fine-tuning: sequence classification and question answering.

B batch   T tokens of this call   E embedding width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_common.config import OPTConfig
from opt_common.inputs import check_labels, check_spans, kind
from opt_common.outputs import QuestionAnsweringOutput, SequenceClassifierOutput

from .cache import KVCache
from .layers import classes, init_weights, linear, wide
from .model import OPTModel
from .outputs import can_return_tuple
from .pretrained import OPTPreTrainedModel


class OPTForSequenceClassification(OPTPreTrainedModel):
    """OPT for sequence classification: `score` maps the last token of a row to one or more labels."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.num_labels = config.num_labels
        self.model = OPTModel(self.config)
        self.score = nn.Linear(self.config.embed_dim, config.num_labels, bias=False)
        init_weights(self.score, config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `OPTDecoder.forward`, and:

        labels: for config.problem_type, which if None follows from num_labels and the labels as in transformers:
            "regression" (num_labels 1): [B] or, with several labels, [B, num_labels] numbers; the mean squared error.
            "single_label_classification" (whole numbers): [B], -100 for rows to leave out; the mean cross-entropy.
            "multi_label_classification" (numbers 0 to 1): [B, num_labels]; the mean binary cross-entropy.
            The loss is float32.
        """
        kwargs["return_dict"] = True
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, **kwargs)
        x = out.last_hidden_state  # [B, T, E]
        B, T = x.shape[:2]
        if attention_mask is None or attention_mask.ndim == 4:
            real = x.new_ones((B, T), dtype=torch.bool)
        else:
            real = attention_mask[:, -T:] != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            real = real & (input_ids != self.config.pad_token_id)
        last = (real * torch.arange(T, device=x.device)).argmax(1)
        logits = linear(self.score, x[torch.arange(B, device=x.device), last])  # [B, labels]
        loss = None
        if labels is not None:
            problem = check_labels(self.config, B, labels.shape, whole=kind(labels.dtype)[0] in "iu")
            if self.config.problem_type is None:
                self.config.problem_type = problem  # as in transformers: pipelines, and saved files, go by it
            scores = wide(logits)
            if problem == "single_label_classification":
                loss = F.cross_entropy(scores, classes("labels", labels.flatten(), scores.shape[1]))
            elif problem == "regression":
                loss = F.mse_loss(scores, labels.view_as(scores).to(scores.dtype))
            else:
                loss = F.binary_cross_entropy_with_logits(scores, labels.view_as(scores).to(scores.dtype))
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """OPT for question answering: two scores per token, for the start and the end of the answer."""

    architecture = "OPTForQuestionAnswering"

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = OPTModel(self.config)
        self.qa_outputs = nn.Linear(self.config.embed_dim, 2)
        init_weights(self.qa_outputs, config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.forward`, and:

        start_positions, end_positions: [B], the columns of the answer's first and last token. Those outside the row's T
            columns are left out. (transformers treats negative ones as 0.) The loss is the mean of the two mean
            cross-entropies, in float32.
        """
        kwargs["return_dict"] = True
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, **kwargs)
        starts, ends = linear(self.qa_outputs, out.last_hidden_state).unbind(-1)  # [B, T] each
        loss = None
        if check_spans(
            len(starts),
            None if start_positions is None else start_positions.shape,
            None if end_positions is None else end_positions.shape,
        ):
            losses = []
            for scores, positions in ((starts, start_positions), (ends, end_positions)):
                columns = positions.flatten()  # type: ignore[union-attr]
                columns = torch.where((columns >= 0) & (columns < scores.shape[1]), columns, -100)
                losses.append(F.cross_entropy(wide(scores), columns))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, None, out.hidden_states, out.attentions)
