"""OPT (Zhang et al. 2022, arXiv:2205.01068) in Flax NNX.

B batch   T tokens of this call   S slots: past tokens and T, or all of a cache
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from opt_common.config import OPTConfig
from opt_common.outputs import BaseModelOutput, CausalLMOutput, can_return_tuple

from .attention import View, attend, choose, compact, heads_first, restore
from .cache import KVCache, Writer
from .functional import functional, with_params
from .generation import compute_transition_scores, generate, stream
from .inputs import check, columns, place, wanted
from .layers import ACTIVATIONS, PositionalEmbedding, cross_entropy, dropout, embed, embedding, layerdrop, norm, runner
from .pretrained import FlaxOPTPreTrainedModel
from .products import head, linear
from .quantized import quantized


class OPTAttention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None, **how: Any) -> None:
        H, bias = config.hidden_size, config.enable_bias
        self.config, self.layer_idx, self.is_causal, self.enable_bias = config, layer_idx, True, bias
        self.embed_dim, self.num_heads, self.head_dim = H, config.num_attention_heads, config.head_dim
        self.scaling, self.dropout = self.head_dim**-0.5, config.attention_dropout
        self.k_proj = linear(config, H, H, bias=bias, **how)
        self.v_proj = linear(config, H, H, bias=bias, **how)
        self.q_proj = linear(config, H, H, bias=bias, **how)
        self.out_proj = linear(config, H, H, bias=bias, **how)

    def __call__(
        self,
        hidden_states: Array,
        past_key_values: Writer | None = None,
        attention_mask: View = None,
        output_attentions: bool = False,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> tuple[Array, Array | None]:
        """Return the new hidden states [B, T, H] and, from the eager formula, the attention weights [B, N, T, S]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads_first(f(hidden_states), self.num_heads) for f in projections)  # [N, B, T, D] each
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, attention_mask)  # [N, B, S, D]
        out, weights = attend(self, q, k, v, attention_mask, output_attentions, rngs)
        return self.out_proj(out.reshape(*out.shape[:2], -1)), weights


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None, **how: Any) -> None:
        H, F, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.embed_dim, self.do_layer_norm_before, self.dropout = H, config.do_layer_norm_before, config.dropout
        self.self_attn = OPTAttention(config, layer_idx, **how)
        self.activation_fn = ACTIVATIONS[config.activation_function]
        self.self_attn_layer_norm = norm(config, **how)
        self.fc1 = linear(config, H, F, bias=bias, **how)
        self.fc2 = linear(config, F, H, bias=bias, **how)
        self.final_layer_norm = norm(config, **how)

    def __call__(
        self,
        hidden_states: Array,
        attention_mask: View = None,
        past_key_values: Writer | None = None,
        attentions: list[Any] | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> Array:
        """Run the layer on hidden_states [B, T, H].

        attention_mask: [B or 1, 1, T, S], true (or 0) where a token attends, false (or very negative) where it does
            not; or the decoder's own view of the batch (`opt_flax.attention`). None: every earlier slot and its own.
        past_key_values: the cache to extend, in its `Writer`. attentions: a list to append the attention weights
            [B, N, T, S] to. rngs: for dropout, off without them.
        kwargs: what else transformers gives a layer (position_ids, use_cache ...), passed on; no effect here.
        """
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights = self.self_attn(
            hidden_states=hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_attentions=attentions is not None,
            rngs=rngs,
            **kwargs,
        )
        hidden_states = residual + dropout(hidden_states, self.dropout, rngs)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))  # [B, T, F] in between
        hidden_states = residual + dropout(hidden_states, self.dropout, rngs)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        if attentions is not None:
            attentions.append(weights)
        return hidden_states


