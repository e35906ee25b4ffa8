"""OPT (Zhang et al. 2022, arXiv:2205.01068) in PyTorch.

B batch   T tokens of this call   S slots: past tokens and T
V vocabulary   E embedding width   H hidden   N heads   D head width (N·D = H)   F feed-forward
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_labels, check_spans, check_tokens
from opt_common.outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput

from .attention import (
    IMPLEMENTATIONS,
    Packing,
    View,
    check_flash,
    check_implementation,
    dense,
    eager,
    flash_attention_2,
    unpad,
)
from .cache import KVCache, place
from .generate import generate
from .linear import Packed, linear, pack, plain, product
from .weights import from_pretrained, save_pretrained

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


Attend = Callable[[Tensor, Tensor, Tensor, View, float], tuple[Tensor, Tensor | None]]


class OPTAttention(nn.Module):
    """Multi-head causal self-attention.

    The weights of q, k and v lie side by side in memory, so that without gradients one product computes all three
    (benchmarks/NOTES.md has what that gives); as parameters they are three, with the checkpoint's names.
    """

    def __init__(self, config: OPTConfig, layer: int) -> None:
        super().__init__()
        H, bias = config.hidden_size, config.enable_bias
        self.heads, self.layer, self.dropout = config.num_attention_heads, layer, config.attention_dropout
        self.k_proj = nn.Linear(H, H, bias=bias)
        self.v_proj = nn.Linear(H, H, bias=bias)
        self.q_proj = nn.Linear(H, H, bias=bias)
        self.out_proj = nn.Linear(H, H, bias=bias)
        self.packed: Packed | None = None
        self.fuse()

    def forward(self, x: Tensor, attend: Attend, view: View, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        heads = (self.heads, x.shape[-1] // self.heads)
        parts = self.q_proj, self.k_proj, self.v_proj
        whole = None if torch.is_grad_enabled() else self.qkv()
        if whole is not None:
            q, k, v = product(x, *whole, self.packed).view(*x.shape[:-1], 3, *heads).unbind(-3)  # [B, T, N, D] each
        else:
            q, k, v = (linear(f, x).view(*x.shape[:-1], *heads) for f in parts)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, view)  # [B, S, N, D]
        out, weights = attend(q, k, v, view, self.dropout if self.training else 0.0)
        return linear(self.out_proj, out.flatten(-2)), weights

    def fuse(self) -> None:
        """Lay the weights, and the biases, of q, k and v side by side, if they are not."""
        self.whole: tuple[Tensor, Tensor | None] | None = None
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        if not (plain(q) and plain(k) and plain(v)) or q.weight.device.type == "meta":
            return
        weights, biases = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.cat([p.data for p in weights])
            bias = None if q.bias is None else torch.cat([p.data for p in biases])
            for parameters, whole in ((weights, weight), (biases, bias)):
                if whole is not None:
                    for parameter, part in zip(parameters, whole.chunk(3), strict=True):
                        parameter.data = part
        self.whole, self.places = (weight, bias), [p.data_ptr() for f in (q, k, v) for p in f.parameters()]

    def qkv(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight [3H, H] and bias [3H] of q, k and v in one; None if they are not side by side, because one of them
        was replaced, or is no longer a plain Linear."""
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        if self.whole is None or torch.compiler.is_compiling() or not (plain(q) and plain(k) and plain(v)):
            return None
        places = [p.data_ptr() for f in (q, k, v) for p in f._parameters.values() if p is not None]
        return self.whole if places == self.places else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # .to, .half, .cuda: three parameters, three new tensors
        if self.qkv() is None:
            self.fuse()
        return self


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each with its residual; the norm comes before them, or after them in 350m."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        super().__init__()
        H, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.pre_norm, self.dropout = config.do_layer_norm_before, config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = OPTAttention(config, layer)
        self.self_attn_layer_norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine)
        self.fc1 = nn.Linear(H, config.ffn_dim, bias=config.enable_bias)
        self.fc2 = nn.Linear(config.ffn_dim, H, bias=config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine)

    def forward(self, x: Tensor, attend: Attend, view: View, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        residual = x
        if self.pre_norm:
            x = self.self_attn_layer_norm(x)
        x, weights = self.self_attn(x, attend, view, cache)
        x = residual + (F.dropout(x, self.dropout) if self.training else x)
        if not self.pre_norm:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.pre_norm:
            x = self.final_layer_norm(x)
        relu = self.activation is F.relu
        x = linear(self.fc1, x, relu)  # [B, T, F]
        x = linear(self.fc2, x if relu else self.activation(x))
        x = residual + (F.dropout(x, self.dropout) if self.training else x)
        if not self.pre_norm:
            x = self.final_layer_norm(x)
        return x, weights


class OPTDecoder(nn.Module):
    """Embeddings, the layers, and the final norm and projection where the size has them."""

    def __init__(self, config: OPTConfig, attn_implementation: str) -> None:
        super().__init__()
        E, H = config.embed_dim, config.hidden_size
        self.config, self.attn_implementation, self.gradient_checkpointing = config, attn_implementation, False
        # padding_idx: the padding row takes no gradient from its own look-up. _weight: nothing is drawn twice, nor on
        # the meta device, where drawing imports half of PyTorch's compiler
        V, P = config.vocab_size, config.max_position_embeddings + 2
        self.embed_tokens = nn.Embedding(V, E, padding_idx=config.pad_token_id, _weight=torch.empty(V, E))
        self.embed_positions = nn.Embedding(P, H, _weight=torch.empty(P, H))
        self.project_in = nn.Linear(E, H, bias=False) if config.projects_embeddings else None
        self.project_out = nn.Linear(H, E, bias=False) if config.projects_embeddings else None
        self.layers = nn.ModuleList(OPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        affine = config.layer_norm_elementwise_affine
        norm = nn.LayerNorm(H, eps=1e-5, elementwise_affine=affine) if config.has_final_layer_norm else None
        self.final_layer_norm = norm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """See `OPTModel.forward`."""
        config, cache = self.config, past_key_values
        B, T = check_call(
            config,
            None if input_ids is None else input_ids.shape,
            None if inputs_embeds is None else inputs_embeds.shape,
            None if attention_mask is None else attention_mask.shape,
            None if position_ids is None else position_ids.shape,
            past=0 if cache is None else cache.length,
            slots=cache.slots if cache is not None else config.max_position_embeddings if use_cache else None,
            rows=None if cache is None else cache.k[0].shape[0],
        )
        if inputs_embeds is None and input_ids is not None:
            if not torch.compiler.is_compiling() and input_ids.device.type == "cpu":
                check_tokens(config, int(input_ids.min()), int(input_ids.max()))
            inputs_embeds = self.embed_tokens(input_ids)
        x: Tensor = inputs_embeds  # type: ignore[assignment]  # [B, T, E]
        if self.project_in is not None:
            x = linear(self.project_in, x)  # [B, T, H]
        positions, segments = place(config, B, T, x.device, attention_mask, position_ids, cache)
        if cache is None and use_cache:
            cache = KVCache(config, B, config.max_position_embeddings, x.device, x.dtype)
        x = x + self.embed_positions(positions + 2)  # the table starts two rows in; padding is row 1

        attend = eager if output_attentions else IMPLEMENTATIONS[self.attn_implementation]
        view = self.view(attend, segments, cache, x)
        if isinstance(view, Packing):  # from here to the end padding does not exist
            x = x.flatten(0, 1)[view.rows]  # [queries, H]
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            before = x
            if self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled():
                x, weights = checkpoint(layer, x, attend, view, None, use_reentrant=False)
            else:
                x, weights = layer(x, attend, view, cache)
            if output_attentions:
                attentions.append(weights)
            if self.training and config.layerdrop > 0:  # the dice are a tensor: compiling does not freeze them
                x = torch.where(torch.rand((), device=x.device) < config.layerdrop, before, x)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = linear(self.project_out, x)
        hidden_states.append(x)
        if isinstance(view, Packing):
            hidden_states = [x.new_zeros(B * T, x.shape[-1]).index_copy(0, view.rows, x).unflatten(0, (B, T))
                             for x in hidden_states]  # fmt: skip

        if cache is not None:
            cache.length, cache.segments = cache.length + T, segments
        return BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def view(self, attend: Attend, segments: Tensor | None, cache: KVCache | None, x: Tensor) -> View:
        """What each of the new tokens x [B, T, H] may see, in the form that `attend` takes."""
        T, past = x.shape[1], 0 if cache is None else cache.length
        if attend is not flash_attention_2:
            return dense(segments, past, T, x.device)
        check_flash(x.device, torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype)
        if segments is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "attention_mask, position_ids: found one while a CUDA graph is captured, and 'flash_attention_2' takes "
                "out as much padding as it finds; give none, or take 'sdpa'"
            )
        return None if segments is None else unpad(segments, T)


class OPTPreTrainedModel(nn.Module):
    """What the four models share: loading, saving, and the settings of their decoder."""

    architecture: str
    config: OPTConfig
    model: OPTModel  # of those with a head

    def _decoder(self) -> OPTDecoder:
        return (self if isinstance(self, OPTModel) else self.model).decoder

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row."""
        weight = self._decoder().embed_positions.weight
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    def set_attn_implementation(self, name: str) -> None:
        """Attend by "eager", "sdpa" or "flash_attention_2" from now on; see `opt_pt.attention`."""
        check_implementation(name)
        self._decoder().attn_implementation = name

    def gradient_checkpointing_enable(self) -> None:
        """In training keep only the input of each layer for the backward pass, which computes the rest again; not in
        calls with a cache."""
        self._decoder().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all that the backward pass needs, as by default."""
        self._decoder().gradient_checkpointing = False

    def tie_weights(self) -> None:
        """Make the head the token embedding, if it is an `lm_head` and the config says so."""

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained
    pack = pack


class OPTModel(OPTPreTrainedModel):
    """OPT without a head. New weights are drawn from N(0, init_std²), biases and the padding row are 0."""

    architecture = "OPTModel"

    def __init__(self, config: OPTConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        check_implementation(attn_implementation)
        self.config = config
        self.decoder = OPTDecoder(config, attn_implementation)
        self.apply(lambda module: _init_weights(module, config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """Run the decoder.

        input_ids: [B, T] whole numbers; or inputs_embeds: [B, T, E], which take the place of the token embedding.
        attention_mask: [B, past + T], 0 for padding, anywhere in a row. Default: no padding.
        position_ids: [B or 1, T]. Default: the count of real tokens before each. Several documents in one row, each
            counted from 0, do not see each other.
        past_key_values: the KVCache of the tokens before these; it is written in place. With use_cache and none given
            a new one is made, with room for max_position_embeddings tokens (`init_cache` makes one of any size).
        output_hidden_states, output_attentions: also return what BaseModelOutput says. Attention weights are computed
            by the eager formula, whatever attn_implementation is.
        Raises ValueError that names the argument.
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
        )


class OPTForCausalLM(OPTPreTrainedModel):
    """OPT with its language-modelling head, which is the token embedding unless config.tie_word_embeddings is false."""

    architecture = "OPTForCausalLM"

    def __init__(self, config: OPTConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = OPTModel(config, attn_implementation)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        _init_weights(self.lm_head, config)
        self.tie_weights()

    def forward(
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
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """Run the decoder and the head; arguments as in `OPTModel.forward`, and:

        labels: [B, T] token ids, -100 where there is nothing to learn. They are shifted here: the logits of a token
            are held against the label of the next. The loss is their mean cross-entropy, in float32. As in
            transformers padding can be held against a token behind it, though what padding says means nothing: give
            -100 for the first token of a left-padded row.
        logits_to_keep: the logits of the last so many tokens only, or of the columns in a tensor; 0 for all.
        return_dict: taken for peft, which passes it on; an output is read by name and by index in any case.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep != 0):
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
        )
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-int(logits_to_keep), None)
        logits = linear(self.lm_head, out.last_hidden_state[:, keep])  # [B, T, V]
        loss = None
        if labels is not None:
            check_labels = tuple(labels.shape) == tuple(logits.shape[:2])
            if not check_labels:
                raise ValueError(f"labels: found shape {list(labels.shape)}, wanted {list(logits.shape[:2])}")
            # float64 stays float64: that run is the judge of the others
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # the labels are moved: a part of the logits would be copied, and its gradient once more
            loss = F.cross_entropy(scores.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten())
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)

    def tie_weights(self) -> None:
        """Make the head the token embedding, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.decoder.embed_tokens.weight

    generate = generate
    generation_config = None  # peft's `generate` wants to find one, and hands it back

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: KVCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of a call that goes on from a cache: peft's language models ask for it by this name."""
        input_ids = input_ids if past_key_values is None else input_ids[:, int(past_key_values.length) :]
        return kwargs | {"input_ids": input_ids, "past_key_values": past_key_values}


