"""The modules are the model: Flax's own layers, called by hand, replaced and changed."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402

from opt_common.weights import FLAX, TORCH, table  # noqa: E402
from opt_flax import FlaxOPTForCausalLM, FlaxOPTPreTrainedModel, modeling_flax_opt  # noqa: E402
from opt_flax.cache import Writer  # noqa: E402
from opt_flax.model import OPTAttention, OPTDecoder, OPTDecoderLayer  # noqa: E402

CAUSAL = np.tril(np.ones((12, 12), bool))[None, None]


def close(found, wanted, tolerance=2e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.fixture
def ids(rng) -> np.ndarray:
    return rng.integers(3, 96, (2, 12))


@pytest.fixture
def model(tiny):
    return FlaxOPTForCausalLM.from_pretrained(tiny("350m")[0])


@pytest.fixture
def ran(model, ids):
    return model(ids, output_hidden_states=True, output_attentions=True)


@pytest.fixture(params=["none", "boolean", "additive"])
def mask(request):
    return {"none": None, "boolean": CAUSAL, "additive": np.where(CAUSAL, 0, np.finfo("f").min)}[request.param]


def test_layers_by_hand(model, ran, mask):
    hidden_states, attentions = ran.hidden_states[0], []
    for i, layer in enumerate(model.model.decoder.layers):
        close(hidden_states, ran.hidden_states[i])
        hidden_states = layer(hidden_states, attention_mask=mask, attentions=attentions)
    close(model.model.decoder.project_out(hidden_states), ran.hidden_states[-1])
    for found, wanted in zip(attentions, ran.attentions, strict=True):
        close(found, wanted)


def test_attention_by_hand(model, ran, mask):
    attention, x = model.model.decoder.layers[0].self_attn, ran.hidden_states[0]
    out, none = attention(hidden_states=x, attention_mask=mask)
    again, weights = attention(hidden_states=x, attention_mask=mask, output_attentions=True)
    assert none is None and out.shape == x.shape
    close(weights, ran.attentions[0])
    v = attention.v_proj(x).reshape(2, 12, attention.num_heads, attention.head_dim)
    wanted = attention.out_proj(jnp.einsum("bnts,bsnd->btnd", weights, v).reshape(x.shape))
    close(out, wanted)
    close(again, wanted)


def test_masks_by_hand(model, ran):
    """A mask of one's own, in either form, is not causality: the first token attends to the last."""
    layer, x = model.model.decoder.layers[0], ran.hidden_states[0]
    everything = layer(x, np.ones((1, 1, 12, 12), bool))
    close(layer(x, np.zeros((1, 1, 12, 12), "f")), everything)
    assert np.abs(np.asarray(everything - layer(x)))[:, 0].max() > 1e-2
    close(everything[:, -1], layer(x)[:, -1])