class OPTDecoder(nnx.Module):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig, **how: Any) -> None:
        V, E, H, P = config.vocab_size, config.embed_dim, config.hidden_size, config.max_position_embeddings
        self.config, self.gradient_checkpointing, self.max_target_positions, self.vocab_size = config, False, P, V
        self.dropout, self.layerdrop, self.padding_idx = config.dropout, config.layerdrop, config.pad_token_id
        self.embed_tokens = embedding(config, V, E, config.pad_token_id, **how)
        self.embed_positions = PositionalEmbedding(config, P, H, **how)
        self.project_out = linear(config, H, E, bias=False, **how) if config.projects_embeddings else None
        self.project_in = linear(config, E, H, bias=False, **how) if config.projects_embeddings else None
        self.final_layer_norm = norm(config, **how) if config.has_final_layer_norm else None
        self.layers = nnx.List(OPTDecoderLayer(config, i, **how) for i in range(config.num_hidden_layers))

    @can_return_tuple
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        position_ids: ArrayLike | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which replace the token embedding's output.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row. Default: no padding. It may be as wide as the
            cache, so that one program serves every step; columns not reached yet are ignored.
        past_key_values: the KVCache of the tokens before these; the result has the next. use_cache: make one if none is
            given, with room for max_position_embeddings tokens; the config's use_cache is for `generate` alone.
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        output_attentions, output_hidden_states: also return what BaseModelOutput says; the config's by default.
            Attention weights come from the eager formula, whatever the attn_implementation. return_dict: False for a
            tuple. rngs: for dropout and layerdrop, off without them.
        Raises ValueError naming the argument; under jit, which hides values, bad tokens, positions and slots give NaN.
        """
        config, cache, want = self.config, past_key_values, wanted(self, use_cache, kwargs)
        ids, B, T = check(config, input_ids, attention_mask, cache, inputs_embeds, want.cache, position_ids)
        if ids is not None:
            inputs_embeds = embed(self.embed_tokens, ids, self.padding_idx)
        hidden_states = jnp.asarray(inputs_embeds, self.embed_tokens.dtype)  # [B, T, E]
        if self.project_in is not None:
            hidden_states = self.project_in(hidden_states)  # [B, T, H]
        if cache is None and want.cache:
            cache = KVCache.empty(config, B, config.max_position_embeddings, hidden_states.dtype)
        positions, segments = place(config, B, T, attention_mask, position_ids, cache)
        past = 0 if cache is None or cache.is_empty else cache.length
        hidden_states = hidden_states + self.embed_positions(attention_mask, past, position_ids=positions)

        view = choose(self, segments, past, hidden_states, want.attentions, position_ids is not None, rngs)
        hidden_states = compact(hidden_states, view)
        all_hidden_states, attentions = [], []
        writer = None if cache is None else Writer(cache)
        how: dict[str, Any] = {"attention_mask": view, "past_key_values": writer, "use_cache": cache is not None}
        if want.attentions:
            how["attentions"] = attentions
        for layer in self.layers:
            if want.hidden_states:
                all_hidden_states.append(hidden_states)
            after = runner(self, layer, how)(hidden_states, position_ids=positions, rngs=rngs, **how)
            hidden_states = layerdrop(self.layerdrop, hidden_states, after, rngs)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        all_hidden_states = [restore(x, view) for x in [*all_hidden_states, hidden_states]]

        return BaseModelOutput(
            last_hidden_state=all_hidden_states[-1],
            past_key_values=None if writer is None else writer.advance(T, segments),
            hidden_states=tuple(all_hidden_states) if want.hidden_states else None,
            attentions=tuple(attentions) if want.attentions else None,
        )


class FlaxOPTModel(FlaxOPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture = "OPTModel"

    def build(self, **how: Any) -> None:
        self.decoder = quantized(OPTDecoder(self.config, **how), **how)

    @functional
    @can_return_tuple
    @wraps(OPTDecoder.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.decoder(*args, **kwargs)


class FlaxOPTForCausalLM(FlaxOPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"
    generate, stream, compute_transition_scores = with_params(generate), with_params(stream), compute_transition_scores

    def build(self, **how: Any) -> None:
        V, E, tied = self.config.vocab_size, self.config.embed_dim, self.config.tie_word_embeddings
        self.model = FlaxOPTModel(self.config, **how)
        self.lm_head = None if tied else linear(self.config, E, V, bias=False, **how)

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
        logits_to_keep: int | ArrayLike = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `OPTDecoder.__call__` and `functional`, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: each token's logits are
            scored against the next token's label. The loss is the mean cross-entropy, in float32. Give -100 for a
            left-padded row's first token, or padding is scored against it.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in an array; 0 for all.
        """
        out = self.model.decoder(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, position_ids, **kwargs
        )
        logits = head(self, out.last_hidden_state[:, columns(logits_to_keep, labels)])  # [B, T, V]
        loss = None if labels is None else cross_entropy(logits, labels)
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
