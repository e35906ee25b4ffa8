"""OPT (Zhang et al. 2022, arXiv:2205.01068) in Keras 3 on TensorFlow.

B batch   T tokens of this call   S slots: all of a cache, or T without one   t, s of a block of them
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import keras
import optree
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_labels, check_spans, check_tokens
from opt_common.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput

from .cache import KVCache, place, update
from .generate import generate
from .weights import from_pretrained, save_pretrained

PARTS = 16  # of a matrix, for a product of few rows


def _wide(x: Tensor) -> Tensor:
    """float32 in place of half precision."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def _gelu(x: Tensor) -> Tensor:
    wide = _wide(x)  # not ops.gelu: its constants are float32 in float64, and rounded to half precision there
    return ops.cast(0.5 * wide * (1 + ops.erf(wide * 0.5**0.5)), x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    wide = _wide(x)
    return ops.cast(0.5 * wide * (1 + ops.tanh((2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3))), x.dtype)


ACTIVATIONS = {
    "relu": ops.relu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": ops.silu,
    "swish": ops.silu,
    "tanh": ops.tanh,
}


class Linear(keras.layers.Dense):
    """A Dense whose product of one row, which takes as long as reading the kernel, is shared among the cores."""

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        one = math.prod(n or 0 for n in x.shape[:-1]) == 1
        # XLA gives a product of one row to one core, and a batch of them to all. Half precision would round the parts.
        if not one or x.shape[-1] % PARTS or x.dtype != tf.float32 or tf.executing_eagerly():
            return super().call(x, training=training)
        y = tf.matmul(ops.reshape(x, (PARTS, 1, -1)), ops.reshape(self.kernel, (PARTS, -1, self.units)))
        y = ops.reshape(ops.sum(y, axis=0), (*x.shape[:-1], self.units))
        return y if self.bias is None else y + self.bias


class Embedding(keras.layers.Embedding):
    """A table with a dense gradient. Of the rows that TensorFlow makes of it otherwise, Keras's optimizers square each
    occurrence of a token for itself, not their sum."""

    def call(self, ids: Tensor) -> Tensor:
        return ops.cast(_look_up(tf.identity(self.embeddings), ids), self.compute_dtype)


@tf.custom_gradient
def _look_up(table: Tensor, ids: Tensor) -> Any:
    def gradient(upstream: Tensor) -> tuple[Tensor, None]:
        rows = tf.math.unsorted_segment_sum(_wide(upstream), ids, table.shape[0])
        return ops.cast(rows, table.dtype), None

    return tf.gather(table, ids), gradient


class Dropout(keras.layers.Dropout):
    """A Dropout that draws no seed of its own if one is given, and whose seeds go on where they were when the model is
    saved and loaded in training; Keras would begin anew."""

    def call(self, x: Tensor, training: bool | None = None, seed: Tensor | None = None) -> Tensor:
        if seed is None or not training or not self.rate:
            return super().call(x, training=training)
        return tf.nn.experimental.stateless_dropout(x, self.rate, seed)

    def save_own_variables(self, store: Any) -> None:
        if self.rate:
            store["seed"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        if self.rate and "seed" in store:
            self.seed_generator.state.assign(store["seed"][...])


class OPTAttention(keras.layers.Layer):
    """Multi-head causal self-attention."""

    def __init__(self, config: OPTConfig, initializer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        H, bias, dtype = config.hidden_size, config.enable_bias, self.dtype_policy
        linear = partial(Linear, H, use_bias=bias, kernel_initializer=initializer, dtype=dtype)
        self.heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_dropout, dtype=dtype)
        self.k_proj = linear(name="k_proj")
        self.v_proj = linear(name="v_proj")
        self.q_proj = linear(name="q_proj")
        self.out_proj = linear(name="out_proj")

    def build(self, input_shape: Any) -> None:
        for projection in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            projection.build(input_shape)

    def call(
        self,
        x: Tensor,
        masks: tuple[Tensor, ...],
        past: tuple[Tensor, Tensor, Tensor] | None,
        output_attentions: bool = False,
        seeds: tuple[Tensor, ...] | None = None,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        B, T, H = ops.shape(x)
        N, D = self.heads, H // self.heads

        def split(x: Tensor) -> Tensor:
            return ops.reshape(ops.transpose(ops.reshape(x, (B, T, N, D)), (0, 2, 1, 3)), (B * N, T, D))

        # The query is scaled, not the scores, as OPT was trained: in half precision it is not the same. The factor
        # stays float32: rounded to bfloat16, the 80^-½ of 2.7b would be off, for every query alike.
        q = split(ops.cast(_wide(self.q_proj(x)) * D**-0.5, x.dtype))  # [B·N, T, D]
        k, v = split(self.k_proj(x)), split(self.v_proj(x))
        if past is not None:
            k, v = update(past, k, v)  # [B·N, S, D]
        S, first, outs, attentions = ops.shape(k)[1], 0, [], []
        for i, mask in enumerate(masks):
            t, s = ops.shape(mask)[2:]
            # the softmax is float32 in half precision too
            scores = tf.matmul(q[:, first : first + t], k[:, :s], transpose_b=True)
            scores = _wide(ops.reshape(scores, (B, N, t, s)))
            weights = ops.cast(tf.nn.softmax(ops.where(mask, scores, scores.dtype.min)), x.dtype)  # [B, N, t, s]
            dropped = self.dropout(weights, training=training, seed=None if seeds is None else seeds[0] + [0, i])
            outs.append(tf.matmul(ops.reshape(dropped, (B * N, t, s)), v[:, :s]))
            if output_attentions:
                attentions.append(tf.pad(weights, ((0, 0), (0, 0), (0, 0), (0, S - s))))
            first += t
        out = ops.transpose(ops.reshape(ops.concatenate(outs, axis=1), (B, N, T, D)), (0, 2, 1, 3))
        weights = ops.concatenate(attentions, axis=2) if output_attentions else None  # [B, N, T, S]
        return self.out_proj(ops.reshape(out, (B, T, H))), weights, (k, v)


class OPTDecoderLayer(keras.layers.Layer):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, initializer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        H, affine, dtype = config.hidden_size, config.layer_norm_elementwise_affine, self.dtype_policy
        linear = partial(Linear, use_bias=config.enable_bias, kernel_initializer=initializer, dtype=dtype)
        norm = partial(keras.layers.LayerNormalization, epsilon=1e-5, center=affine, scale=affine, dtype=dtype)
        self.pre_norm = config.do_layer_norm_before
        self.dropout = Dropout(config.dropout, dtype=dtype)
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = OPTAttention(config, initializer, dtype=dtype, name="self_attn")
        self.self_attn_layer_norm = norm(name="self_attn_layer_norm")
        self.fc1 = linear(config.ffn_dim, name="fc1")
        self.fc2 = linear(H, name="fc2")
        self.final_layer_norm = norm(name="final_layer_norm")

    def build(self, input_shape: Any) -> None:
        for layer in (self.self_attn, self.self_attn_layer_norm, self.fc1, self.final_layer_norm):
            layer.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.fc1.units))

    def call(
        self,
        x: Tensor,
        masks: tuple[Tensor, ...],
        past: tuple[Tensor, Tensor, Tensor] | None,
        output_attentions: bool = False,
        seeds: tuple[Tensor, ...] | None = None,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        residual = x
        if self.pre_norm:
            x = self.self_attn_layer_norm(x)
        x, weights, kv = self.self_attn(
            x, masks, past, output_attentions=output_attentions, seeds=seeds, training=training
        )
        x = residual + self.dropout(x, training=training, seed=None if seeds is None else seeds[1])
        if not self.pre_norm:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.pre_norm:
            x = self.final_layer_norm(x)
        x = self.fc2(self.activation(self.fc1(x)))  # [B, T, F] in between
        x = residual + self.dropout(x, training=training, seed=None if seeds is None else seeds[2])
        if not self.pre_norm:
            x = self.final_layer_norm(x)
        return x, weights, kv

    def checkpointed(self, x: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
        """What a call in training makes of x; of all in between, nothing is kept for the backward pass, which computes
        it again, with the seeds that are drawn here."""
        drops = (self.self_attn.dropout, self.dropout, self.dropout)
        seeds = [ops.cast(d.seed_generator.next(), "int32") if d.rate else tf.zeros(2, tf.int32) for d in drops]
        run = tf.recompute_grad(lambda x, *seeds: self(x, masks, None, seeds=seeds, training=True)[0])
        return run(x, *seeds)


class OPTDecoder(keras.layers.Layer):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig, initializer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        E, H, dtype = config.embed_dim, config.hidden_size, self.dtype_policy
        self.config, self.gradient_checkpointing = config, False
        table = partial(Embedding, embeddings_initializer=initializer, dtype=dtype)
        self.embed_tokens = table(config.vocab_size, E, name="embed_tokens")
        self.embed_positions = table(config.max_position_embeddings + 2, H, name="embed_positions")
        linear = partial(Linear, use_bias=False, kernel_initializer=initializer, dtype=dtype)
        self.project_in = linear(H, name="project_in") if config.projects_embeddings else None
        self.project_out = linear(E, name="project_out") if config.projects_embeddings else None
        self.layers = [
            OPTDecoderLayer(config, initializer, dtype=dtype, name=f"layers.{i}")
            for i in range(config.num_hidden_layers)
        ]
        affine = config.layer_norm_elementwise_affine
        norm = partial(keras.layers.LayerNormalization, epsilon=1e-5, center=affine, scale=affine, dtype=dtype)
        self.final_layer_norm = norm(name="final_layer_norm") if config.has_final_layer_norm else None
        self.dice = keras.random.SeedGenerator() if config.layerdrop > 0 else None

    def build(self, input_shape: Any = None) -> None:
        embedded, hidden = (None, None, self.config.embed_dim), (None, None, self.config.hidden_size)
        self.embed_tokens.build()
        self.embed_positions.build()
        if self.project_in is not None and self.project_out is not None:
            self.project_in.build(embedded)
            self.project_out.build(hidden)
        for layer in self.layers:
            layer.build(hidden)
        if self.final_layer_norm is not None:
            self.final_layer_norm.build(hidden)

    def save_own_variables(self, store: Any) -> None:
        if self.dice is not None:
            store["seed"] = self.dice.state.numpy()  # as `Dropout` does

    def load_own_variables(self, store: Any) -> None:
        if self.dice is not None and "seed" in store:
            self.dice.state.assign(store["seed"][...])

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> BaseModelOutput:
        """See `TFOPTModel.call`."""
        config, cache, eager = self.config, past_key_values, tf.executing_eagerly()
        given = (input_ids, inputs_embeds, attention_mask, position_ids)
        shapes = [None if x is None else tuple(x.shape) for x in given]
        past, size = 0, (None, config.max_position_embeddings if use_cache else None)
        if cache is not None:
            past, size = int(cache.length) if eager else None, tuple(cache.segments.shape)
        if any(None in shape for shape in shapes if shape is not None):
            past, size, shapes[-1] = None, (None, None), None  # Input(shape=(None,)): no numbers yet to check these by
        check_call(config, *shapes, past=past, slots=size[1], rows=size[0])
        x: Any = inputs_embeds  # [B, T, E]
        if input_ids is not None:
            if eager:
                check_tokens(config, int(ops.min(input_ids)), int(ops.max(input_ids)))
            x = self.embed_tokens(input_ids)
            # the padding row takes no gradient from its own look-up
            padding = ops.equal(input_ids, -1 if config.pad_token_id is None else config.pad_token_id)[:, :, None]
            x = ops.where(padding, ops.stop_gradient(x), x)
        B, T, _ = ops.shape(x)
        if self.project_in is not None:
            x = self.project_in(x)  # [B, T, H]
        if cache is None and use_cache:
            cache = KVCache.empty(config, B, config.max_position_embeddings, self.compute_dtype)
        positions, masks, segments = place(config, B, T, attention_mask, position_ids, cache)
        x = x + self.embed_positions(positions + 2)  # the table starts two rows in; padding is row 1

        hidden_states, attentions, written = [], [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(x)
            past = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            before = x
            if self.gradient_checkpointing and training and cache is None and not output_attentions:
                x = layer.checkpointed(x, masks)
            else:
                x, weights, kv = layer(x, masks, past, output_attentions=output_attentions, training=training)
            if output_attentions:
                attentions.append(weights)
            if cache is not None:
                written.append(kv)
            if training and self.dice is not None:
                x = ops.where(keras.random.uniform((), seed=self.dice) < config.layerdrop, before, x)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        hidden_states.append(x)

        if cache is not None:
            k, v = zip(*written, strict=True)
            cache = KVCache(k, v, cache.length + T, segments)
        return BaseModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class TFOPTPreTrainedModel(keras.Model):
    """What the four models share: loading, saving, and the settings of their decoder."""

    architecture: str
    config: OPTConfig
    model: TFOPTModel  # of those with a head

    def _decoder(self) -> OPTDecoder:
        return (self if isinstance(self, TFOPTModel) else self.model).decoder

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        return KVCache.empty(self.config, batch_size, max_length, self.compute_dtype)

    def gradient_checkpointing_enable(self) -> None:
        """In training keep only the input of each layer for the backward pass, which computes the rest again; not in
        calls with a cache or output_attentions. A tf.function that is traced, as `fit` does, stays as it is."""
        self._decoder().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all that the backward pass needs, as by default."""
        self._decoder().gradient_checkpointing = False

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The loss given to `compile` is of the logits; without targets, as `fit` on dictionaries with labels, it is
        the model's own."""
        if y is None and y_pred.loss is not None:
            return y_pred.loss
        return super().compute_loss(x, y, self.scores(y_pred), *args, **kwargs)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The metrics given to `compile` are of the logits."""
        return super().compute_metrics(x, y, self.scores(y_pred), *args, **kwargs)

    def scores(self, output: Any) -> Any:
        """What of an output the loss and the metrics given to `compile` are to see."""
        return output.logits

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | str | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keras's export. A SavedModel has one endpoint, `serve`, also as `signatures["serving_default"]`: from
        input_ids and attention_mask, [B, T] int32, or from what input_signature has of the two, to a dictionary of the
        output's tensors by their names."""
        if format != "tf_saved_model":
            return super().export(filepath, format, verbose, input_signature, **kwargs)

        def serve(input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
            out = self(input_ids, attention_mask=attention_mask, training=False)
            return {name: tensor for name, tensor in out._asdict().items() if isinstance(tensor, Tensor)}

        names = ("input_ids", "attention_mask")
        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint(
            "serve", serve, input_signature or [tf.TensorSpec((None, None), "int32", n) for n in names]
        )
        archive.write_out(filepath, verbose=True if verbose is None else verbose, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"config": dataclasses.asdict(self.config)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return cls(**config | {"config": OPTConfig(**config["config"])})

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained


@keras.saving.register_keras_serializable(package="opt_zoo")
class TFOPTModel(TFOPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture = "OPTModel"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """initializer: of the matrices and embeddings, in place of N(0, init_std²). kwargs: those of keras.Model,
        such as dtype, a name or a policy."""
        super().__init__(**kwargs)
        self.config = config
        self.decoder = OPTDecoder(config, initializer or _normal(config), dtype=self.dtype_policy, name="decoder")
        self.build()  # Keras would leave it to the first call; a checkpoint needs weights to go to
        if initializer is None and config.pad_token_id is not None:
            table, row = self.decoder.embed_tokens.embeddings, (config.pad_token_id, 0)
            table.assign(ops.slice_update(table, row, ops.zeros((1, config.embed_dim), table.dtype)))

    def build(self, input_shape: Any = None) -> None:
        self.decoder.build()

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which take the place of the token embedding.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row. Default: no padding. In a tf.function it may be
            as wide as the cache, so that one program serves every step; columns not reached yet are not looked at.
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        past_key_values: the KVCache of the tokens before these; the result holds the one to pass next. With use_cache
            and none given a new one is made, with room for max_position_embeddings tokens (`init_cache` makes one of
            any size).
        output_hidden_states, output_attentions: also return what BaseModelOutput says.
        training: dropout happens if this is true. Keras wants it, and all that is no tensor, by keyword.
        Raises ValueError that names the argument; in a tf.function for shapes alone, as there are no values to look at.
        """
        return self.decoder(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )


@keras.saving.register_keras_serializable(package="opt_zoo")
class TFOPTForCausalLM(TFOPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """Arguments as of `TFOPTModel`."""
        super().__init__(**kwargs)
        self.config = config
        self.model = TFOPTModel(config, initializer, dtype=self.dtype_policy, name="model")
        head = partial(Linear, config.vocab_size, use_bias=False, dtype=self.dtype_policy, name="lm_head")
        self.lm_head = None if config.tie_word_embeddings else head(kernel_initializer=initializer or _normal(config))
        self.build()

    def build(self, input_shape: Any = None) -> None:
        if self.lm_head is not None:
            self.lm_head.build((None, None, self.config.embed_dim))

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Tensor = 0,
        training: bool | None = None,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `TFOPTModel.call`, or the tensors in a dictionary, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: the logits of a token
            are held against the label of the next. The loss is their mean cross-entropy, in float32. As in
            transformers padding can be held against a token behind it, though what padding says means nothing: give
            -100 for the first token of a left-padded row.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in a tensor; 0 for all.
        """
        if isinstance(input_ids, Mapping):
            return self.call(**input_ids, training=training)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels, logits_to_keep: found both; the loss takes the logits of every token")
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        x = out.last_hidden_state
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else ops.take(x, logits_to_keep, axis=1)
        logits = self.head(x)  # [B, T, V]
        loss = None
        if labels is not None:
            if not labels.shape.is_compatible_with(logits.shape[:2]):
                raise ValueError(f"labels: found shape {list(labels.shape)}, wanted {list(logits.shape[:2])}")
            # float64 stays float64: that run is the judge of the others
            targets = tf.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
            loss = _cross_entropy(_wide(logits), targets, ops.not_equal(targets, -100))
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)

    def head(self, x: Tensor) -> Tensor:
        """The logits [B, T, V] of hidden states [B, T, E]."""
        if self.lm_head is not None:
            return self.lm_head(x)
        B, T, E = ops.shape(x)
        V, rows = self.config.vocab_size, ops.reshape(x, (-1, E))
        table = ops.convert_to_tensor(self.model.decoder.embed_tokens.embeddings)
        few = isinstance(n := ops.shape(rows)[0], int) and 1 < n < 64 and not V % PARTS
        if few and not tf.executing_eagerly():
            # for XLA faster by a third
            rows = tf.broadcast_to(rows, (PARTS, n, E))
            logits = tf.matmul(ops.reshape(table, (PARTS, -1, E)), rows, transpose_b=True)
            logits = ops.transpose(ops.reshape(logits, (V, n)))
        else:
            # not ops.matmul, which wants a transposed copy of the table
            logits = tf.matmul(rows, table, transpose_b=True)
        return ops.reshape(logits, (B, T, V))

    generate = generate


@keras.saving.register_keras_serializable(package="opt_zoo")
class TFOPTForSequenceClassification(TFOPTPreTrainedModel):
    """OPT with a label, or several, for a whole row: `score` of its last token."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """Arguments as of `TFOPTModel`."""
        super().__init__(**kwargs)
        self.config = config
        self.model = TFOPTModel(config, initializer, dtype=self.dtype_policy, name="model")
        kernel = initializer or _normal(config)
        self.score = Linear(
            config.num_labels, use_bias=False, kernel_initializer=kernel, dtype=self.dtype_policy, name="score"
        )
        self.build()

    def build(self, input_shape: Any = None) -> None:
        self.score.build((None, self.config.embed_dim))

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `TFOPTModel.call`, or the tensors in a dictionary, and:

        labels: for config.problem_type, which if None follows from num_labels and the labels as in transformers:
            "regression" (num_labels 1): [B] or, with several labels, [B, num_labels] numbers; the mean squared error.
            "single_label_classification" (whole numbers): [B], -100 for rows to leave out; the mean cross-entropy.
            "multi_label_classification" (numbers 0 to 1): [B, num_labels]; the mean binary cross-entropy.
            The loss is float32.
        """
        if isinstance(input_ids, Mapping):
            return self.call(**input_ids, training=training)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        x = out.last_hidden_state
        B, T, _ = ops.shape(x)
        real = tf.ones((B, T), tf.bool)
        if attention_mask is not None:
            first = 0 if past_key_values is None else past_key_values.length
            real = ops.not_equal(tf.slice(attention_mask, (0, first), (B, T)), 0)
        if input_ids is not None and self.config.pad_token_id is not None:
            real = ops.logical_and(real, ops.not_equal(input_ids, self.config.pad_token_id))
        last = ops.argmax(ops.where(real, ops.arange(T), 0), axis=1)
        logits = self.score(tf.gather(x, last, axis=1, batch_dims=1))  # [B, labels]
        loss = None
        if labels is not None:
            rows = None if None in labels.shape else logits.shape[0]
            problem = check_labels(self.config, rows, labels.shape, whole=labels.dtype.is_integer)
            scores = _wide(logits)  # float64 stays float64: that run is the judge of the others
            if problem == "single_label_classification":
                targets = ops.reshape(labels, (-1,))
                loss = _cross_entropy(scores, targets, ops.not_equal(targets, -100))
            else:
                targets = ops.cast(ops.reshape(labels, ops.shape(scores)), scores.dtype)
                binary = tf.nn.sigmoid_cross_entropy_with_logits
                loss = ops.mean((scores - targets) ** 2 if problem == "regression" else binary(targets, scores))
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


@keras.saving.register_keras_serializable(package="opt_zoo")
class TFOPTForQuestionAnswering(TFOPTPreTrainedModel):
    """OPT with two scores a token: that the answer begins there, and that it ends there."""

    architecture = "OPTForQuestionAnswering"

    def __init__(self, config: OPTConfig, initializer: Any = None, **kwargs: Any) -> None:
        """Arguments as of `TFOPTModel`."""
        super().__init__(**kwargs)
        self.config = config
        self.model = TFOPTModel(config, initializer, dtype=self.dtype_policy, name="model")
        kernel = initializer or _normal(config)
        self.qa_outputs = Linear(2, kernel_initializer=kernel, dtype=self.dtype_policy, name="qa_outputs")
        self.build()

    def build(self, input_shape: Any = None) -> None:
        self.qa_outputs.build((None, None, self.config.embed_dim))

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `TFOPTModel.call`, or the tensors in a dictionary, and:

        start_positions, end_positions: [B], the columns of the answer's first and last token. Those outside of the
            row's T columns are left out. (transformers takes negative ones for 0.) The loss is the mean of the two mean
            cross-entropies, in float32.
        """
        if isinstance(input_ids, Mapping):
            return self.call(**input_ids, training=training)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        starts, ends = ops.unstack(self.qa_outputs(out.last_hidden_state), 2, axis=-1)  # [B, T] each
        loss = None
        given = (start_positions, end_positions)
        shapes = [None if positions is None else positions.shape for positions in given]
        known = all(shape is None or None not in shape for shape in shapes)
        if check_spans(starts.shape[0] if known else None, *shapes):
            losses = []
            for scores, positions in zip((starts, ends), given, strict=True):
                columns = ops.reshape(positions, (-1,))
                wanted = ops.logical_and(columns >= 0, columns < ops.shape(scores)[1])
                losses.append(_cross_entropy(_wide(scores), columns, wanted))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, out.past_key_values, out.hidden_states, out.attentions)

    def scores(self, output: Any) -> Any:
        return output.start_logits, output.end_logits


def _cross_entropy(scores: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """The mean over the wanted targets."""
    losses = ops.sparse_categorical_crossentropy(ops.where(wanted, targets, 0), scores, from_logits=True)
    return ops.sum(ops.where(wanted, losses, 0)) / ops.sum(ops.cast(wanted, losses.dtype))


def _normal(config: OPTConfig) -> keras.initializers.Initializer:
    # seeded by a generator: with a number, or nothing, all matrices of one shape would get the same values
    return keras.initializers.RandomNormal(stddev=config.init_std, seed=keras.random.SeedGenerator())


def _hide_absent_fields(output: type) -> None:
    """Make Keras see only the fields that are there: it takes each None for an output, and functional models refuse
    outputs that are not tensors."""

    def flatten(out: Any) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
        there = tuple(name for name, value in zip(out._fields, out, strict=True) if value is not None)
        return [getattr(out, name) for name in there], there, there

    # optree warns of what is meant here, a named tuple that is not taken for one, and refuses a second time
    with warnings.catch_warnings(), suppress(ValueError):
        warnings.simplefilter("ignore")
        optree.register_pytree_node(
            output, flatten, lambda there, values: output(**dict(zip(there, values, strict=True))), namespace="keras"
        )


for _output in (BaseModelOutput, CausalLMOutput, SequenceClassifierOutput, QuestionAnsweringOutput):
    _hide_absent_fields(_output)
