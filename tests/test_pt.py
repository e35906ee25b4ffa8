"""What is PyTorch's own."""

from __future__ import annotations

import copy
import sys
import types
import weakref
from itertools import count

import numpy as np
import pytest
import torch
import transformers

from conftest import CONFIGS
from opt_common.config import OPTConfig
from opt_pt import OPTForCausalLM, OPTModel
from opt_pt.attention import dense, sdpa
from opt_pt.fast import cpu, packed, products
from opt_pt.fast.packed import Packed, onednn


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
    model = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        eager = model(ids, mask).logits
        model.set_attn_implementation("sdpa")
        fused = model(ids, mask).logits
    assert torch.allclose(fused[mask == 1], eager[mask == 1], atol=5e-5) and not torch.equal(fused, eager)
    wanted = "attn_implementation: found 'fast', wanted one of eager, sdpa, flash_attention_2"
    for choose in (model.set_attn_implementation, lambda name: OPTModel(model.config, attn_implementation=name)):
        with pytest.raises(ValueError, match=wanted):
            choose("fast")
    assert torch.equal(model(ids, mask).logits, fused), "a refused choice changes nothing"


def test_flash_attention_2_where_it_cannot_run(tiny, ids, monkeypatch):
    """An error that says which and what to do; never another implementation in its place."""
    folder, _ = tiny()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    with pytest.raises(ImportError, match="'flash_attention_2' needs the flash-attn package, which is not"):
        OPTForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    model = OPTForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2", dtype="float16")
    with pytest.raises(ValueError, match="'flash_attention_2' cannot run: the model is on cpu; move it to a GPU"):
        model(ids)
    with pytest.raises(ValueError, match="cannot run"):
        model.generate(ids, max_new_tokens=2)


