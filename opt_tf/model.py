"""OPT (Zhang et al. 2022, arXiv:2205.01068) in Keras 3 on TensorFlow.

B batch   T tokens of this call   S slots: all of a cache, or T without one
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.outputs import BaseModelOutput, CausalLMOutput, can_return_tuple

from . import layers as nn  # Keras's layers, as PyTorch calls them
from .attention import View, attend, choose, split_heads
from .cache import CacheWriter, KVCache, past_length
from .generation import compute_transition_scores, generate, stream
from .inputs import check, columns, place, wanted
from .layers import ACTIVATIONS, PositionalEmbedding, cross_entropy, runner
from .pretrained import TFOPTPreTrainedModel
from .quantized import quantized


class OPTAttention(nn.Block):
    """Multi-head causal self-attention."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        H, D, bias = config.hidden_size, config.head_dim, config.enable_bias
        self.config, self.layer_idx, self.is_causal, self.enable_bias = config, layer_idx, True, bias
        self.embed_dim, self.num_heads, self.head_dim, self.scaling = H, config.num_attention_heads, D, D**-0.5
        self.dropout = nn.Dropout(config.attention_dropout)
        self.k_proj = nn.Linear(H, H, bias=bias)
        self.v_proj = nn.Linear(H, H, bias=bias)
        self.q_proj = nn.Linear(H, H, bias=bias)
        self.out_proj = nn.Linear(H, H, bias=bias)

    def call(
        self,
        hidden_states: Tensor,
        past_key_values: CacheWriter | None = None,
        attention_mask: View = None,
        layer_head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new hidden states [B, T, H] and, if wanted, the attention weights [B, N, T, S]."""
        parts = (f(hidden_states) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (split_heads(x, self.head_dim) for x in parts)  # [B, N, T, D] each
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, attention_mask)  # of all S slots
        out, weights = attend(self, q, k, v, attention_mask, layer_head_mask, output_attentions)
        return self.out_proj(out), weights


class OPTDecoderLayer(nn.Block):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None) -> None:
        super().__init__()
        H, F, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        affine = config.layer_norm_elementwise_affine
        self.embed_dim, self.do_layer_norm_before = H, config.do_layer_norm_before
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = OPTAttention(config, layer_idx)
        self.activation_fn = ACTIVATIONS[config.activation_function]
        self.self_attn_layer_norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine)
        self.fc1 = nn.Linear(H, F, bias=bias)
        self.fc2 = nn.Linear(F, H, bias=bias)
        self.final_layer_norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine)

    def call(
        self,
        hidden_states: Tensor,
        attention_mask: View = None,
        layer_head_mask: Tensor | None = None,
        past_key_values: CacheWriter | None = None,
        output_attentions: bool = False,
        use_cache: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, CacheWriter | None]:
        """Run the layer on hidden_states [B, T, H]; return the new ones, if wanted the weights [B, N, T, S], the cache.

        attention_mask: [B or 1, 1, T, S], true (or 0) where a token attends, false (or very negative) where it does
            not; or the decoder's own view of the batch (`opt_tf.attention`). None: every earlier slot and its own.
        layer_head_mask: [N], a factor for each head's weights. past_key_values: the cache to extend. use_cache: unused.
        """
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights = self.self_attn(
            hidden_states=hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            layer_head_mask=layer_head_mask,
            output_attentions=output_attentions,
        )
        hidden_states = residual + self.dropout(hidden_states)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))  # [B, T, F] in between
        hidden_states = residual + self.dropout(hidden_states)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, weights, past_key_values


class OPTDecoder(nn.Network):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        V, E, H, P = config.vocab_size, config.embed_dim, config.hidden_size, config.max_position_embeddings
        self.config, self.gradient_checkpointing = config, False
        self.dropout, self.layerdrop, self.padding_idx = config.dropout, config.layerdrop, config.pad_token_id
        self.max_target_positions, self.vocab_size = P, V
        self.embed_tokens = nn.Embedding(V, E, config.pad_token_id)
        self.embed_positions = PositionalEmbedding(P, H)
        self.project_out = nn.Linear(H, E, bias=False) if config.projects_embeddings else None
        self.project_in = nn.Linear(E, H, bias=False) if config.projects_embeddings else None
        affine = config.layer_norm_elementwise_affine
        norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine) if config.has_final_layer_norm else None
        self.final_layer_norm, self.skip = norm, nn.LayerDrop(config.layerdrop)
        self.layers = [OPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)]

    @can_return_tuple
    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        training: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which replace the token embedding's output.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row; in a tf.function also [B, S]. Default: none.
        past_key_values: the cache of the tokens before these; the result holds the next. With use_cache and none given,
            a new KVCache is made, which grows (`init_cache` makes one of a fixed size).
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        head_mask: [layers, N], a factor for each head's attention weights. training: whether there is dropout.
        output_attentions, output_hidden_states: also return what BaseModelOutput says. return_dict: False for a tuple.
        These and, in inference, use_cache default to the config's. Raises ValueError that names the argument; a
        tf.function has no values to check, only shapes.
        """
        config, cache, want = self.config, past_key_values, wanted(self, use_cache, training, kwargs)
        input_ids, B, T = check(config, input_ids, attention_mask, cache, inputs_embeds, position_ids)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, E]
        if self.project_in is not None:
            hidden_states = self.project_in(hidden_states)  # [B, T, H]
        if cache is None and want.cache:
            cache = KVCache()
        positions, segments = place(config, B, T, attention_mask, position_ids, cache)
        past = past_length(cache)
        hidden_states += self.embed_positions(attention_mask, past_key_values_length=past, position_ids=positions)

        writer = None if cache is None else CacheWriter(cache)
        all_hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        how: dict[str, Any] = {"attention_mask": choose(segments, past, T), "past_key_values": writer}
        how["output_attentions"] = want.attentions
        checkpointing = self.gradient_checkpointing and training and cache is None and not want.attentions
        for i, layer in enumerate(self.layers):
            if want.hidden_states:
                all_hidden_states.append(hidden_states)
            before, how["layer_head_mask"] = hidden_states, None if head_mask is None else head_mask[i]
            hidden_states, weights, _ = runner(layer, checkpointing)(hidden_states, **how)
            attentions.append(weights)
            if training and self.layerdrop > 0:
                hidden_states = self.skip(before, hidden_states)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        all_hidden_states.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=all_hidden_states[-1],
            past_key_values=None if writer is None else writer.advance(T, segments),
            hidden_states=tuple(all_hidden_states) if want.hidden_states else None,
            attentions=tuple(attentions) if want.attentions else None,
        )


