"""opt_pt over several processes: two on the CPU stand for two GPUs. The judge is the model in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import random_checkpoint, tiny_config
from commands import opt_zoo, process
from conftest import CONFIGS, make_reference, save_reference
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.open import open_checkpoint
from opt_common.frameworks import registered
from opt_common.quantization import QuantizationConfig
from opt_common.weights import table
from opt_pt import OPTForCausalLM, parallel
from opt_pt.launch import launch

CASES = ["pre-norm", "350m", "packed-4", "packed-8"]
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
later = lambda ids, scores, **_: ids.shape[1] >= 7 + 4 * dist.get_rank()
found["stopped"] = model.generate(ids, mask, max_new_tokens=8, stopping_criteria=[later], eos_token_id=[]).tolist()
if "packed" not in folder:
    model(ids, mask, labels=ids).loss.backward()
    layer = model.model.decoder.layers[0]
    found["grad_embed"] = model.model.decoder.embed_tokens.weight.grad.tolist()
    found["grad_bias"] = layer.self_attn.out_proj.bias.grad.tolist()
    found["grad_fc1"] = layer.fc1.weight.grad.tolist()
model.save_pretrained(out)
json.dump(found, open(f"{out}.{dist.get_rank()}.json", "w"))
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


# What torchrun does, but for its seconds of imports: pairs of new processes, one pair after the other, which are forks
# of one that has imported PyTorch and done nothing. Under torchrun itself run the tests of the command, below.
FORKS = """
import json, os, runpy, signal, socket, sys
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, typer
import opt_pt

for arguments in json.loads(sys.argv[1]):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
            sys.exit()
    for _ in range(2):
        pid, status = os.wait()
        pids.remove(pid)
        if status:
            [os.kill(pid, signal.SIGKILL) for pid in pids]
            sys.exit(1)
"""


def two_processes(*programs: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """Each program, with its arguments, by two processes; each pair after the one before."""
    given = json.dumps([[str(argument) for argument in program] for program in programs])
    ran = subprocess.run([sys.executable, "-c", FORKS, given], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[:6000]
    return ran


def run(source: str, folders: list[Path], outs: list[Path]) -> list[list[dict]]:
    """What both processes of a script write to OUT.RANK.json, for each folder."""
    script = outs[0].with_name("script.py")
    script.write_text(source)
    two_processes(*((script, folder, out) for folder, out in zip(folders, outs, strict=True)))
    return [[json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(2)] for out in outs]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, tuple[Path, Path, list[dict]]]:
    """By case, the checkpoint, the one that two processes saved, and what they found."""
    folders, outs = [], []
    for case in CASES:
        packed, tmp_path = case.startswith("packed"), tmp_path_factory.mktemp("both")
        changes = {"hidden_size": 64, "ffn_dim": 128} if packed else CONFIGS[case]
        folder = save_reference(make_reference(init_std=0.2, **changes).float(), tmp_path / "checkpoint")
        if packed:
            convert(folder, tmp_path / case, quantization=QuantizationConfig.rounding(int(case[-1]), 32))
            folder = tmp_path / case
        folders.append(folder)
        outs.append(tmp_path / "out")
    found = run(SCRIPT, folders, outs)
    return dict(zip(CASES, zip(folders, outs, found, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, both):
    packed = case.startswith("packed")
    folder, out, found = both[case]
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
    assert found[0]["stopped"] == found[1]["stopped"] == [row[:7] for row in found[0]["greedy"]]
    if not packed:
        one(ids, mask, labels=ids).loss.backward()
        layer = one.model.decoder.layers[0]
        for each in found:
            for name, grad in (("grad_embed", one.model.decoder.embed_tokens), ("grad_bias", layer.self_attn.out_proj)):
                wanted = (grad.weight if name == "grad_embed" else grad.bias).grad
                torch.testing.assert_close(torch.tensor(each[name]), wanted, rtol=1e-4, atol=1e-6)
        together = torch.cat([torch.tensor(each["grad_fc1"]) for each in found])
        torch.testing.assert_close(together, layer.fc1.weight.grad, rtol=1e-4, atol=1e-6)
    again = OPTForCausalLM.from_pretrained(out).state_dict()
    for name, x in OPTForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(again[name], x), name


# === Loading a part ===


@pytest.mark.parametrize("layout", ["safetensors", "torch", "flax-msgpack"])
def test_parts_of_a_file(layout, tmp_path):
    """What four processes read is the whole; of a layout that stores numbers in order, nothing twice but what all
    have."""
    config = tiny_config(hidden_size=64, ffn_dim=256, num_attention_heads=4)
    random_checkpoint(tmp_path, config, layout=layout)
    opened = open_checkpoint(tmp_path)
    for spec in table(config):
        entry = opened.checkpoint[opened.names[spec.name]]
        indices = [parallel.index(spec, rank, 4) for rank in range(4)]
        assert (None in indices) == (parallel.shape(spec, 4) == spec.shape)
        for copied in (False, True):
            found = np.zeros_like(entry.read())
            for index in indices:
                if index is not None:
                    found[index] += entry.part(index, copied)
            assert None in indices or np.array_equal(found, entry.read()), spec.name
        assert (entry.cut is None) == (layout == "flax-msgpack")


LOADING = """
import json, re, sys
from pathlib import Path
import torch.distributed as dist
from opt_pt import OPTForCausalLM

