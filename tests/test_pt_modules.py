"""The modules are the model: whatever is done to one shows in `forward` and in `generate`, as it does in transformers.

Each case does the same to a transformers OPT and to ours. The faster routes (opt_pt/fast) are on; that they run at all
when nothing is done is asserted first."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import opt_pt.fast.layer
from opt_pt import OPTForCausalLM
from opt_pt.fast import cpu
from opt_pt.fast.products import onednn


def layer(model, i=1):
    return model.model.decoder.layers[i]


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.05


class Adapter(nn.Module):
    """A low-rank adapter around a Linear, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.a = base, nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def replaced(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        module = layer(model).get_submodule(parent)
        setattr(module, name, make(getattr(module, name)))

    return change


def subclassed(linear):
    new = Doubled(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    new.load_state_dict(linear.state_dict())
    return new


def patched(module, forward):
    module.forward = types.MethodType(forward, module)


def negate_output(module, args, out):
    return (-out[0], *out[1:]) if isinstance(out, tuple) else -out


def half_input(module, args):
    return tuple(x * 0.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)


def negate_relus(module, args, out):
    return -out if isinstance(module, nn.ReLU) else None


def rounded(model):
    """Quantized in place, as round-to-nearest quantizers do."""
    with torch.no_grad():
        for f in model.modules():
            if isinstance(f, nn.Linear):
                f.weight.copy_((f.weight * 8).round() / 8)


CHANGES = {
    "forward hook on a layer": lambda m: layer(m).register_forward_hook(negate_output),
    "forward hook on attention": lambda m: layer(m).self_attn.register_forward_hook(negate_output),
    "forward hook on q_proj": lambda m: layer(m).self_attn.q_proj.register_forward_hook(negate_output),
    "forward hook on fc2": lambda m: layer(m).fc2.register_forward_hook(negate_output),
    "forward hook on the activation": lambda m: layer(m).activation_fn.register_forward_hook(negate_output),
    "forward hook on a norm": lambda m: layer(m).final_layer_norm.register_forward_hook(negate_output),
    "forward hook on the head": lambda m: m.lm_head.register_forward_hook(negate_output),
    "forward hook on the embedding": lambda m: m.model.decoder.embed_tokens.register_forward_hook(negate_output),
    "forward hook on positions": lambda m: m.model.decoder.embed_positions.register_forward_hook(negate_output),
    "forward hook on the final norm": lambda m: m.model.decoder.final_layer_norm.register_forward_hook(negate_output),
    "pre-hook on fc1": lambda m: layer(m).fc1.register_forward_pre_hook(half_input),
    "pre-hook on a layer": lambda m: layer(m).register_forward_pre_hook(half_input),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(negate_relus),
    "forward patched on fc1": lambda m: patched(layer(m).fc1, lambda self, x: nn.Linear.forward(self, x) * 2),
    "forward patched on the head": lambda m: patched(m.lm_head, lambda self, x: nn.Linear.forward(self, x) * x.mean()),
    "subclass of Linear": replaced("self_attn.k_proj", subclassed),
    "adapter on v_proj": replaced("self_attn.v_proj", Adapter),
    "adapter on the head": lambda m: setattr(m, "lm_head", Adapter(m.lm_head)),
    "another activation": replaced("activation_fn", lambda old: nn.GELU()),
    "no norm": replaced("self_attn_layer_norm", lambda old: nn.Identity()),
    "no bias": lambda m: setattr(layer(m).fc1, "bias", None),
    "sequence for fc2": replaced("fc2", lambda old: nn.Sequential(old, nn.Tanh())),
    "parametrized": lambda m: parametrize.register_parametrization(layer(m).fc1, "weight", Shifted()),
    "pruned": lambda m: prune.l1_unstructured(layer(m).fc1, "weight", amount=0.5),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(layer(m).fc2),
    "rounded": rounded,
    "fewer layers": lambda m: m.model.decoder.layers.__delitem__(1),
    "layers in another order": lambda m: m.model.decoder.layers.__setitem__(slice(0, 2), [layer(m, 1), layer(m, 0)]),
    "a layer replaced": lambda m: m.model.decoder.layers.__setitem__(2, copy.deepcopy(layer(m, 0))),
}


@pytest.fixture
def routes(monkeypatch):
    """Which faster routes were taken: "layer" and "step"."""
    taken = set()
    plain_layer, step = opt_pt.fast.layer.plain_layer, cpu.Step.__call__

    def asked(module):
        answer = plain_layer(module)
        taken.update(["layer"] * answer)
        return answer

    monkeypatch.setattr(opt_pt.fast.layer, "plain_layer", asked)
    monkeypatch.setattr(cpu.Step, "__call__", lambda self: taken.add("step") or step(self))
    return taken


def answers(model, ids):
    """The logits with and without gradients, and greedy text."""
    with torch.no_grad():
        quiet = model(ids).logits
    learning = model(ids).logits.detach()
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=[])
    return quiet, learning, text


def pair(tiny):
    """A transformers OPT in float32, and ours."""
    folder, reference = tiny()
    return copy.deepcopy(reference).float().eval(), OPTForCausalLM.from_pretrained(folder)


def agree(found, wanted):
    scale = wanted[0].abs().max()
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert float((a - b).abs().max()) < 2e-5 * float(scale)


@pytest.fixture
def ids(rng):
    return torch.from_numpy(rng.integers(3, 96, (2, 9)))


def test_the_faster_routes_are_taken_where_nothing_is_changed(tiny, ids, routes):
    theirs, ours = pair(tiny)
    agree(answers(ours, ids), answers(theirs, ids))
    assert routes == ({"layer", "step"} if onednn(torch.float32) else {"layer"})


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_counts(tiny, ids, change):
    theirs, ours = pair(tiny)
    before = answers(ours, ids)
    for model in (theirs, ours):
        handle = CHANGES[change](model)
        try:
            result = answers(model, ids)
        finally:
            if change == "global hook":
                handle.remove()
        if model is theirs:
            wanted = result
    agree(result, wanted)
    assert torch.equal(result[2], wanted[2])
    assert float((result[0] - before[0]).abs().max()) > 1e-3, "the case changes nothing"
