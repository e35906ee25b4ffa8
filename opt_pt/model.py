"""OPT (Zhang et al. 2022, arXiv:2205.01068) in PyTorch.

B batch   T tokens of this call   S slots: past tokens and T
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opt_common.config import OPTConfig
from opt_common.kin import Kin
from opt_common.outputs import BaseModelOutput, CausalLMOutput

from .attention import View, attend, choose, compact, restore, split_heads
from .cache import KVCache, past_length, remember
from .generation import compute_transition_scores, generate, stream
from .inputs import check, columns, loss_options, place, wanted
from .layers import ACTIVATIONS, OPTLearnedPositionalEmbedding, cross_entropy, embedding, init_weights, linear, runner
from .outputs import can_return_tuple, takes_cache
from .pretrained import OPTPreTrainedModel
from .quantized import quantized


class OPTAttention(Kin, nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        H, D, bias = config.hidden_size, config.head_dim, config.enable_bias
        self.config, self.layer_idx, self.is_causal, self.enable_bias = config, layer_idx, True, bias
        self.embed_dim, self.num_heads, self.head_dim, self.scaling = H, config.num_attention_heads, D, D**-0.5
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(H, H, bias=bias)
        self.v_proj = nn.Linear(H, H, bias=bias)
        self.q_proj = nn.Linear(H, H, bias=bias)
        self.out_proj = nn.Linear(H, H, bias=bias)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: View = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new hidden states [B, T, H] and, from the eager formula, the attention weights [B, N, T, S]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(f(hidden_states), self.head_dim) for f in projections)  # [B, N, T, D] each
        if past_key_values is not None:
            k, v = remember(past_key_values, k, v, self.layer_idx, attention_mask)  # [B, N, S, D]
        out, weights = attend(self, q, k, v, attention_mask, output_attentions)
        return self.out_proj(out.flatten(2)), weights


class OPTDecoderLayer(Kin, nn.Module):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        H, F, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        norm = partial(nn.LayerNorm, H, eps=1e-5, elementwise_affine=config.layer_norm_elementwise_affine)
        self.embed_dim, self.do_layer_norm_before, self.dropout = H, config.do_layer_norm_before, config.dropout
        self.self_attn = OPTAttention(config, layer_idx)
        self.activation_fn = ACTIVATIONS[config.activation_function]()
        self.self_attn_layer_norm = norm()
        self.fc1 = nn.Linear(H, F, bias=bias)
        self.fc2 = nn.Linear(F, H, bias=bias)
        self.final_layer_norm = norm()

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: View = None,
        past_key_values: KVCache | None = None,
        attentions: list[Any] | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer on hidden_states [B, T, H].

        attention_mask: [B or 1, 1, T, S], true (or 0) where a token attends, false (or very negative) where it does
            not; or the decoder's own view of the batch (`opt_pt.attention`). None: every earlier slot and its own.
        past_key_values: the cache to extend. attentions: a list to append the attention weights [B, N, T, S] to.
        use_cache: no effect. kwargs: what else transformers gives a layer, such as position_ids, passed on.
        """
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights = self.self_attn(
            hidden_states=hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **({} if attentions is None else {"output_attentions": True}) | kwargs,
        )
        hidden_states = residual + F.dropout(hidden_states, self.dropout, self.training)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        shape = hidden_states.shape
        residual = hidden_states = hidden_states.flatten(0, 1)  # [B·T, H], which hooks know from transformers
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))  # [B·T, F] in between
        hidden_states = (residual + F.dropout(hidden_states, self.dropout, self.training)).view(shape)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        if attentions is not None:
            attentions.append(weights)
        return hidden_states


