"""opt_pt, as the benchmarks run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.peers import Calls, Ids, Job, System, loading, waited

if TYPE_CHECKING:
    from benchmarks.train import Arm
    from benchmarks.train import Job as Training

CPU = tuple(
    System(key, title, dtype, {"torch": ""})
    for dtype in ("float32", "bfloat16")
    for key, title in (("opt_pt", "opt_pt, torch {}"), ("opt_pt_packed", "opt_pt, torch {}, packed"))
)
CPU += (
    System("opt_pt_packed", "opt_pt, torch {}, packed", "int8", {"torch": ""}),
    System("opt_pt", "opt_pt, torch {}", "int4", {"torch": ""}),
)
GPU = (System("opt_pt", "opt_pt, torch {}", "float16", {"torch": ""}),)
FA2 = "flash_attention_2"
TRAIN_CPU: list[Arm] = [("opt_pt", "sdpa", compiled, False) for compiled in (False, True)]
TRAIN_CPU += [("opt_pt", "sdpa", False, True)]
TRAIN_GPU: list[Arm] = [
    ("opt_pt", attention, compiled, False) for attention in ("sdpa", FA2) for compiled in (False, True)
]
TRAIN_GPU += [("opt_pt", "sdpa", False, True)]
STYLE = "#009e73", "o"


def calls(job: Job, packed: bool = False) -> Calls:
    import torch

    from opt_pt import OPTForCausalLM
    from opt_pt.fast import cpu

    device = "cuda" if job.device == "gpu" else "cpu"
    how = {**loading(job.dtype), "device": device, "attn_implementation": job.attention}
    model = OPTForCausalLM.from_pretrained(job.folder, **how)
    if packed:
        model.pack()

    @torch.inference_mode()
    def forward(ids: Ids) -> Any:
        return waited(model(torch.from_numpy(ids).to(device), use_cache=False).logits)

    def generate(ids: Ids, beams: int = 1) -> Any:
        how = {"max_new_tokens": job.new, "eos_token_id": [], "num_beams": beams}
        return model.generate(torch.from_numpy(ids).to(device), **how).cpu()

    def step(B: int, length: int, slots: int) -> Callable[[], float]:
        past = length - job.new
        cache = model.init_cache(B, slots)
        for tensor in cache.k + cache.v:
            tensor.fill_(0.1)  # memory that was never written is not read from memory either
        tokens = torch.full((job.new, B), 5)

        @torch.inference_mode()
        def run() -> float:
            cache.length = past
            # what `generate` runs for each token
            step = cpu.Step(model, cache, torch.ones(B, past), torch.full((B,), past), tokens[0])
            start = time.perf_counter()
            for _ in range(job.new):
                tokens[0].copy_(step().argmax(dim=-1))
            return (time.perf_counter() - start) / job.new

        return run

    return Calls(forward, generate, step, generate)


def train(job: Training) -> dict[str, Any]:
    from benchmarks.train import train_torch
    from opt_pt import OPTConfig, OPTForCausalLM

    return train_torch(job, lambda: OPTForCausalLM(OPTConfig.from_dict(job.config), job.attention))


def load_limit(weights: int, largest: int) -> float:
    return 0.2 * weights + 200e6


SYSTEMS = {"opt_pt": calls, "opt_pt_packed": lambda job: calls(job, packed=True)}