@pytest.mark.parametrize("form", ["none", "past + T", "all slots"])
def test_layers_by_hand_with_a_cache(model, ran, ids, form):
    """Eight tokens, then four: what the decoder does with a cache, and without one."""
    decoder, x = model.model.decoder, ran.hidden_states[0]
    cache = model(ids[:, :8], past_key_values=model.init_cache(2, 16)).past_key_values
    visible = np.pad(CAUSAL, ((0, 0), (0, 0), (0, 0), (0, 4)))[:, :, 8:]
    mask = {"none": None, "past + T": visible[..., :12], "all slots": visible}[form]
    writer, hidden_states = Writer(cache), x[:, 8:]
    for layer in decoder.layers:
        hidden_states = layer(hidden_states, mask, writer)
    close(decoder.project_out(hidden_states), ran.hidden_states[-1][:, 8:], 1e-5)
    wanted = model(ids[:, 8:], past_key_values=cache).past_key_values
    found = writer.advance(4, wanted.segments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(a, b, 1e-5)
    assert int(found.length) == 12 and int(cache.length) == 8, "the old cache is still a value"


def test_a_cache_by_hand_says_what_is_missing(model, ran):
    layer, x, cache = model.model.decoder.layers[0], ran.hidden_states[0], model.init_cache(2, 16)
    with pytest.raises(ValueError, match="layer_idx: found None, wanted the number of the layer"):
        OPTAttention(model.config, rngs=nnx.Rngs(0))(x, Writer(cache))
    with pytest.raises(ValueError, match="attention_mask: found None and a traced past_key_values, wanted a mask"):
        jax.jit(lambda cache: layer(x, past_key_values=Writer(cache)))(cache)


def test_signatures_and_attributes(model):
    """As in transformers 5, whose arguments have this order; those of the whole models, as in its Flax classes."""
    transformers = pytest.importorskip("transformers.models.opt.modeling_opt")
    for ours, theirs in (
        (OPTDecoder.__call__, transformers.OPTDecoder.forward),
        (OPTDecoderLayer.__call__, transformers.OPTDecoderLayer.forward),
        (OPTAttention.__call__, transformers.OPTAttention.forward),
    ):
        found, wanted = (list(inspect.signature(f).parameters) for f in (ours, theirs))
        common = [name for name in wanted if name in found]
        assert [name for name in found if name in wanted] == common
        assert common[:3] == wanted[:3]
    order = "input_ids attention_mask position_ids params past_key_values output_attentions output_hidden_states"
    for cls in (FlaxOPTForCausalLM, type(model.model)):
        found = list(inspect.signature(cls.__call__).parameters)
        assert found[1:11] == [*order.split(), "return_dict", "dropout_rng", "deterministic"]
    layer = model.model.decoder.layers[1]
    assert (type(layer), type(layer.self_attn)) == (modeling_flax_opt.FlaxOPTDecoderLayer, OPTAttention)
    assert isinstance(model, FlaxOPTPreTrainedModel) and issubclass(modeling_flax_opt.FlaxOPTDecoder, OPTDecoder)
    attention, config = layer.self_attn, model.config
    assert attention.config is config and attention.layer_idx == 1 and attention.is_causal
    assert attention.embed_dim == layer.embed_dim == config.hidden_size
    assert attention.num_heads == config.num_attention_heads and attention.head_dim == config.head_dim
    assert attention.scaling == config.head_dim**-0.5 and attention.dropout == config.attention_dropout
    assert layer.do_layer_norm_before is False and layer.dropout == config.dropout


@pytest.mark.parametrize("form", ["function", "module"])
def test_a_replaced_activation_counts(model, ids, form):
    layer = model.model.decoder.layers[0]
    before = model(ids).logits

    class Zero(nnx.Module):
        def __call__(self, x):
            return jnp.zeros_like(x)

    layer.activation_fn = jnp.zeros_like if form == "function" else nnx.data(Zero())
    after = model(ids).logits
    assert np.abs(np.asarray(after - before)).max() > 1e-2
    layer.activation_fn = jax.nn.relu
    layer.fc2.kernel[...] *= 0
    close(after, model(ids).logits)


def test_kernels_are_flax_own(tiny, model):
    """Exactly nnx.Linear, nnx.LayerNorm and nnx.Embed; a kernel [in, out] is the checkpoint's matrix turned."""
    _, theirs = tiny("350m")
    kinds = {"linear": nnx.Linear, "bias": nnx.Linear, "norm": nnx.LayerNorm, "norm_bias": nnx.LayerNorm}
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for spec in table(model.config):
        if spec.kind != "embedding":
            assert type(modules[spec.path]) is kinds[spec.kind], spec.path
        found, wanted = FLAX.parameter(model, spec)[...], TORCH.parameter(theirs, spec).detach().numpy().astype("f")
        np.testing.assert_array_equal(found, wanted.T if spec.kind == "linear" else wanted)
    assert type(modules["model.decoder.embed_tokens"]) is nnx.Embed
    assert modules["model.decoder.layers.0.fc1"].kernel.shape == (64, 128)


def test_low_rank_updates(tiny, model, ids, rng):
    """a·b [in, out] added to a square kernel does what b'·a' [out, in] does in transformers."""
    torch = pytest.importorskip("torch")
    theirs = copy.deepcopy(tiny("350m")[1])
    a, b = rng.normal(size=(64, 4)) * 0.3, rng.normal(size=(4, 64)) * 0.3
    before = model(ids).logits
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(model.model.decoder.layers[0].self_attn, name).kernel[...] += jnp.asarray(a @ b, jnp.float32)
        getattr(theirs.model.decoder.layers[0].self_attn, name).weight.data += torch.tensor((a @ b).T)
    found = np.asarray(model(ids).logits)
    wanted = theirs(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert np.abs(found - before).max() > 1e-2 * np.abs(wanted).max()


def test_a_replaced_linear_counts(model, ids):
    """Flax's own LoRA around each Linear: the same answer while b is 0, another after."""
    before = model(ids).logits
    for layer in model.model.decoder.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            lora = nnx.LoRA(64, 4, 64, base_module=linear, rngs=nnx.Rngs(0))
            setattr(layer.self_attn, name, lora)
    close(model(ids).logits, before)
    lora.lora_b[...] += 1
    assert np.abs(np.asarray(model(ids).logits - before)).max() > 1e-2


def test_captured_outputs(model, ids, ran):
    """nnx.capture sees every Linear's output, because the layers call the modules."""
    _, found = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(ids)
    (fc2,) = found["model"]["decoder"]["layers"][0]["fc2"]["__call__"].get_value()
    assert fc2.shape == (2, 12, 64)


def test_jit_sees_another_implementation(model, ids):
    """The config is a static part of the model, and jit knows a model by it."""
    seen = []

    @jax.jit
    def run(model, ids):
        seen.append(model.model.decoder.layers[0].self_attn.config._attn_implementation)
        return model(ids).logits

    for name in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(name)
        run(model, ids)
    assert seen == ["sdpa", "eager"]