folder, out = sys.argv[1:]
counts = lambda: {name: int(n) for name, n in re.findall(r"(\\w+):\\s*(\\d+)", "".join(
    Path(f"/proc/self/{file}").read_text() for file in ("io", "status")))}
OPTForCausalLM.from_pretrained(out + ".tiny", tp_plan="auto")  # what is allocated once
Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
before = counts()
model = OPTForCausalLM.from_pretrained(folder, tp_plan="auto")
after = counts()
found = {"read": after["rchar"] - before["rchar"], "peak": 1024 * (after["VmHWM"] - before["VmRSS"])}
found["own"] = sum(p.nbytes for p in model.parameters())
try:
    OPTForCausalLM.from_pretrained(folder if dist.get_rank() else out + ".tiny", tp_plan="auto")
except ValueError as error:
    found["config"] = str(error)
try:
    OPTForCausalLM.from_pretrained(out + (".other" if dist.get_rank() else ".tiny"), tp_plan="auto")
except ValueError as error:
    found["weights"] = str(error)
json.dump(found, open(f"{out}.{dist.get_rank()}.json", "w"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux what a process has read")
def test_each_process_reads_its_part(tmp_path):
    """And holds little more than that; different checkpoints are one sentence."""
    config = tiny_config(hidden_size=1024, ffn_dim=4096, num_attention_heads=4, num_hidden_layers=4)
    random_checkpoint(tmp_path / "checkpoint", config)
    random_checkpoint(tmp_path / "out.tiny", tiny_config())
    random_checkpoint(tmp_path / "out.other", tiny_config(), seed=1)
    size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    (both,) = run(LOADING, [tmp_path / "checkpoint"], [tmp_path / "out"])
    for rank, found in enumerate(both):
        assert found["read"] < 0.51 * size  # rows; Linux does not count columns, which are mapped
        assert found["peak"] < found["own"] + 25_000_000  # half a matrix, read and turned into float32, is 12 MB
        assert re.search(r"found \w+ \d+ in process 1, wanted \d+, as in process 0", found["config"]), rank
        assert "found weights of digest" in found["weights"] and "in process 1" in found["weights"]


# === FSDP2 ===

ROWS = [[5, 6, 7, 8, 9, 10], [4, 7, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35]]
FULLY_SHARDED = f"""
import json, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from opt_pt import OPTForCausalLM

folder, out = sys.argv[1:]
dist.init_process_group("gloo")
rank, ids = dist.get_rank(), torch.tensor({ROWS})
mine = ids[2 * rank : 2 * rank + 2]


def shard(model, **how):
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)), **how)
    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)), **how).train()


def step(model, optimizer):
    loss = model(mine, labels=mine).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def whole(model):
    return {{name: x.full_tensor() for name, x in model.state_dict().items()}}


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-3)


found = {{}}
model = shard(OPTForCausalLM.from_pretrained(folder, dropout=0.0))
model.gradient_checkpointing_enable()
optimizer = adam(model)
found["losses"] = [step(model, optimizer) for _ in range(2)]
ours, its = states.get_state_dict(model, optimizer)
checkpoint.save({{"model": ours, "optimizer": its}}, checkpoint_id=out + ".training")
model.save_pretrained(out)
found["losses"].append(step(model, optimizer))

with torch.device("meta"):
    other = OPTForCausalLM(model.config)
other = shard(other).to_empty(device="cpu")
found["tied"] = other.lm_head.weight is other.model.decoder.embed_tokens.weight
start = OPTForCausalLM.from_pretrained(folder).state_dict() if rank == 0 else {{}}
options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
states.set_model_state_dict(other, start, options=options)
start = OPTForCausalLM.from_pretrained(folder).state_dict()
found["loaded"] = all(torch.equal(x, start[name]) for name, x in whole(other).items())
optimizer = adam(other)
ours, its = states.get_state_dict(other, optimizer)
checkpoint.load({{"model": ours, "optimizer": its}}, checkpoint_id=out + ".training")
states.set_state_dict(other, optimizer, model_state_dict=ours, optim_state_dict=its)
step(other, optimizer)
resumed = whole(other)
found["resumed"] = all(torch.equal(x, resumed[name]) for name, x in whole(model).items())

half = shard(OPTForCausalLM.from_pretrained(folder, dropout=0.0),
             mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
found["half_loss"] = half(ids, labels=ids).loss.item()
half.eval()(ids)  # leaves the root's weights whole, in bfloat16
half.save_pretrained(out + ".half", is_main_process=rank == 0)
try:
    half.save_pretrained(sys.executable)
except (OSError, RuntimeError) as error:
    found["not_written"] = str(error)
model = shard(OPTForCausalLM.from_pretrained(folder)).eval()
new = 4 + 5 * rank  # the processes write texts of two lengths
found["greedy"] = model.generate(ids[:2], max_new_tokens=new, eos_token_id=[]).tolist()
found["beams"] = model.generate(ids[:2], max_new_tokens=4 + 3 * rank, num_beams=2, eos_token_id=[]).tolist()
try:
    model.generate(ids[:1], assistant_model=model, max_new_tokens=3)
except ValueError as error:
    found["draft"] = str(error)
json.dump(found, open(f"{{out}}.{{rank}}.json", "w"))
dist.destroy_process_group()
"""


def test_fully_sharded(tmp_path):
    """Three steps on half a batch each are three on the batch; saved, loaded from nothing and resumed bit for bit."""
    folder = save_reference(make_reference(4, init_std=0.2, **CONFIGS["350m"]).float(), tmp_path / "checkpoint")
    (found,) = run(FULLY_SHARDED, [folder], [tmp_path / "out"])
    one, ids = OPTForCausalLM.from_pretrained(folder, dropout=0.0).train(), torch.tensor(ROWS)
    optimizer = torch.optim.AdamW(one.parameters(), 1e-2, eps=1e-3)
    losses, saved = [], OPTForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for step in range(3):
        loss = one(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1:
            for name, x in one.state_dict().items():
                torch.testing.assert_close(saved[name], x.detach(), rtol=0, atol=2e-5 * float(x.abs().max()))
    assert [sum(pair) / 2 for pair in zip(*(f["losses"] for f in found), strict=True)] == pytest.approx(losses, 2e-5)
    start = OPTForCausalLM.from_pretrained(folder)
    half = OPTForCausalLM.from_pretrained(tmp_path / "out.half")
    assert all(torch.equal(half.state_dict()[name], x) for name, x in start.state_dict().items())
    assert start(ids, labels=ids).loss.item() == pytest.approx(found[0]["half_loss"], rel=0.02)
    for rank, each in enumerate(found):
        assert each["tied"] and each["loaded"] and each["resumed"]
        for kind, new, beams in (("greedy", 4 + 5 * rank, 1), ("beams", 4 + 3 * rank, 2)):
            wanted = start.generate(ids[:2], max_new_tokens=new, num_beams=beams, eos_token_id=[])
            assert each[kind] == wanted.tolist(), (rank, kind)
        assert each["draft"].startswith("assistant_model: found weights spread over the processes")
    assert "is a file, wanted a folder" in found[0]["not_written"]
    assert found[1]["not_written"].startswith("save_pretrained: the first process failed: ")


def test_the_example_of_fully_sharded_training(tmp_path):
    """Broken off behind its first save and started again, it gives the weights of a run that was not."""
    text = tmp_path / "text.txt"
    text.write_text("The king had a daughter who was beautiful beyond all measure. " * 40)
    example = Path(__file__).parents[1] / "examples" / "fsdp_pt.py"
    options = ("--save-every", 2, "--rows", 2, "--tokens", 16)
    ran = two_processes(
        *(
            (example, text, tmp_path / out, "--steps", n, *options)
            for out, n in (("whole", 4), ("broken", 2), ("broken", 4))
        )
    )
    starts = [line for line in ran.stdout.splitlines() if line.startswith("step ") and " of " in line]
    assert starts == ["step 0 of 4", "step 0 of 2", "step 2 of 4"]
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "broken")]
    assert weights[0] == weights[1]


# FSDP2 keeps, in defaults, the group that there is when it is imported. Where a thread of gloo outlives the
# interpreter, about one process in twelve aborts.
LEAVING = """
import sys
from pathlib import Path
from opt_pt import OPTForCausalLM, parallel

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

OPTForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", device="cpu").generate([[5, 6, 7]], max_new_tokens=2)
assert "torch.distributed.fsdp" not in sys.modules
import torch.distributed.fsdp
assert "pt_gloo_runloop" in threads()
parallel.leave()
assert "pt_gloo_runloop" not in threads()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds threads by their names, as on Linux")
def test_leaving_ends_the_threads(tmp_path, monkeypatch):
    folder = save_reference(make_reference(), tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    ran = subprocess.run([sys.executable, "-c", LEAVING, str(folder)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


# === The command ===

GENERATE = ["generate", "--device", "cpu"]


def test_the_command_on_two_devices():
    arguments = [*GENERATE, "Once upon a time", "The king", "--max-new-tokens", 20]
    texts = [opt_zoo(*arguments), process(*arguments, "--devices", 2)]
    assert [ran.returncode for ran in texts] == [0, 0], texts[1].stderr
    assert texts[0].stdout == texts[1].stdout != ""


@pytest.mark.parametrize(
    ("end", "more"),
    [
        (signal.SIGKILL, ". If you did not kill it, the host has run out of memory"),
        (signal.SIGABRT, ": terminate called"),
    ],
)
def test_why_a_process_was_killed(end, more, tmp_path):
    """Only a SIGKILL is what the system ends a process by that takes too much memory."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys, time
if os.environ["RANK"] == "1":
    print("terminate called", file=sys.stderr, flush=True)
    os.kill(os.getpid(), {int(end)})
time.sleep(60)
""")
    with pytest.raises(ChildProcessError) as error:
        launch([str(script)], 2)
    assert str(error.value).startswith(f"process 1 of 2 was killed ({end.name}), and the others ended with it{more}. ")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by its environment, as on Linux")
@pytest.mark.parametrize(("way", "victim"), [("--devices", 1), ("torchrun", 0)])
def test_a_killed_process_ends_all(way, victim, tmp_path):
    """In seconds and with one message; started again, all goes on, and the file is that of one process."""
    prompts, out, one = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "one.jsonl"
    prompts.write_text("".join(json.dumps(f"Once upon {i} times") + "\n" for i in range(24)))
    arguments = ["--file", prompts, "--batch-size", 2, "--max-new-tokens", 40]
    arguments = [*GENERATE, *map(str, arguments), "--sample", "--seed", "7", "--output"]
    command = ["-m", "opt_common.cli", *arguments, str(out)]
    command = [*TORCHRUN, *command] if way == "torchrun" else [sys.executable, *command, "--devices", "2"]

    def written() -> int:
        return sum(path.read_text().count("\n") - 1 for path in tmp_path.glob("out.jsonl.partial*"))

    def is_victim(process: Path) -> bool:
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            return f"RANK={victim}".encode() in environment and str(out).encode() in (process / "cmdline").read_bytes()
        except OSError:  # it has ended, or is not ours
            return False

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while written() < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (pid,) = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and is_victim(each)]
    os.kill(pid, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not out.exists() and written() < 24
    if way == "--devices":
        assert error.startswith(f"error: process {victim} of 2 was killed (SIGKILL)") and error.count("\n") == 1
    else:  # torchrun says which died; the other says that it was stopped, if it was not done yet
        assert f"Signal 9 (SIGKILL) received by PID {pid}" in error
    before = {path: path.read_text() for path in tmp_path.glob("out.jsonl.partial*")}
    assert subprocess.run(command, timeout=300).returncode == 0
    assert before and sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]
    assert opt_zoo(*arguments, one).returncode == 0
    rows, wanted = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, one))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in wanted]
    assert rows == wanted


@pytest.mark.parametrize(
    ("among", "arguments", "message"),
    [
        (1, ("x", "--devices", 3), "tp_plan: found num_attention_heads 4, wanted a multiple of 3 processes"),
        (1, ("x", "--devices", 2, "--framework", "tf"), "--devices: found 2, wanted 1: TensorFlow does not offer it"),
        (2, ("x", "--devices", 3), "--devices: found 3 under torchrun, wanted its 2 processes, or none"),
        (2, ("x",), "--output: found none under torchrun, wanted a file"),
        (2, ("--file", "-", "--output", "{tmp}/x"), "--file: found -, wanted a file, which all"),
        (2, ("x", "--output", "{tmp}/x", "--framework", "flax"), "torchrun: found several processes, wanted one"),
    ],
    ids=["heads", "TensorFlow", "world", "no output", "stdin", "Flax"],
)
def test_what_several_processes_refuse(among, arguments, message, tmp_path, monkeypatch):
    if among > 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(among))
    if "--framework" in arguments and (missing := registered()[str(arguments[-1])].missing):
        pytest.skip(missing)
    command = process if among == 1 else opt_zoo  # the first may start processes
    ran = command(*GENERATE, *(str(x).replace("{tmp}", str(tmp_path)) for x in arguments))
    assert ran.returncode == 1 and ran.stderr.startswith(f"error: {message}") and ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