class FlashAttn(types.ModuleType):
    """flash-attn's three functions as its documentation describes them, and its extension's, in plain PyTorch: queries
    are the last of their keys. How the kernels themselves compute is judged on a GPU (test_gpu.py)."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.lengths: list[list[int]] = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert causal and not dropout_p and softmax_scale == q.shape[-1] ** -0.5
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k, v, dense(None, k.shape[2] - q.shape[2], q.shape[2], q.device), softmax_scale, 0.0)[0]

    def flash_attn_with_kvcache(self, q, k, v, softmax_scale=None, causal=False):
        return self.flash_attn_func(q, k, v, 0.0, softmax_scale, causal=causal)

    def flash_attn_varlen_func(
        self, q, k, v, starts_q, starts_k, longest_q, longest_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert (longest_q, longest_k) == (starts_q.diff().max(), starts_k.diff().max())
        assert (len(q), len(k)) == (starts_q[-1], starts_k[-1])
        self.lengths.append(starts_k.diff().tolist())
        documents = zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True)
        parts = zip(documents, starts_q[:-1].tolist(), starts_k[:-1].tolist(), strict=True)
        return torch.cat([
            self.flash_attn_func(
                q[None, a : a + n], k[None, b : b + m], v[None, b : b + m], dropout_p, softmax_scale, causal
            )[0]
            if n else q[:0]
            for (n, m), a, b in parts
        ])  # fmt: skip

    def varlen_fwd(self, q, k, v, out, starts_q, starts_k, used, left, table, slopes, longest_q, longest_k, *rest):
        assert [out, used, left, table, slopes] == [None] * 5
        assert rest == (0.0, q.shape[-1] ** -0.5, False, True, -1, -1, 0.0, False, None)  # causal, no window, no cap
        starts, longest = (starts_q, starts_k), (longest_q, longest_k)
        return (self.flash_attn_varlen_func(q, k, v, *starts, *longest, 0.0, rest[1], causal=True),)


@pytest.mark.parametrize(
    "layout", ["left", "right", "holes", "packed", "packed and padded", "empty row half", "empty half"]
)
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
def test_padding_is_taken_out_once(tiny, ids, layout, config, monkeypatch):
    """With flash_attention_2 only real tokens, and one for padding, go through the layers, unless somebody looks at a
    layer; the answers are those of sdpa, also in pieces through the cache."""
    folder, _ = tiny(config)
    mask, positions = torch.ones_like(ids), None
    if layout in ("left", "packed and padded"):
        mask[0, :5] = 0
    if layout == "right":
        mask[1, 7:] = 0
    if layout == "holes":
        mask[0, [0, 3, 4, 9]] = mask[1, 6] = 0
    if layout == "empty row half":  # where the first, or the second, piece of a row has nothing in it
        mask[0, :6] = mask[1, 6:] = 0
    if layout == "empty half":
        mask[:, :6] = 0
    if "packed" in layout:
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3]])
        positions = positions * mask
    real = mask == 1
    ids = ids.where(real, 1)
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(ids, mask, position_ids=positions, output_hidden_states=True)
        module = FlashAttn()
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module)
        monkeypatch.setattr("opt_pt.attention.check_flash", lambda device, dtype: None)
        model.set_attn_implementation("flash_attention_2")
        sizes, product = set(), products.product
        monkeypatch.setattr(products, "product", lambda x, *rest: sizes.add(x.shape[:2]) or product(x, *rest))
        found = model(ids, mask, position_ids=positions, output_hidden_states=True)
        assert (1, int(real.sum()) + (not real.all())) in sizes and len(sizes) <= 2  # the head computes every column
        assert all(lengths == module.lengths[0] for lengths in module.lengths)
        looked = []
        hook = model.model.decoder.layers[0].register_forward_hook(lambda layer, x, out: looked.append(out.shape))
        for a, b in zip(model(ids, mask, position_ids=positions).logits[real], found.logits[real], strict=True):
            assert torch.allclose(a, b, atol=5e-5)
        assert looked == [(2, 12, 64)]
        hook.remove()
        for a, b in zip((found.logits, *found.hidden_states), (wanted.logits, *wanted.hidden_states), strict=True):
            assert torch.allclose(a[real], b[real], atol=5e-5)
        cache, pieces = model.init_cache(2, 12), []
        for begin, end in ((0, 6), (6, 11), (11, 12)):
            piece = None if positions is None else positions[:, begin:end]
            out = model(ids[:, begin:end], mask[:, :end], cache, position_ids=piece)
            pieces.append(out.logits)
        assert torch.allclose(torch.cat(pieces, dim=1)[real], wanted.logits[real], atol=5e-5)


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "not alike"])
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
def test_padding_columns_of_flash_attention_2(tiny, ids, config, alike, monkeypatch):
    """They hold what transformers' FlashAttention-2 arm has there: attention gives 0, all else runs. Gradients too."""
    theirs = transformers.OPTForCausalLM.from_pretrained(tiny(config)[0], dtype=torch.float32)
    ours = OPTForCausalLM.from_pretrained(tiny(config)[0])
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, [3, 11]] = 0
    ids = ids.where(mask == 1, 1) if alike else ids
    monkeypatch.setitem(sys.modules, "flash_attn", module := FlashAttn())
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module)
    monkeypatch.setattr("opt_pt.attention.check_flash", lambda device, dtype: None)
    ours.set_attn_implementation("flash_attention_2")
    for layer in theirs.model.decoder.layers:
        layer.self_attn.out_proj.register_forward_pre_hook(lambda module, x: x[0] * mask[..., None])
    outs = [model(ids, mask, output_hidden_states=True) for model in (theirs, ours)]
    weight = torch.randn(outs[0].logits.shape, generator=torch.Generator().manual_seed(0))
    for out in outs:
        (out.logits * weight).mean().backward()
    for name, found, wanted in [
        *zip(count(), outs[1].hidden_states, outs[0].hidden_states),
        ("logits", outs[1].logits, outs[0].logits),
        *((name, p.grad, theirs.get_parameter(name).grad) for name, p in ours.named_parameters()),
    ]:
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


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
        added = layer(x) - x
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
    assert out.past_key_values.length == 12 and out.past_key_values.slots is None
    assert out.loss is None and "loss" not in out and list(out) == ["logits", "past_key_values"]
    for absent in ("nothing", "loss"):
        with pytest.raises(KeyError, match=absent):
            out[absent]
    out.logits = out["logits"] * 2
    assert out[0] is out.logits is out.to_tuple()[0] is dict(out)["logits"]
    with_loss = OPTForCausalLM.from_pretrained(folder)(ids, labels=ids)
    loss, logits = with_loss[:2]
    assert loss is with_loss.loss and logits is with_loss.logits
    assert np.isfinite(float(loss.detach()))


no_bfloat16 = pytest.mark.skipif(not onednn(torch.bfloat16), reason="this CPU has no bfloat16")


