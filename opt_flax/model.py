"""OPT (Zhang et al. 2022, arXiv:2205.01068) in Flax NNX.

B batch   T tokens of this call   S slots: past tokens and T, or all of a cache
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_labels, check_spans, check_tokens
from opt_common.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput

from .attention import (
    Alignment,
    Attend,
    View,
    align,
    check_implementation,
    choose,
    cudnn,
    default_device,
    dense,
    heads_first,
    reorder,
)
from .cache import KVCache, place
from .generate import generate
from .weights import from_pretrained, save_pretrained

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # jax's own default is the tanh formula
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class OPTAttention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: OPTConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        H, bias = config.hidden_size, config.enable_bias
        self.heads, self.layer = config.num_attention_heads, layer
        self.dropout = nnx.Dropout(config.attention_dropout)
        self.k_proj = _Linear(config, H, H, bias, dtype, rngs)
        self.v_proj = _Linear(config, H, H, bias, dtype, rngs)
        self.q_proj = _Linear(config, H, H, bias, dtype, rngs)
        self.out_proj = _Linear(config, H, H, bias, dtype, rngs)

    def __call__(
        self, x: Array, attend: Attend, view: View, cache: KVCache | None, rngs: nnx.Rngs | None
    ) -> tuple[Array, Array | None, KVCache | None]:
        heads = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))  # [B, T, N, D] each
        empty = cache is None or cache.is_empty
        if cache is not None:
            # in the cache each token has the slot of its column
            new = (reorder(y, view.back) if isinstance(view, Alignment) else y for y in (k, v))
            cache = cache.update(self.layer, *map(heads_first, new))
        if cache is None or empty:
            k, v = heads_first(k), heads_first(v)  # [N·B, T, D]
        else:
            k, v = cache.k[self.layer], cache.v[self.layer]  # [N·B, S, D]
        drop = partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        out, weights = attend(q, k, v, view, drop)
        return self.out_proj(out.reshape(x.shape)), weights, cache


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        H, F, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.pre_norm, self.dropout = config.do_layer_norm_before, nnx.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = OPTAttention(config, layer, dtype, rngs)
        self.self_attn_layer_norm = _layer_norm(config, dtype, rngs)
        self.fc1 = _Linear(config, H, F, bias, dtype, rngs)
        self.fc2 = _Linear(config, F, H, bias, dtype, rngs)
        self.final_layer_norm = _layer_norm(config, dtype, rngs)

    def __call__(
        self, x: Array, attend: Attend, view: View, cache: KVCache | None, rngs: nnx.Rngs | None
    ) -> tuple[Array, Array | None, KVCache | None]:
        residual = x
        if self.pre_norm:
            x = self.self_attn_layer_norm(x)
        x, weights, cache = self.self_attn(x, attend, view, cache, rngs)
        x = residual + self.dropout(x, deterministic=rngs is None, rngs=rngs)
        if not self.pre_norm:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.pre_norm:
            x = self.final_layer_norm(x)
        x = self.fc2(self.activation(self.fc1(x)))  # [B, T, F] in between
        x = residual + self.dropout(x, deterministic=rngs is None, rngs=rngs)
        if not self.pre_norm:
            x = self.final_layer_norm(x)
        return x, weights, cache


class OPTDecoder(nnx.Module):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig, dtype: DTypeLike, attn_implementation: str, rngs: nnx.Rngs) -> None:
        E, H = config.embed_dim, config.hidden_size
        self.config, self.attn_implementation, self.gradient_checkpointing = config, attn_implementation, False
        self.embed_tokens = _embed(config, config.vocab_size, E, config.pad_token_id, dtype, rngs)
        self.embed_positions = _embed(config, config.max_position_embeddings + 2, H, None, dtype, rngs)
        self.project_in = _Linear(config, E, H, False, dtype, rngs) if config.projects_embeddings else None
        self.project_out = _Linear(config, H, E, False, dtype, rngs) if config.projects_embeddings else None
        self.layers = nnx.List(OPTDecoderLayer(config, i, dtype, rngs) for i in range(config.num_hidden_layers))
        self.final_layer_norm = _layer_norm(config, dtype, rngs) if config.has_final_layer_norm else None

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> BaseModelOutput:
        """See `FlaxOPTModel.__call__`."""
        config, cache, dtype = self.config, past_key_values, self.embed_positions.dtype
        past = 0 if cache is None else cache.length
        B, T = check_call(
            config,
            None if input_ids is None else jnp.shape(input_ids),
            None if inputs_embeds is None else jnp.shape(inputs_embeds),
            None if attention_mask is None else jnp.shape(attention_mask),
            None if position_ids is None else jnp.shape(position_ids),
            past=None if isinstance(past, Tracer) else int(past),
            slots=cache.slots if cache is not None else config.max_position_embeddings if use_cache else None,
            rows=None if cache is None else cache.segments.shape[0],
        )
        if input_ids is not None:
            if not isinstance(input_ids, Tracer):
                ids = np.asarray(input_ids)
                check_tokens(config, int(ids.min()), int(ids.max()))
            input_ids = jnp.asarray(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
            # the padding row takes no gradient from its own look-up
            padding = (input_ids == (-1 if config.pad_token_id is None else config.pad_token_id))[:, :, None]
            inputs_embeds = jnp.where(padding, lax.stop_gradient(inputs_embeds), inputs_embeds)
        x = jnp.asarray(inputs_embeds, dtype)  # [B, T, E]
        if self.project_in is not None:
            x = self.project_in(x)  # [B, T, H]
        if cache is None and use_cache:
            cache = KVCache.empty(config, B, config.max_position_embeddings, dtype)
        positions, segments = place(config, B, T, attention_mask, position_ids, cache)
        x = x + self.embed_positions(positions + 2)  # the table starts two rows in; padding is row 1

        # An empty cache has no past to look at. Without positions of their own, the tokens are one document
        empty = cache is None or cache.is_empty
        masked = not empty or position_ids is not None
        S = T if cache is None or empty else cache.slots
        drops = rngs is not None and config.attention_dropout > 0
        attend = choose(
            self.attn_implementation, default_device(), dtype, T, S, config.head_dim, masked, drops, output_attentions
        )
        if not masked and attention_mask is None:
            view = None
        elif not masked and attend is cudnn:
            view = align(segments[:, :T] > 0)
            x = reorder(x, view.order)
        else:
            view = dense(segments[:, :S], past, T)
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:  # what nobody asked for is not kept
                hidden_states.append(x)
            before = x
            if self.gradient_checkpointing and cache is None and not output_attentions:
                x = nnx.remat(lambda layer, x, rngs: layer(x, attend, view, None, rngs)[0])(layer, x, rngs)
            else:
                x, weights, cache = layer(x, attend, view, cache, rngs)
            if output_attentions:
                attentions.append(weights)
            if rngs is not None and config.layerdrop > 0:
                x = jnp.where(jax.random.bernoulli(rngs.dropout(), config.layerdrop), before, x)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        hidden_states.append(x)
        if isinstance(view, Alignment):
            hidden_states = [reorder(x, view.back) for x in hidden_states]

        if cache is not None:
            cache = cache._replace(length=cache.length + T, segments=segments)
        return BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class FlaxOPTPreTrainedModel(nnx.Module):
    """What the four models share: loading, saving, and the settings of their decoder."""

    architecture: str
    config: OPTConfig
    model: FlaxOPTModel  # of those with a head

    def _decoder(self) -> OPTDecoder:
        return (self if isinstance(self, FlaxOPTModel) else self.model).decoder

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self._decoder().embed_positions.dtype)

    def set_attn_implementation(self, name: str) -> None:
        """Attend by "eager", "sdpa" or "cudnn" from now on; see `opt_flax.attention`."""
        check_implementation(name)
        self._decoder().attn_implementation = name

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the input of each layer for the backward pass, which computes the rest again; not in calls with a
        cache or output_attentions."""
        self._decoder().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all that the backward pass needs, as by default."""
        self._decoder().gradient_checkpointing = False

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained


class FlaxOPTModel(FlaxOPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture = "OPTModel"

    def __init__(
        self,
        config: OPTConfig,
        dtype: DTypeLike = jnp.float32,
        attn_implementation: str = "sdpa",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        check_implementation(attn_implementation)
        self.config = config
        self.decoder = OPTDecoder(config, jnp.dtype(dtype), attn_implementation, rngs)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which take the place of the token embedding.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row. Default: no padding. Under jit it may be as
            wide as the cache, so that one program serves every step; columns not reached yet are not looked at.
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        past_key_values: the KVCache of the tokens before these; the result holds the one to pass next. With use_cache
            and none given a new one is made, with room for max_position_embeddings tokens (`init_cache` makes one of
            any size).
        output_hidden_states, output_attentions: also return what BaseModelOutput says. Attention weights are computed
            by the eager formula, whatever attn_implementation is.
        rngs: dropout happens if and only if these are given.
        Raises ValueError that names the argument. Under jit, where values cannot be looked at, a token or position
        that has no row in its table, and a token too many for the cache, make NaN.
        """
        return self.decoder(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            rngs,
        )


