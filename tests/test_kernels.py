"""The decoding step's Triton kernels, in Triton's interpreter where there is no GPU: what they compute, not how fast.

Judged by transformers in float64, one token after another over its own cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import opt_pt.generation.passes
from conftest import CONFIGS, SMALL, make_reference
from opt_common.config import OPTConfig
from opt_common.quantization import Packing, QuantizationConfig
from opt_pt import OPTForCausalLM
from opt_pt.fast.gpu import Step
from opt_pt.quantized import QuantizedLinear

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the compiled kernels")

HALF = torch.float16
ODD = {"hidden_size": 160, "num_attention_heads": 2, "ffn_dim": 144}  # no power of two; heads of 80, as in 2.7b


def models(**changes) -> tuple[OPTForCausalLM, transformers.OPTForCausalLM]:
    """Ours in half precision, and transformers' with the same weights in float64."""
    reference = make_reference(**{"init_std": 0.15, "num_hidden_layers": 2} | changes).to(HALF)
    ours = OPTForCausalLM(OPTConfig.from_dict(reference.config.to_dict())).to(HALF).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference.double()


def padded(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padding in the first row and a hole in the last."""
    ids, mask = torch.randint(3, SMALL["vocab_size"], (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = mask[-1, 4] = 0
    return ids.masked_fill(mask == 0, 1), mask


def excess(
    ours: OPTForCausalLM,
    reference: transformers.OPTForCausalLM,
    B: int,
    T: int,
    new: int = 2,
    plain: OPTForCausalLM | None = None,
) -> float:
    """The error of the steps after a prompt, ‖Δ‖, over that of the forward (of `plain`, or of the same model)."""
    torch.manual_seed(1)
    ids, mask = padded(B, T)
    texts = torch.cat([ids, torch.randint(3, SMALL["vocab_size"], (B, new))], dim=1)
    seen = torch.cat([mask, torch.ones(B, new, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        wanted = reference(texts, attention_mask=seen, use_cache=False).logits[:, T:]
        forward = (plain or ours)(texts, seen).logits[:, T:].double()
        cache = ours.init_cache(B, T + new)
        ours.model(ids, mask, past_key_values=cache)
        token = torch.empty(B, dtype=torch.long)
        step, found = Step(ours, cache, mask, mask.sum(dim=1), token), []
        for i in range(new):
            token.copy_(texts[:, T + i])
            found.append(step().double().clone())
            step.position += 1
            step.slot += 1
    return float((torch.stack(found, dim=1) - wanted).norm() / (forward - wanted).norm())


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_one", lambda M, K: (64, 32, 4))


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("config", [*CONFIGS, "odd"])
def test_a_step_is_as_exact_as_the_forward(config, B):
    deep = {} if config in ("pre-norm", "350m", "odd") else {"num_hidden_layers": 1}  # the interpreter is slow
    ours, reference = models(**(ODD if config == "odd" else CONFIGS[config]) | deep)
    assert excess(ours, reference, B, 9, new=2 if not deep else 1) < 1.5  # they round at different places


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("name", ["self_attn.v_proj.weight", "fc2.bias", "final_layer_norm.weight"])
def test_a_disturbed_weight_shows(name, B):
    ours, reference = models()
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        changed.model.decoder.layers[1].get_parameter(name)[5] += 0.2
    assert excess(changed, reference, B, 9, plain=ours) > 3


@pytest.mark.parametrize("early, splits", [(0, 3), (1, 1), (2, 1), (2, 2)])
def test_one_product_is_shared_out(early, splits, monkeypatch):
    """Among several programs for the same outputs, of which the last to arrive sums up; 176 / 3 is no whole tile."""
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_many", lambda *arguments: (16, 64, 16, 4, 2, early, splits))
    ours, reference = models(**ODD | {"ffn_dim": 176})
    assert excess(ours, reference, 3, 9) < 1.5


def test_a_long_cache_is_shared_out(monkeypatch):
    """Among several programs a head, of which the last to arrive sums up."""
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_attend", lambda B, N, slots: (16, 4, 4))
    ours, reference = models(max_position_embeddings=256)
    assert excess(ours, reference, 2, 150) < 1.5


@pytest.mark.parametrize("config", ["350m", "odd"])
def test_several_tokens_of_a_text_in_one_step(config, monkeypatch):
    """As exact as the forward over all of them; the second step begins where only two of the first three were right."""
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_attend", lambda B, N, slots: (16, 4, 2))
    ours, reference = models(**(ODD if config == "odd" else CONFIGS[config]))
    ids, mask = padded(1, 20)
    texts = torch.cat([ids, torch.randint(3, SMALL["vocab_size"], (1, 5))], dim=1)
    seen = torch.cat([mask, torch.ones(1, 5, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        wanted = reference(texts, attention_mask=seen, use_cache=False).logits[:, 20:]
        forward = ours(texts, seen).logits[:, 20:].double()
        cache, token = ours.init_cache(1, 26), torch.empty(3, dtype=torch.long)
        ours.model(ids, mask, past_key_values=cache)
        step = Step(ours, cache, mask, mask.sum(dim=1), token, tail=3)
        token.copy_(torch.tensor([*texts[0, 20:22], 5]))
        first = step()[:2].double().clone()
        step.position += 2
        step.slot += 2
        token.copy_(texts[0, 22:])
        found = torch.cat([first, step().double()])[None]
    assert (found - wanted).norm() / (forward - wanted).norm() < 1.5


def test_rows_that_share_a_cache():
    """What a row sees by its table is what it would see in a cache of its own."""
    ours, _ = models()
    ids, mask = padded(3, 9)
    rows = torch.tensor([0, 2, 0])
    with torch.inference_mode():
        logits = []
        for shared in (True, False):
            cache, token = ours.init_cache(3, 12), torch.tensor([7, 8, 9])
            ours.model(ids, mask.new_ones(3, 9), past_key_values=cache)
            table = torch.arange(3, dtype=torch.int32)[:, None].repeat(1, 12)
            if shared:
                table[:, 4:9] = table[rows, 4:9]
            else:
                for tensor in (*cache.k, *cache.v):
                    tensor[:, :, 4:9] = tensor[rows, :, 4:9]
            step = Step(ours, cache, mask.new_ones(3, 9), torch.full((3,), 9), token, table)
            logits.append(step().clone())
            step.position += 1
            step.slot += 1
            logits.append(step().clone())
    assert torch.equal(torch.stack(logits[:2]), torch.stack(logits[2:]))
    assert not torch.equal(logits[0][1], logits[0][2])


def packed_models(bits: int, group: int, **changes) -> tuple[OPTForCausalLM, transformers.OPTForCausalLM]:
    """Ours with Linears of few bits, and transformers' with their floats in float64."""
    changes = {"hidden_size": 128, "ffn_dim": 192, "num_hidden_layers": 2} | changes
    reference = make_reference(init_std=0.15, **changes).to(HALF)
    packing = QuantizationConfig.rounding(bits, group)
    ours = OPTForCausalLM(OPTConfig.from_dict(reference.config.to_dict() | {"quantization_config": packing.to_dict()}))
    ours.to(HALF).eval().load_state_dict(reference.state_dict(), strict=False)
    reference.double()
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            reference.get_submodule(name).weight.data = module.double().dequantize()
            module.to(HALF)
    return ours, reference


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    "bits, group, config", [(8, None, "350m"), (4, 32, "350m"), (4, 64, "odd"), (8, 32, "no-bias")]
)
def test_few_bits(bits, group, config, B, monkeypatch):
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_quantized_one", lambda M, K, bits: (64, 16, 4))
    changes = {"hidden_size": 192, "num_attention_heads": 2} if config == "odd" else CONFIGS[config]
    new = 2 if config == "350m" else 1
    if new == 1:
        changes = changes | {"num_hidden_layers": 1}  # the interpreter is slow
    ours, reference = packed_models(bits, group, **changes)
    assert excess(ours, reference, B, 9, new) < 1.5
    changed = copy.deepcopy(ours)
    with torch.no_grad():
        changed.model.decoder.layers[-1].self_attn.out_proj.weight_packed[5] ^= 0x77777777
    assert excess(changed, reference, B, 9, new, plain=ours) > 3