@pytest.mark.skipif(not onednn(torch.float32), reason="needs oneDNN")
@pytest.mark.parametrize("config", ["350m", "no-bias", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=no_bfloat16)])
def test_packed(tiny, ids, config, dtype, monkeypatch):
    """A packed model answers as before, by the packed weights; as long as those are the weights."""
    folder, _ = tiny(config)
    model = OPTForCausalLM.from_pretrained(folder, dtype=dtype)

    def answer(onednn=True):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(packed, "ONEDNN", onednn)
            return model(ids).logits

    wanted = answer(onednn=False)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(answer(), wanted, **close)
    model.pack()
    torch.testing.assert_close(answer(), wanted, **close)
    used = []
    current = Packed.current
    monkeypatch.setattr(Packed, "current", lambda self: used.append(current(self)) or used[-1])
    answer()
    count = 4 * model.config.num_hidden_layers + 1 + 2 * model.config.projects_embeddings
    assert len(used) == count and all(used)

    layer = model.model.decoder.layers[0]
    for change in ("q_proj", "fc1"):  # of which the first is packed with two others
        used.clear()
        before = answer()
        with torch.no_grad():
            (layer.fc1 if change == "fc1" else layer.self_attn.q_proj).weight.mul_(1.5)
        changed = answer()
        assert not torch.allclose(changed, before, **close)
        assert used.count(False) == (1 if change == "q_proj" else 3)
        torch.testing.assert_close(changed, answer(onednn=False), **close)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, answer(), **close)
    model(ids, labels=ids).loss.backward()
    assert layer.fc1.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not onednn(torch.float32), reason="needs oneDNN")
def test_packed_weights_are_not_mistaken_for_others(tiny):
    """A weight that was packed and then replaced keeps its memory: another one there would pass for it."""
    folder, _ = tiny()
    model = OPTForCausalLM.from_pretrained(folder)
    fc1 = model.model.decoder.layers[0].fc1
    memory = np.ones((fc1.out_features, fc1.in_features), np.float32)
    alive = weakref.ref(memory)
    fc1.weight = torch.nn.Parameter(torch.from_numpy(memory))
    model.pack()
    fc1.weight = torch.nn.Parameter(torch.ones_like(fc1.weight))
    del memory
    assert alive() is not None
    assert not fc1.packed.current()


def test_pack_says_what_it_needs(tiny):
    folder, _ = tiny()
    with pytest.raises(ValueError, match="found a model in float16 on cpu; wanted float32 or bfloat16 on a CPU"):
        OPTForCausalLM.from_pretrained(folder, dtype="float16").pack()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_on_a_cpu(dtype, masked):
    """Is written out, as exactly as PyTorch's own or more so."""
    torch.manual_seed(0)
    by = q, k, v = [torch.randn(2, 3, S, 16, dtype=dtype) * 2 for S in (1, 40, 40)]
    view = (torch.rand(2, 1, 1, 40) < 0.5) if masked else None
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in by), attn_mask=view).transpose(1, 2)
    theirs = torch.nn.functional.scaled_dot_product_attention(*by, attn_mask=view).transpose(1, 2)
    error, limit = (sdpa(q, k, v, view, 0.25, 0.0)[0] - wanted).norm(), (theirs - wanted).norm()
    assert error <= 1.1 * limit + 1e-6 * wanted.norm() * (dtype != torch.float64) + 1e-14 * wanted.norm()


@pytest.mark.skipif(not onednn(torch.float32), reason="needs oneDNN")
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("config", CONFIGS)
def test_step_on_a_cpu(tiny, ids, config, padding):
    """Computes what the modules do, from one token to the next, packed or not."""
    folder, _ = tiny(config)
    model = OPTForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(ids)
    hidden = {"none": [], "left": [0, 1, 2], "right": [10, 11], "holes": [2, 5, 6]}[padding]
    mask[1, hidden] = 0
    for reordered in (False, True):
        if reordered:
            model.pack()
        token = ids[:, 3].clone()
        caches = [model.init_cache(2, 16) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                model(ids, mask, past_key_values=cache)
            assert cpu.can_step(model, token)
            step = cpu.Step(model, caches[0], mask, mask.sum(dim=1), token)
            for i in range(4):
                token.copy_(ids[:, i])
                wanted = model(token[:, None], past_key_values=caches[1]).logits[:, 0]
                torch.testing.assert_close(step(), wanted, atol=1e-5, rtol=1e-5)


def test_generate_goes_by_the_modules_where_they_are_not_plain(tiny, ids, monkeypatch):
    folder, _ = tiny()
    model = OPTForCausalLM.from_pretrained(folder)
    steps = []
    call = cpu.Step.__call__
    monkeypatch.setattr(cpu.Step, "__call__", lambda self: steps.append(1) or call(self))
    wanted = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert len(steps) == (4 if onednn(torch.float32) else 0)
    hook = model.model.decoder.layers[1].fc2.register_forward_hook(lambda module, x, y: -y)
    negated = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    hook.remove()
    model.model.decoder.layers[1].fc2 = torch.nn.Sequential(model.model.decoder.layers[1].fc2)
    assert torch.equal(model.generate(ids, max_new_tokens=5, eos_token_id=[]), wanted)
    assert not torch.equal(negated, wanted)
    assert len(steps) in (0, 4)
