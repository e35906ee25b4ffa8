"""opt_pt over several processes: two on the CPU stand for two GPUs. The judge is the model in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import CONFIGS, make_reference, save_reference
from opt_common.checkpoints.convert import convert
from opt_common.quantization import QuantizationConfig
from opt_pt import OPTForCausalLM

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from opt_pt import OPTForCausalLM

folder, out = sys.argv[1:]
model = OPTForCausalLM.from_pretrained(folder, tp_plan="auto")
ids = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 11, 12, 13]])
mask = (ids != 1).long()
found = {"shapes": {n: list(p.shape) for n, p in model.named_parameters() if "layers.1." in n}}
found["logits"] = model(ids, mask).logits.tolist()
found["greedy"] = model.generate(ids, mask, max_new_tokens=8, eos_token_id=[]).tolist()
found["beams"] = model.generate(ids, mask, max_new_tokens=8, num_beams=3).tolist()
torch.manual_seed(dist.get_rank())
found["sampled"] = model.generate(ids, mask, max_new_tokens=8, do_sample=True, temperature=3.0, top_k=0).tolist()
if "packed" not in folder:
    model(ids, mask, labels=ids).loss.backward()
    layer = model.model.decoder.layers[0]
    found["grad_embed"] = model.model.decoder.embed_tokens.weight.grad.tolist()
    found["grad_bias"] = layer.self_attn.out_proj.bias.grad.tolist()
    found["grad_fc1"] = layer.fc1.weight.grad.tolist()
model.save_pretrained(out)
json.dump(found, open(f"{out}.{dist.get_rank()}.json", "w"))
"""


def run(folder: Path, tmp_path: Path, processes: int = 2) -> list[dict]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, script, folder, tmp_path / "out"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]
    return [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("case", ["pre-norm", "350m", "packed-4", "packed-8"])
def test_two_processes(case, tmp_path):
    packed = case.startswith("packed")
    changes = {"hidden_size": 64, "ffn_dim": 128} if packed else CONFIGS[case]
    reference = make_reference(init_std=0.2, **changes).float()
    folder = save_reference(reference, tmp_path / "checkpoint")
    if packed:
        convert(folder, tmp_path / case, quantization=QuantizationConfig.rounding(int(case[-1]), 32))
        folder = tmp_path / case
    found = run(folder, tmp_path)

    one = OPTForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 1, 11, 12, 13]])
    mask = (ids != 1).long()
    with torch.no_grad():
        logits = one(ids, mask).logits
    half = {"q_proj", "k_proj", "v_proj", "fc1", "out_proj", "fc2"}
    for name, shape in found[0]["shapes"].items():
        whole = one.get_parameter(name)
        part = name.split(".")[-2]
        if part in half and not (name.endswith("bias") and part in ("out_proj", "fc2")) and whole.shape[-1] > 1:
            assert 2 * torch.Size(shape).numel() == whole.numel(), name
    for each in found:
        torch.testing.assert_close(torch.tensor(each["logits"]), logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
        assert each["greedy"] == one.generate(ids, mask, max_new_tokens=8, eos_token_id=[]).tolist()
        assert each["beams"] == one.generate(ids, mask, max_new_tokens=8, num_beams=3).tolist()
    assert found[0]["sampled"] == found[1]["sampled"]
    if not packed:
        one(ids, mask, labels=ids).loss.backward()
        layer = one.model.decoder.layers[0]
        for each in found:
            for name, grad in (("grad_embed", one.model.decoder.embed_tokens), ("grad_bias", layer.self_attn.out_proj)):
                wanted = (grad.weight if name == "grad_embed" else grad.bias).grad
                torch.testing.assert_close(torch.tensor(each[name]), wanted, rtol=1e-4, atol=1e-6)
        together = torch.cat([torch.tensor(each["grad_fc1"]) for each in found])
        torch.testing.assert_close(together, layer.fc1.weight.grad, rtol=1e-4, atol=1e-6)
    again = OPTForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, x in OPTForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(again[name], x), name
