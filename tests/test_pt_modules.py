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
import opt_pt.layers
import opt_pt.model
from opt_pt import OPTForCausalLM
from opt_pt.fast import cpu
from opt_pt.fast.packed import onednn


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


def reordered(model, order):
    """As depth up-scaling and pruning do: copies of layers, numbered anew for the cache."""
    layers = [copy.deepcopy(layer(model, i)) for i in order]
    for i, new in enumerate(layers):
        new.self_attn.layer_idx = i
    model.model.decoder.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


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
    "layers in another order": lambda m: reordered(m, (1, 0, 2)),
    "layers swapped": lambda m: setattr(m.model.decoder, "layers", nn.ModuleList(layer(m, i) for i in (1, 0, 2))),
    "a layer twice": lambda m: reordered(m, (0, 1, 1, 2)),
}


@pytest.fixture
def routes(monkeypatch):
    """Which faster routes were taken: "layer" and "step"."""
    taken = set()
    plain_layer, step = opt_pt.fast.layer.plain_layer, cpu.Step.__call__

    def asked(module, *linears):
        answer = plain_layer(module, *linears)
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


@pytest.mark.parametrize("config", ["pre-norm", "350m", "gelu"])
def test_the_faster_route_learns_as_the_modules_do(tiny, ids, config, routes):
    """In training too: the same dropout, loss and gradients, bit for bit. A hook, which changes nothing, sends a call
    through the modules."""
    model = OPTForCausalLM.from_pretrained(tiny(config)[0]).train()
    for part in model.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.2

    def learned():
        routes.clear()
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = learned()
    assert routes == {"layer"}
    for part in model.model.decoder.layers:
        part.register_forward_hook(lambda *call: None)
    wanted, others = learned()
    assert routes == set()
    assert torch.equal(loss, wanted)
    assert all(torch.equal(gradients[name], others[name]) for name in others)


def test_a_default_device_is_no_reason_to_step_aside(tiny, ids, routes):
    _, ours = pair(tiny)
    with torch.device("cpu"):
        answers(ours, ids)
    assert routes == ({"layer", "step"} if onednn(torch.float32) else {"layer"})


def test_a_layer_twice_without_a_number_of_its_own(tiny, ids):
    """Depth up-scaling by plain copies: the two would share a place in the cache, so there is none."""
    _, ours = pair(tiny)
    ours.model.decoder.layers.insert(2, copy.deepcopy(layer(ours, 1)))
    assert ours(ids).past_key_values is None
    text = ids
    for _ in range(5):
        text = torch.cat([text, ours(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(ids, max_new_tokens=5, eos_token_id=[]), text)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_counts(tiny, ids, change):
    theirs, ours = pair(tiny)
    before = answers(ours, ids)
    for model in (theirs, ours):
        torch.manual_seed(0)
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


@pytest.mark.parametrize("name", ["OPTAttention", "OPTDecoderLayer", "OPTDecoder", "OPTModel", "OPTForCausalLM"])
def test_a_class_patched_counts(tiny, ids, monkeypatch, name):
    """A forward put in place of a class's own, as libraries of kernels do."""
    _, ours = pair(tiny)
    before = answers(ours, ids)
    cls, calls = getattr(opt_pt.model, name), []
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs))
    found = answers(ours, ids)
    agree(found, before)
    assert torch.equal(found[2], before[2])
    modules = sum(type(module) is cls for module in ours.modules())
    # two calls, and five of `generate`; as in transformers, a language model calls its decoder itself
    assert len(calls) == (0 if name == "OPTModel" else modules * (1 + 1 + 5))


def test_subclasses_are_called(tiny, ids):
    """A model, decoder and layer of the user's own, through from_pretrained and generate."""

    class Layer(opt_pt.model.OPTDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) * 0.9

    class Mine(OPTForCausalLM):
        def __init__(self, config, attn_implementation=None):
            super().__init__(config, attn_implementation)
            self.model.decoder.layers[1] = Layer(config, 1)

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.roll(1, dims=-1)
            return out

    theirs, _ = pair(tiny)
    ours = Mine.from_pretrained(tiny()[0])
    layer(theirs).register_forward_hook(lambda module, args, out: out * 0.9)
    theirs.lm_head.register_forward_hook(lambda module, args, out: out.roll(1, dims=-1))
    found, wanted = answers(ours, ids), answers(theirs, ids)
    agree(found, wanted)
    assert torch.equal(found[2], wanted[2])