class TFOPTModel(TFOPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture, label_names = "OPTModel", ()

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, initializer, **kwargs)
        self.decoder = quantized(OPTDecoder(self.config))
        self.build()

    @can_return_tuple
    @wraps(OPTDecoder.call)
    def call(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.decoder(*args, **kwargs)


class TFOPTForCausalLM(TFOPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"
    generate, stream, compute_transition_scores = generate, stream, compute_transition_scores

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, initializer, **kwargs)
        self.model = TFOPTModel(self.config, self.initializer, dtype=self.dtype_policy, name="model")
        V, E = config.vocab_size, config.embed_dim
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(E, V, bias=False)
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
        logits_to_keep: int | Tensor = 0,
        training: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.call`, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: each token's logits are
            scored against the next token's label. The loss is the mean cross-entropy, in float32. As in transformers,
            padding may be scored against a token behind it: give -100 for the first token of a left-padded row.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in a tensor; 0 for all.
        """
        kwargs |= {"use_cache": use_cache, "position_ids": position_ids, "training": training, "return_dict": True}
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **kwargs)
        head = self.model.decoder.embed_tokens.attend if self.lm_head is None else self.lm_head
        logits = head(columns(out.last_hidden_state, logits_to_keep, labels))  # [B, T, V]
        loss = None if labels is None else cross_entropy(logits, labels)
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