@pytest.mark.parametrize("early, splits", [(0, 3), (1, 1), (2, 2)])
def test_a_product_of_few_bits_is_shared_out(early, splits, monkeypatch):
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_quantized_many", lambda *arguments: (16, 64, 4, 2, early, splits))
    ours, reference = packed_models(4, 32, ffn_dim=160, num_hidden_layers=1)
    assert excess(ours, reference, 3, 9) < 1.5


@pytest.mark.parametrize("bits, group", [(8, None), (8, 4), (4, 32), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unpacking_gives_the_same_bits(bits, group, dtype):
    """As PyTorch's operations, which run here: the words are more than one block, and not whole blocks."""
    from opt_pt.fast.floats import unpacked

    linear = QuantizedLinear(96, 200, Packing(bits, group)).to(HALF)
    linear.reset_parameters()
    linear.weight_scale.data.uniform_(-1, 1)
    found = unpacked(linear.weight_packed, linear.weight_scale, bits, dtype)
    assert torch.equal(found, linear.dequantize(dtype))
    linear.weight_packed[7, 3] ^= 1 << 31
    assert not torch.equal(found, linear.dequantize(dtype))


def test_generate(monkeypatch):
    """Every step through the kernels gives the texts of the plain loop; without a GPU there is no graph."""
    ours, _ = models(num_hidden_layers=1)
    ids, mask = padded(3, 7)
    eos = ours.generate(ids, mask, max_new_tokens=6)[range(3), [9, 9, 7]].tolist()
    calls = [
        {},
        {"eos_token_id": eos},
        {"eos_token_id": eos, "min_new_tokens": 4},
        {"eos_token_id": []},
        {"do_sample": True, "seed": 1, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "seed": 2, "top_k": 0, "temperature": 3.0},
    ]
    plain = [ours.generate(ids, mask, max_new_tokens=6, **call) for call in calls]
    used = []
    monkeypatch.setattr("opt_pt.fast.gpu.can_step", lambda model, token: True)
    monkeypatch.setattr(opt_pt.generation.passes, "_captured", lambda turn, rng: used.append(turn) or turn)
    monkeypatch.setattr(Step, "compile", lambda *arguments: None)
    for call, wanted in zip(calls, plain, strict=True):
        assert torch.equal(ours.generate(ids, mask, max_new_tokens=6, **call), wanted), call
    assert len(used) == sum(text.shape[1] > 7 + 2 for text in plain) >= 5  # else there is nothing to replay
    assert plain[1].shape[1] < plain[0].shape[1], "no case ended early"


WAYS = {
    "beams": dict(num_beams=3, num_return_sequences=2, eos_token_id=[5, 44]),
    "beam sampling": dict(num_beams=2, do_sample=True, seed=1),
    "several draws": dict(num_return_sequences=3, do_sample=True, seed=3, repetition_penalty=1.3),
    "callback": dict(logits_processor=lambda ids, scores: scores.roll(int(ids[0, -1]), dims=1)),
    "lookup": dict(prompt_lookup_num_tokens=3),
    "long drafts": dict(prompt_lookup_num_tokens=20),
    "speculative": dict(num_assistant_tokens=2, do_sample=True, seed=5),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_generate(way, monkeypatch):
    """As the loop without kernels: the text, and the cache."""
    ours, _ = models(num_hidden_layers=1)
    ids, mask = padded(2, 7)
    options = dict(WAYS[way])
    if "num_assistant_tokens" in options:
        options["assistant_model"] = ours
    if {"assistant_model", "prompt_lookup_num_tokens"} & options.keys():
        ids, mask = ids[1:].repeat(1, 2), mask[1:].repeat(1, 2)
    given = dict(attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True) | options
    wanted = ours.generate(ids, **given)
    monkeypatch.setattr("opt_pt.fast.gpu.can_step", lambda model, token: True)
    monkeypatch.setattr("opt_pt.fast.gpu.tiles_attend", lambda B, N, slots: (16, 4, 1))
    monkeypatch.setattr(opt_pt.generation.passes, "_captured", lambda turn, rng: turn)
    monkeypatch.setattr(Step, "compile", lambda *arguments, **options: None)
    found = ours.generate(ids, **given)
    assert torch.equal(found.sequences, wanted.sequences)
    for (k, v), (other_k, other_v) in zip(found.past_key_values, wanted.past_key_values, strict=True):
        torch.testing.assert_close(k, other_k, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(v, other_v, atol=2e-2, rtol=2e-2)