def test_flops_are_counted(tiny, ids):
    """The faster routes step aside for a dispatch mode."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair(tiny):
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            model(ids)
        counts.append(mode.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no batching rule for sdpa
def test_function_transforms(tiny, ids):
    """functional_call with other weights, and vmap over two sets of them."""
    theirs, ours = pair(tiny)
    found = []
    for model in (theirs, ours):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        stacked = {name: torch.stack([p, p * 1.1]) for name, p in weights.items()}
        with torch.no_grad():
            once = torch.func.functional_call(model, {n: p * 1.1 for n, p in weights.items()}, ids).logits
            call = lambda w, m=model: torch.func.functional_call(m, w, ids, {"use_cache": False}).logits  # noqa: E731
            both = torch.func.vmap(call)(stacked)
        found.append((once, both[1]))
        torch.testing.assert_close(both[1], once, atol=1e-4, rtol=1e-4)
    agree(found[1], found[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_tracing(tiny, ids):
    _, ours = pair(tiny)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, ids):
            return self.model(ids).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), ids)
        other = ids.flip(1)
        torch.testing.assert_close(traced(other), ours(other).logits)
    assert "mkldnn" not in str(traced.inlined_graph)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_weights(tiny, ids, offload, tmp_path):
    """accelerate keeps the weights elsewhere, and a meta tensor in their place, until a module is called."""
    accelerate = pytest.importorskip("accelerate")
    _, ours = pair(tiny)
    wanted = answers(ours, ids)
    if offload == "cpu_offload":
        accelerate.cpu_offload(ours, execution_device="cpu")
    else:
        accelerate.disk_offload(ours, str(tmp_path), execution_device="cpu")
    assert layer(ours).fc1.weight.is_meta
    with torch.no_grad():
        agree([ours(ids).logits] * 2, wanted)
    assert torch.equal(ours.generate(ids, max_new_tokens=5, eos_token_id=[]), wanted[2])


def test_autocast(tiny, ids):
    theirs, ours = pair(tiny)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(ids).logits, theirs(ids).logits
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def test_parameters_own_their_storage(tiny, tmp_path):
    """No parameter is a view of another, so that each can be saved, moved, quantized or sharded alone."""
    import safetensors.torch

    _, ours = pair(tiny)
    storages = [p.untyped_storage().data_ptr() for p in ours.parameters()]
    assert len(set(storages)) == len(storages)
    weight = layer(ours).self_attn.q_proj.weight
    torch.save(weight.detach(), tmp_path / "q.pt")
    assert (tmp_path / "q.pt").stat().st_size < 2 * weight.nbytes
    safetensors.torch.save_model(ours, str(tmp_path / "all.safetensors"))
    assert safetensors.torch.load_file(tmp_path / "all.safetensors").keys() >= {
        "model.decoder.layers.1.self_attn.q_proj.weight"
    }


def test_parts_have_the_exact_types_of_pytorch(tiny):
    """Which quantizers match by."""
    theirs, ours = pair(tiny)
    names = {name: type(module).__name__ for name, module in theirs.named_modules()}
    found = {name: type(module).__name__ for name, module in ours.named_modules()}
    names["model.decoder.embed_positions"] = found["model.decoder.embed_positions"]
    assert found == names
    assert [*found] == [*names], "made in another order"
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name in ("self_attn.q_proj", "fc1", "fc2"):
        assert type(layer(ours).get_submodule(name)) is nn.Linear


ATTENTION = ["embed_dim", "num_heads", "head_dim", "scaling", "layer_idx", "is_causal", "dropout", "enable_bias"]
DECODER = ["dropout", "layerdrop", "padding_idx", "max_target_positions", "vocab_size"]


def test_attributes_of_transformers(tiny):
    models = pair(tiny)
    for path, names in {
        "layers.2.self_attn": ATTENTION,
        "layers.2": ["embed_dim", "do_layer_norm_before", "dropout"],
        "": DECODER,
    }.items():
        theirs, ours = (model.model.decoder.get_submodule(path) for model in models)
        assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
def test_a_layer_is_called_as_in_transformers(tiny, config, mask, grad, rng):
    """With its hidden states and a mask, or none; the attention likewise."""
    folder, reference = tiny(config)
    theirs, ours = copy.deepcopy(reference).float().eval(), OPTForCausalLM.from_pretrained(folder)
    x = torch.from_numpy(rng.normal(size=(2, 7, 64))).float()
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & (torch.arange(7) != 2)
    seen = seen.expand(2, 1, 7, 7) | torch.eye(7, dtype=torch.bool)
    given = {
        "none": None,
        "bool": seen,
        "additive": torch.zeros(2, 1, 7, 7).masked_fill(~seen, torch.finfo(torch.float32).min),
    }[mask]
    with torch.set_grad_enabled(grad):
        for i in (0, 2):
            wanted = layer(theirs, i)(x, attention_mask=given)
            for call in (
                layer(ours, i),
                lambda *a, i=i, **k: opt_pt.layers.runner(ours.model.decoder, layer(ours, i), None)(*a, **k),
            ):
                found = call(x, attention_mask=given)
                assert isinstance(found, torch.Tensor) and found.shape == wanted.shape
                torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
            wanted, _ = layer(theirs, i).self_attn(hidden_states=x, attention_mask=given)
            found, weights = layer(ours, i).self_attn(hidden_states=x, attention_mask=given, position_ids=None)
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
            assert weights is None
            found, weights = layer(ours, i).self_attn(hidden_states=x, attention_mask=given, output_attentions=True)
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))


def test_the_catcher_of_gptq(tiny, ids):
    """Quantizers catch the first layer's input and arguments, then run the layers one by one."""
    _, ours = pair(tiny)
    caught = {}

    class Catcher(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, **kwargs):
            caught.update(kwargs, x=x)
            raise StopIteration

    layers, mask = ours.model.decoder.layers, torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = ours(ids, mask, output_hidden_states=True)
        layers[0] = Catcher(layers[0])
        with pytest.raises(StopIteration):
            ours(ids, mask)
        layers[0] = layers[0].module
        x = caught["x"]
        for i, module in enumerate(layers):
            torch.testing.assert_close(x, wanted.hidden_states[i], atol=1e-5, rtol=1e-5)
            x = module(x, attention_mask=caught["attention_mask"])
        x = ours.lm_head(ours.model.decoder.final_layer_norm(x))
    torch.testing.assert_close(x, wanted.logits, atol=1e-4, rtol=1e-4)
