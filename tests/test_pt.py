"""What is PyTorch's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from opt_common.config import OPTConfig
from opt_pt import OPTForCausalLM, OPTModel


@pytest.fixture
def ids(rng) -> torch.Tensor:
    return torch.from_numpy(rng.integers(3, 96, (2, 12)))


def test_state_dict_is_transformers(tiny):
    for name in ("pre-norm", "350m", "untied"):
        folder, reference = tiny(name)
        ours = OPTForCausalLM.from_pretrained(folder).state_dict()
        assert {k: tuple(v.shape) for k, v in ours.items()} == {
            k: tuple(v.shape) for k, v in reference.state_dict().items()
        }


def test_loading_draws_no_random_numbers_and_makes_nothing_twice(tiny):
    folder, _ = tiny("350m")
    before = torch.get_rng_state()
    model = OPTForCausalLM.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight


def test_new_weights(tiny):
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=5000, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, ffn_dim=256)
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert abs(float(parameter.detach().std()) / 0.02 - 1) < 0.05, name
    assert (model.model.decoder.embed_tokens.weight[1] == 0).all()


@pytest.mark.parametrize("dtype", [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}])
def test_dtypes(tiny, dtype):
    folder, _ = tiny()
    model = OPTForCausalLM.from_pretrained(folder, **dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == "bfloat16"


def test_attention_implementations(tiny, ids):
    folder, _ = tiny("350m")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        sdpa, eager = (
            OPTForCausalLM.from_pretrained(folder, attn_implementation=name)(ids, mask).logits
            for name in ("sdpa", "eager")
        )
    assert torch.allclose(sdpa[mask == 1], eager[mask == 1], atol=5e-5)
    with pytest.raises(ValueError, match="attn_implementation: found 'fast', wanted one of eager, sdpa"):
        OPTForCausalLM.from_pretrained(folder, attn_implementation="fast")


def test_compiles_in_one_graph(tiny, ids):
    folder, _ = tiny("350m")
    model = OPTForCausalLM.from_pretrained(folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        assert torch.allclose(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-5)
        assert torch.allclose(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss, atol=1e-5)


def test_dropout_is_where_the_paper_has_it(tiny, ids):
    """After attention and feed-forward; none on the embeddings (arXiv:2205.01068, 2.2); off in eval mode."""
    folder, _ = tiny()
    model = OPTForCausalLM.from_pretrained(folder)
    still = model(ids, output_hidden_states=True)
    model.train()
    torch.manual_seed(0)
    moving = model(ids, output_hidden_states=True)
    assert torch.equal(still.hidden_states[0], moving.hidden_states[0])
    assert not torch.equal(still.hidden_states[1], moving.hidden_states[1])
    # about a tenth of what the last feed-forward adds is dropped
    layer, x = model.model.decoder.layers[0], torch.ones(4, 50, 64)
    with torch.no_grad():
        layer.fc2.weight.zero_()
        layer.fc2.bias.fill_(1.0)
        layer.self_attn.out_proj.weight.zero_()
        layer.self_attn.out_proj.bias.zero_()
        added = layer(x, None, None, False)[0] - x
    assert abs(float((added == 0).float().mean()) - 0.1) < 0.02


def test_gradients(tiny, ids):
    """As transformers', the tied head's and the padding row's included."""
    folder, reference = tiny("350m")
    ids[0, :3] = 1
    mask = (ids != 1).long()
    labels = ids.masked_fill(mask.roll(1, 1) * mask == 0, -100)
    model = OPTForCausalLM.from_pretrained(folder, dtype="float64")
    reference.zero_grad()
    reference(ids, attention_mask=mask, labels=labels).loss.backward()
    model(ids, mask, labels=labels).loss.backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    floor = 1e-7 * max(float(grad.norm()) for grad in wanted.values())  # k_proj.bias has none: softmax cancels it
    for name, parameter in model.named_parameters():
        error = (parameter.grad - wanted[name]).norm()  # transformers' loss is float32 even here
        assert error <= 1e-5 * wanted[name].norm() + floor, name
    reference.zero_grad()


def test_layerdrop_skips_layers_in_training_only(tiny, ids):
    config = OPTConfig(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=8, ffn_dim=64,
                       layerdrop=0.5, dropout=0.0)  # fmt: skip
    model = OPTModel(config)
    torch.manual_seed(0)
    states = model.train()(ids, output_hidden_states=True).hidden_states
    skipped = [torch.equal(a, b) for a, b in zip(states[:-2], states[1:-1], strict=True)]
    assert 0 < sum(skipped) < 7
    states = model.eval()(ids, output_hidden_states=True).hidden_states
    assert not any(torch.equal(a, b) for a, b in zip(states[:-2], states[1:-1], strict=True))


def test_outputs_read_by_index_and_by_key(tiny, ids):
    folder, _ = tiny()
    out = OPTForCausalLM.from_pretrained(folder)(ids, use_cache=True)
    assert out[0] is out.logits is out["logits"]
    assert out[1] is out.past_key_values
    assert out.past_key_values.length == 12 and out.past_key_values.slots == 64
    assert out["loss"] is None
    with pytest.raises(KeyError, match="nothing"):
        out["nothing"]
    with_loss = OPTForCausalLM.from_pretrained(folder)(ids, labels=ids)
    loss, logits = with_loss[:2]
    assert loss is with_loss.loss and logits is with_loss.logits
    assert np.isfinite(float(loss.detach()))