class OPTDecoder(OPTPreTrainedModel):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        V, E, H, P = config.vocab_size, config.embed_dim, config.hidden_size, config.max_position_embeddings
        self.gradient_checkpointing = False
        self.dropout, self.layerdrop, self.padding_idx = config.dropout, config.layerdrop, config.pad_token_id
        self.max_target_positions, self.vocab_size = P, V
        self.embed_tokens = embedding(V, E, config.pad_token_id)
        self.embed_positions = OPTLearnedPositionalEmbedding(P, H)
        self.project_out = nn.Linear(H, E, bias=False) if config.projects_embeddings else None
        self.project_in = nn.Linear(E, H, bias=False) if config.projects_embeddings else None
        norm = partial(nn.LayerNorm, H, eps=1e-5, elementwise_affine=config.layer_norm_elementwise_affine)
        self.final_layer_norm = norm() if config.has_final_layer_norm else None
        self.layers = nn.ModuleList(OPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which replace the token embedding's output.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row. Default: no padding. Or a layer's 4-D mask.
        past_key_values: the cache of the tokens before these, written in place. With use_cache and none given, a new
            KVCache is made, which grows (`init_cache` makes one of a fixed size). One of transformers' serves too.
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        output_attentions, output_hidden_states: also return what BaseModelOutput says. Attention weights come from the
            eager formula, whatever the attn_implementation. return_dict: False for a tuple.
        These and use_cache default to the config's. Raises ValueError that names the argument.
        """
        config, cache, want = self.config, past_key_values, wanted(self, use_cache, kwargs)
        input_ids, B, T = check(config, input_ids, attention_mask, cache, inputs_embeds, position_ids)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, E]
        if self.project_in is not None:
            hidden_states = linear(self.project_in, hidden_states)  # [B, T, H]
        if cache is None and want.cache:
            cache = KVCache()
        positions, segments = place(config, B, T, hidden_states.device, attention_mask, position_ids, cache)
        past = past_length(cache)
        hidden_states = hidden_states + self.embed_positions(attention_mask, past, position_ids=positions)

        view = choose(self, segments, past, hidden_states, want.attentions)
        hidden_states = compact(hidden_states, view)
        all_hidden_states, attentions = [], []
        how: dict[str, Any] = {"attention_mask": view, "past_key_values": cache, "use_cache": cache is not None}
        if want.attentions:
            how["attentions"] = attentions
        for layer in self.layers:
            if want.hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states = runner(self, layer, cache)(hidden_states, position_ids=positions, **how)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = linear(self.project_out, hidden_states)
        all_hidden_states = [restore(x, view) for x in [*all_hidden_states, hidden_states]]

        if cache is not None:
            cache.segments = segments if segments is None or segments.ndim == 2 else None
        return BaseModelOutput(
            last_hidden_state=all_hidden_states[-1],
            past_key_values=cache,
            hidden_states=tuple(all_hidden_states) if want.hidden_states else None,
            attentions=tuple(attentions) if want.attentions else None,
        )


class OPTModel(OPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture = "OPTModel"

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.decoder = quantized(OPTDecoder(self.config))
        self.apply(lambda module: init_weights(module, config))

    @can_return_tuple
    @wraps(OPTDecoder.forward)
    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.decoder(*args, **kwargs)


class OPTForCausalLM(OPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"
    loss_type, _tied_weights_keys = "ForCausalLM", {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    loss_function = staticmethod(cross_entropy)  # users set their own on a model
    generate, stream, compute_transition_scores = generate, stream, compute_transition_scores

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = OPTModel(self.config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        init_weights(self.lm_head, config)
        self.tie_weights()

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
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.forward`, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: each token's logits are
            scored against the next token's label. The loss is the mean cross-entropy, in float32, or the sum over
            num_items_in_batch. Give -100 for a left-padded row's first token, or padding is scored against it.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in a tensor; 0 for all.
        """
        given = (input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids)
        out = self.model.decoder(*given, **kwargs)
        logits = linear(self.lm_head, out.last_hidden_state[:, columns(logits_to_keep, labels)])  # [B, T, V]
        loss = None if labels is None else self.loss_function(logits, labels, **loss_options(self.config, kwargs))
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
