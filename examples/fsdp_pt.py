"""Fine-tune a causal OPT on a text file over several GPUs with FSDP2: each holds its part of the weights, gradients and
optimizer state. Killed and started again it goes on from its last save.

torchrun --nproc-per-node 2 examples/fsdp_pt.py TEXT OUT    # OUT gets the model
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from opt_pt import GPT2Tokenizer, OPTConfig, OPTForCausalLM


def sharded(name: str, device: torch.device) -> OPTForCausalLM:
    """The model, of which each process holds its part. Only the first reads it, into the main memory."""
    with torch.device("meta"):  # shapes alone
        model = OPTForCausalLM(OPTConfig.from_pretrained(name))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    weights = {}
    if dist.get_rank() == 0:
        whole = OPTForCausalLM.from_pretrained(name, device="cpu")
        weights, model.generation_config = whole.state_dict(), whole.generation_config
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def main(
    text: Annotated[Path, typer.Argument(help="UTF-8")],
    out: Annotated[Path, typer.Argument(help="a folder, made if need be")],
    model_name: Annotated[str, typer.Option("--model", help="a Hub name or a folder")] = "opt-demo",
    steps: Annotated[int, typer.Option()] = 200,
    save_every: Annotated[int, typer.Option()] = 50,
    rows: Annotated[int, typer.Option(help="of each process")] = 8,
    tokens: Annotated[int, typer.Option(help="a row")] = 64,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
) -> None:
    """Fine-tune a causal OPT on a text file, under torchrun."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()  # NCCL for tensors on GPUs, gloo for those on CPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = GPT2Tokenizer.from_pretrained(model_name)
    model = sharded(model_name, device).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    words = np.array(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])

    # the metadata are written last, so that a folder that has them is whole
    saves = sorted(int(file.parent.name) for file in out.glob("training/*/.metadata"))
    first = saves[-1] if saves else 0
    if first:
        ours, its = get_state_dict(model, optimizer)
        load({"model": ours, "optimizer": its}, checkpoint_id=out / "training" / str(first))
        set_state_dict(model, optimizer, model_state_dict=ours, optim_state_dict=its)
    if rank == 0:
        print(f"step {first} of {steps}", flush=True)
    for step in range(first, steps):
        torch.manual_seed(step * world + rank)  # dropout is the same whether or not the run was broken off before
        starts = np.random.default_rng([step, rank]).integers(0, len(words) - tokens, rows)
        batch = torch.tensor(words[starts[:, None] + np.arange(tokens)], device=device)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % save_every == 0:
            ours, its = get_state_dict(model, optimizer)
            save({"model": ours, "optimizer": its}, checkpoint_id=out / "training" / str(step + 1))
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
                for old in saves:
                    shutil.rmtree(out / "training" / str(old))
            saves = [step + 1]

    model.save_pretrained(out)  # by all processes: the first writes, and gathers one tensor at a time
    if rank == 0:
        tokenizer.save_pretrained(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
