"""opt_pt among PyTorch's own means of training: compiled, checkpointed, accelerated, and with adapters."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator

from opt_pt import OPTConfig, OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification

SMALL = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_hidden_layers=4, ffn_dim=64,
             max_position_embeddings=64)  # fmt: skip


@pytest.fixture
def ids(rng) -> torch.Tensor:
    return torch.tensor(rng.integers(3, 96, (4, 12)))


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    largest = max(float(g.norm()) for g in wanted.values())
    return max(float((found[name] - g).norm()) for name, g in wanted.items()) / largest


@pytest.mark.parametrize("kind", [OPTForCausalLM, OPTForSequenceClassification, OPTForQuestionAnswering])
def test_trains_compiled_in_one_graph(kind, ids):
    model = kind(OPTConfig(**SMALL, dropout=0.0)).train()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    rows = torch.tensor([0, 1, 1, 0])
    given = {"labels": ids} if kind is OPTForCausalLM else {"labels": rows}
    if kind is OPTForQuestionAnswering:
        given = {"start_positions": rows, "end_positions": rows + 1}

    def loss() -> torch.Tensor:
        return model(ids, mask, **given).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert apart(gradients(model, compiled), gradients(model, loss)) < 1e-5


def test_compiling_does_not_freeze_the_dice(ids):
    """Neither dropout's nor layerdrop's."""
    for options in ({"dropout": 0.0, "layerdrop": 0.5}, {"dropout": 0.5}):
        model = OPTForCausalLM(OPTConfig(**SMALL, **options)).train()
        compiled = torch.compile(lambda model=model: model(ids, labels=ids).loss, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        losses = [float(compiled()) for _ in range(8)]
        assert len(set(losses)) > 2
        torch.manual_seed(0)
        assert [float(compiled()) for _ in range(8)] == losses


@pytest.mark.parametrize("options", [{"dropout": 0.3, "attention_dropout": 0.3}, {"dropout": 0.3, "layerdrop": 0.5}])
def test_checkpointing_draws_the_same_masks_again(options, ids):
    model = OPTForCausalLM(OPTConfig(**SMALL, **options)).train()

    def loss() -> torch.Tensor:
        return model(ids, labels=ids).loss

    wanted, other = gradients(model, loss), gradients(model, loss, seed=1)
    model.gradient_checkpointing_enable()
    assert apart(gradients(model, loss), wanted) < 1e-6 < 1e-2 < apart(other, wanted)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches, backward: Callable) -> None:
    for (batch,) in batches:
        optimizer.zero_grad()
        backward(model(batch, labels=batch).loss)
        optimizer.step()


def test_accelerate(ids, tmp_path):
    """The weights of a plain loop, to the bit."""
    models = [OPTForCausalLM(OPTConfig(**SMALL, dropout=0.0)).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in models]
    steps(models[0], optimizers[0], loader, torch.Tensor.backward)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(models[1], optimizers[1], loader)
    steps(model, optimizer, loader, accelerator.backward)
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_lora(tiny, ids):
    """Adapters on the model as it is: transformers' logits and gradients with the same adapters; merged they stay."""
    folder, reference = tiny("350m")
    wanted = transformers.OPTForCausalLM.from_pretrained(folder)
    models = []
    for model in (OPTForCausalLM.from_pretrained(folder), wanted):
        torch.manual_seed(0)
        options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights="gaussian")
        models.append(peft.get_peft_model(model, options).eval())
    for model in models:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    ours, theirs = models
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    learnt = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == learnt.keys() and all("lora" in name for name in found)
    assert apart(found, learnt) < 1e-5
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        assert torch.allclose(logits, theirs(input_ids=ids).logits, atol=2e-5 * float(logits.abs().max()))
        plain = OPTForCausalLM.from_pretrained(folder).eval()
        assert not torch.allclose(logits, plain(ids).logits, atol=1e-2)
        merged = ours.merge_and_unload()
        assert isinstance(merged, OPTForCausalLM)
        assert torch.allclose(logits, merged(ids).logits, atol=1e-4 * float(logits.abs().max()))
    tokens = [m.generate(input_ids=ids[:, :6], max_new_tokens=6, do_sample=False) for m in (merged, theirs)]
    np.testing.assert_array_equal(tokens[0][:, 6:].numpy(), tokens[1][:, -6:].numpy())


def test_lora_as_a_language_model(tiny, ids):
    """task_type="CAUSAL_LM", as every example of peft has it."""
    folder, _ = tiny()
    model = OPTForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    plain = OPTForCausalLM.from_pretrained(folder)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.allclose(adapted.eval()(**given).logits, plain(**given).logits, atol=1e-5)
    found, wanted = (m.generate(**given, max_new_tokens=4, do_sample=False) for m in (adapted, plain))
    assert torch.equal(found, wanted)


def test_torch_export(ids, tmp_path):
    """Run by PyTorch alone, without opt_pt, for another number of rows."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = OPTForCausalLM(OPTConfig(**SMALL)).eval()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, mask).logits

    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits, rows = Logits(), {0: torch.export.Dim("rows", min=2, max=64)}
    torch.export.save(torch.export.export(logits, (ids, mask), dynamic_shapes=(rows, rows)), tmp_path / "model.pt2")
    given = ids.repeat(2, 1)[:6], mask.repeat(2, 1)[:6]
    torch.save(given, tmp_path / "given.pt")
    program = """
        import sys
        import torch
        folder = sys.argv[1]
        run = torch.export.load(f"{folder}/model.pt2").module()
        torch.save(run(*torch.load(f"{folder}/given.pt")).detach(), f"{folder}/logits.pt")
        assert "opt_pt" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    real = given[1].bool()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt")[real], logits(*given)[real])