class OPTForSequenceClassification(OPTPreTrainedModel):
    """OPT with a label, or several, for a whole row: `score` of its last token."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = OPTModel(config, attn_implementation)
        self.score = nn.Linear(config.embed_dim, config.num_labels, bias=False)
        _init_weights(self.score, config)

    def forward(
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
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Run the decoder, and the head on the rightmost token of each row that is not padding, by attention_mask or by
        being config.pad_token_id. Arguments as in `OPTModel.forward`, and:

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
        )
        x = out.last_hidden_state  # [B, T, E]
        B, T = x.shape[:2]
        real = x.new_ones((B, T), dtype=torch.bool) if attention_mask is None else attention_mask[:, -T:] != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            real = real & (input_ids != self.config.pad_token_id)
        last = (real * torch.arange(T, device=x.device)).argmax(1)
        logits = linear(self.score, x[torch.arange(B, device=x.device), last])  # [B, labels]
        loss = None
        if labels is not None:
            problem = check_labels(self.config, B, labels.shape, whole=not labels.is_floating_point())
            # float64 stays float64: that run is the judge of the others
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if problem == "single_label_classification":
                loss = F.cross_entropy(scores, labels.flatten())
            elif problem == "regression":
                loss = F.mse_loss(scores, labels.view_as(scores).to(scores.dtype))
            else:
                loss = F.binary_cross_entropy_with_logits(scores, labels.view_as(scores).to(scores.dtype))
        return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """OPT with two scores a token: that the answer begins there, and that it ends there."""

    architecture = "OPTForQuestionAnswering"

    def __init__(self, config: OPTConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = OPTModel(config, attn_implementation)
        self.qa_outputs = nn.Linear(config.embed_dim, 2)
        _init_weights(self.qa_outputs, config)

    def forward(
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
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput:
        """Run the decoder and the head; arguments as in `OPTModel.forward`, and:

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
        )
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
                # float64 stays float64: that run is the judge of the others
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
                losses.append(F.cross_entropy(scores, columns))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, starts, ends, out.past_key_values, out.hidden_states, out.attentions)


@torch.no_grad()
def _init_weights(module: nn.Module, config: OPTConfig) -> None:
    if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
        return
    module.weight.normal_(0.0, config.init_std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()