class FlaxOPTForCausalLM(FlaxOPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"

    def __init__(
        self,
        config: OPTConfig,
        dtype: DTypeLike = jnp.float32,
        attn_implementation: str = "sdpa",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        E, V = config.embed_dim, config.vocab_size
        self.config = config
        self.model = FlaxOPTModel(config, dtype, attn_implementation, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else _Linear(config, E, V, False, jnp.dtype(dtype), rngs)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | ArrayLike = 0,
        rngs: nnx.Rngs | None = None,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `FlaxOPTModel.__call__`, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: the logits of a token
            are held against the label of the next. The loss is their mean cross-entropy, in float32. As in
            transformers padding can be held against a token behind it, though what padding says means nothing: give
            -100 for the first token of a left-padded row.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in an array; 0 for all.
        """
        if labels is not None and (jnp.ndim(logits_to_keep) or logits_to_keep != 0):
            raise ValueError("labels, logits_to_keep: found both; the loss takes the logits of every token")
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            rngs,
        )
        keep = logits_to_keep if jnp.ndim(logits_to_keep) else slice(-int(logits_to_keep), None)  # type: ignore[arg-type]
        logits = self.head(out.last_hidden_state[:, keep])  # [B, T, V]
        loss = None
        if labels is not None:
            if jnp.shape(labels) != logits.shape[:2]:
                raise ValueError(f"labels: found shape {list(jnp.shape(labels))}, wanted {list(logits.shape[:2])}")
            targets = jnp.asarray(labels)
            targets = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
            loss = _cross_entropy(logits, targets, targets != -100)
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)

    def head(self, x: Array) -> Array:
        """The logits [..., V] of hidden states [..., E]."""
        if self.lm_head is not None:
            return self.lm_head(x)
        return _product(x, self.model.decoder.embed_tokens.embedding[...], x.dtype).astype(x.dtype)

    generate = generate


class FlaxOPTForSequenceClassification(FlaxOPTPreTrainedModel):
    """OPT with a label, or several, for a whole row: `score` of its last token."""

    architecture = "OPTForSequenceClassification"

    def __init__(
        self,
        config: OPTConfig,
        dtype: DTypeLike = jnp.float32,
        attn_implementation: str = "sdpa",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.model = FlaxOPTModel(config, dtype, attn_implementation, rngs=rngs)
        self.score = _Linear(config, config.embed_dim, config.num_labels, False, jnp.dtype(dtype), rngs)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `FlaxOPTModel.__call__`, and:

        labels: for config.problem_type, which if None follows from num_labels and the labels as in transformers:
            "regression" (num_labels 1): [B] or, with several labels, [B, num_labels] numbers; the mean squared error.
            "single_label_classification" (whole numbers): [B], -100 for rows to leave out; the mean cross-entropy.
            "multi_label_classification" (numbers 0 to 1): [B, num_labels]; the mean binary cross-entropy.
            The loss is float32.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            rngs,
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
            labels = jnp.asarray(labels)
            problem = check_labels(self.config, B, labels.shape, whole=not jnp.issubdtype(labels.dtype, jnp.floating))
            if problem == "single_label_classification":
                labels = labels.reshape(-1)
                loss = _cross_entropy(logits, labels, labels != -100)
            else:
                scores = _wide(logits)
                targets = labels.reshape(scores.shape).astype(scores.dtype)
                # the second is log(1 + eˢ) - targets·s
                binary = jax.nn.softplus(scores) - targets * scores
                loss = ((scores - targets) ** 2 if problem == "regression" else binary).mean()
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class FlaxOPTForQuestionAnswering(FlaxOPTPreTrainedModel):
    """OPT with two scores a token: that the answer begins there, and that it ends there."""

    architecture = "OPTForQuestionAnswering"

    def __init__(
        self,
        config: OPTConfig,
        dtype: DTypeLike = jnp.float32,
        attn_implementation: str = "sdpa",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.model = FlaxOPTModel(config, dtype, attn_implementation, rngs=rngs)
        self.qa_outputs = _Linear(config, config.embed_dim, 2, True, jnp.dtype(dtype), rngs)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        start_positions: ArrayLike | None = None,
        end_positions: ArrayLike | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `FlaxOPTModel.__call__`, and:

        start_positions, end_positions: [B], the columns of the answer's first and last token. Those outside of the
            row's T columns are left out. (transformers takes negative ones for 0.) The loss is the mean of the two mean
            cross-entropies, in float32.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            rngs,
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
            for scores, positions in ((starts, start_positions), (ends, end_positions)):
                columns = jnp.asarray(positions).reshape(-1)
                losses.append(_cross_entropy(scores, columns, (columns >= 0) & (columns < scores.shape[1])))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, out.past_key_values, out.hidden_states, out.attentions)


def _wide(x: Array) -> Array:
    """float32 in place of half precision; float64 stays float64: that run is the judge of the others."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _cross_entropy(logits: Array, targets: Array, wanted: Array) -> Array:
    """The mean over the wanted targets; NaN if one is no class."""
    scores = _wide(logits)
    scores = scores - lax.stop_gradient(scores.max(-1, keepdims=True))
    # a sum, where an index would have its gradient scattered over zeros as large as the logits
    there = jnp.arange(scores.shape[-1]) == targets[..., None]
    losses = jnp.log(jnp.exp(scores).sum(-1)) - jnp.where(there, scores, 0).sum(-1)
    losses = jnp.where((targets >= 0) & (targets < scores.shape[-1]), losses, jnp.nan)
    return losses.sum(where=wanted) / wanted.sum()


class _Linear(nnx.Module):
    """A kernel [out, in], as checkpoints have it, and a bias."""

    def __init__(self, config: OPTConfig, into: int, out: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.normal(config.init_std)(rngs.params(), (out, into), dtype))
        self.bias = nnx.Param(jnp.zeros(out, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        if self.bias is None:
            return _product(x, self.kernel[...], x.dtype).astype(x.dtype)
        # Product and bias are rounded to half precision together, as PyTorch does it. Not where a GPU would write the
        # wide product to memory first: a forward pass of 2.7b takes 158 ms instead of 185
        one_by_one = default_device().platform == "gpu" and x.size > x.shape[-1]
        dtype = x.dtype if one_by_one else jnp.promote_types(x.dtype, jnp.float32)
        return (_product(x, self.kernel[...], dtype) + self.bias[...]).astype(x.dtype)


# Up to so many tokens, a CPU multiplies the weights by the tokens, not the tokens by the weights.
FEW = 128


def _product(x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    """x [..., in] · kernel [out, in]ᵀ in `dtype` or a wider one, [..., out].

    With few tokens a product is the reading of its kernel, and its form decides how fast that is: benchmarks/NOTES.md.
    """
    tokens, platform = x.size // x.shape[-1], default_device().platform
    if platform == "gpu" and tokens == 1:  # XLA makes one program of it and of what comes before and after
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (kernel.astype(wide) * x.astype(wide)).sum(-1).reshape(*x.shape[:-1], -1)
    # an exported program's number of tokens may be a symbol, which cannot be held against a number
    if platform == "cpu" and isinstance(tokens, int) and tokens <= FEW:
        y = lax.dot_general(kernel, x.reshape(tokens, -1), (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        # the barrier keeps XLA from turning it around, and so copying the kernel
        return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _embed(
    config: OPTConfig, rows: int, width: int, zero_row: int | None, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Embed:
    def init(*args: Any) -> Array:
        table = nnx.initializers.normal(config.init_std)(*args)
        return table if zero_row is None else table.at[zero_row].set(0)

    return nnx.Embed(rows, width, dtype=dtype, param_dtype=dtype, embedding_init=init, rngs=rngs)


def _layer_norm(config: OPTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=1e-5,
        dtype=dtype,
        param_dtype=dtype,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,  # E[x²] - E[x]² loses the digits of a small variance
        rngs=rngs,
    )
