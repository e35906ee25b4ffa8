"""Training steps of all frameworks beside transformers', each in a process of its own, in rounds.

    python -m benchmarks train --out train.json    # on a GPU: opt-350m's shape, 8 x 1,024 tokens, bfloat16
                                                   # without: opt-125m's shape, 2 x 256 tokens, float32
    python -m benchmarks train --smoke             # tiny models on the CPU, once: proves the code alone

A step is loss, gradients and AdamW with everything in the one dtype, the config's own dropout of 0.1 included, on
random weights and tokens. Median milliseconds of a step over all rounds, after the first three of each process, which
compile. On a GPU five steps are sent off before the last one's loss is read, as in training that logs now and then.

compiled  torch.compile of the loss and its gradients, tf.function with XLA; JAX always compiles
ceiling   three forward passes' operations (`report.flops`) at the rate of a matrix product of the dtype, measured here,
          over the step
peak      the most memory that a step has allocated; on a CPU, that the process has taken
again     with gradient checkpointing: layers are computed again for the backward pass
x best    ours over transformers' best
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.load import memory
from benchmarks.ours import modules
from benchmarks.report import ON_CPU, Row, child, console, flops, heading, machine, over, say, show, spread
from opt_common.config import OPTConfig
from opt_common.files import write_atomically

WARMUP = 3
RATE = 1e-5  # AdamW's learning rate


@dataclass(frozen=True)
class Job:
    """One system in a process of its own. `system`: see the function `system`."""

    system: str
    attention: str
    compiled: bool
    checkpointing: bool
    config: dict[str, Any]
    rows: int
    tokens: int
    dtype: str
    device: str
    turns: int  # that are timed
    steps: int  # in each

    def ids(self) -> np.ndarray:
        return np.random.default_rng(0).integers(4, self.config["vocab_size"], (self.rows, self.tokens))


def transformers(job: Job) -> Row:
    from transformers import OPTConfig, OPTForCausalLM

    def make() -> Any:
        return OPTForCausalLM._from_config(OPTConfig(**job.config), attn_implementation=job.attention)

    return train_torch(job, make)


def train_torch(job: Job, make: Callable[[], Any]) -> Row:
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    torch.set_default_dtype(dtype)
    with torch.device(job.device):
        model = make().train()
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    torch.set_default_dtype(torch.float32)
    ids = torch.tensor(job.ids(), device=job.device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)

    def loss() -> Any:
        return model(input_ids=ids, labels=ids).loss

    run = torch.compile(loss) if job.compiled else loss

    def step() -> Any:
        optimizer.zero_grad()
        value = run()
        value.backward()
        optimizer.step()
        return value.detach()

    found = timed(job, step)
    if job.device == "cuda":
        found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def timed(job: Job, step: Callable[[], Any]) -> Row:
    """step() returns the loss, which is computed by the time that it is read."""
    start = time.perf_counter()
    losses = [float(step()) for _ in range(WARMUP)]
    first = time.perf_counter() - start
    seconds = []
    for _ in range(job.turns):
        start = time.perf_counter()
        for _ in range(job.steps - 1):
            step()
        losses.append(float(step()))
        seconds.append((time.perf_counter() - start) / job.steps)
    if not losses[-1] < losses[0]:
        raise ValueError(f"nothing was learnt: loss {losses[0]:.4f}, then {losses[-1]:.4f}")
    found: Row = {"ms": [1000 * s for s in seconds], "first_s": first, "loss": [losses[0], losses[-1]]}
    return found | ({"peak_GB": memory("VmHWM") / 1e9} if job.device == "cpu" else {})


def ceiling(job: Job) -> Row:
    """FLOP/s of a matrix product."""
    import torch

    n = 8192 if job.device == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=getattr(torch, job.dtype), device=job.device) for _ in range(2))

    def ten() -> float:
        start = time.perf_counter()
        for _ in range(10):
            c = a @ b
        float(c[0, 0])
        return time.perf_counter() - start

    ten()
    return {"rate": 10 * 2 * n**3 / statistics.median(ten() for _ in range(5))}


PEERS = {"transformers": transformers, "ceiling": ceiling}
FA2 = "flash_attention_2"
Arm = tuple[str, str, bool, bool]  # system, attention, compiled, checkpointing
GPU: list[Arm] = [
    *(arm for module in modules().values() for arm in module.TRAIN_GPU),
    *(("transformers", attention, compiled, False) for attention in ("sdpa", FA2) for compiled in (False, True)),
    ("transformers", "eager", False, False),
]
CPU: list[Arm] = [
    *(arm for module in modules().values() for arm in module.TRAIN_CPU),
    ("transformers", "sdpa", False, False),
    ("transformers", "sdpa", True, False),
    ("transformers", "eager", False, False),
]


def system(name: str) -> Callable[[Job], Row]:
    return PEERS[name] if name in PEERS else modules()[name.removeprefix("opt_")].train


def train(
    rows: Annotated[int | None, typer.Option(min=1)] = None,
    tokens: Annotated[int | None, typer.Option(min=2)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="systems, e.g. opt_pt,transformers")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
) -> None:
    """Training steps of all frameworks beside transformers'."""
    import torch

    gpu = torch.cuda.is_available() and not smoke
    name = torch.cuda.get_device_name() if gpu else None
    size = "350m" if gpu else "125m"
    small = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
    config = OPTConfig.from_size(size, **(small if smoke else {}))
    shape = (2, 8) if smoke else (8, 1024) if gpu else (2, 256)
    kind = ("bfloat16", "cuda", 8, 5) if gpu else ("float32", "cpu", 1 if smoke else 4, 1)
    job = Job("", "", False, False, config.to_dict(), rows or shape[0], tokens or shape[1], *kind)
    env = {"HF_HUB_OFFLINE": "1"} | ({} if gpu else ON_CPU)
    report: Row = machine(smoke, name) | {"size": size, "rows": job.rows, "tokens": job.tokens, "dtype": job.dtype}
    rate = child(sys.executable, "train", asdict(replace(job, system="ceiling")), env).get("rate")
    report["matmul_TFLOP_s"] = rate / 1e12 if rate else None
    wanted = [arm for arm in (GPU if gpu else CPU) if not only or arm[0] in only.split(",")]
    if smoke:  # the peer's other arms run the same code
        wanted = [arm for arm in wanted if arm[0] != "transformers" or arm == ("transformers", "sdpa", False, False)]
    found: dict[Arm, list[Row]] = {arm: [] for arm in wanted}
    for turn in range(1 if smoke else rounds):
        for arm in wanted:
            say(f"round {turn + 1}: {words(arm)}")
            one = replace(job, **dict(zip(("system", "attention", "compiled", "checkpointing"), arm, strict=True)))
            found[arm].append(child(sys.executable, "train", asdict(one), env, 400))
    report["results"] = rows_of(found, job, flops(config, job.rows, job.tokens), rate)
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    printed = console()
    printed.print(heading(report), markup=False, highlight=False)
    title = f"opt-{size}'s shape, {job.rows} x {job.tokens} tokens, {job.dtype}: a training step"
    show(printed, title, [{k: v["median"] if k == "ms" else v for k, v in row.items()} for row in report["results"]])


def words(arm: Arm) -> str:
    system, attention, compiled, checkpointing = arm
    said = (system, attention, "compiled" if compiled else "", "checkpointing" if checkpointing else "")
    return " ".join(word for word in said if word)


def rows_of(found: dict[Arm, list[Row]], job: Job, forward: int, rate: float | None) -> list[Row]:
    result: list[Row] = []
    for arm, runs in found.items():
        system, attention, compiled, checkpointing = arm
        row: Row = {"system": system, "attention": attention, "compiled": "yes" if compiled else "no"}
        row["again"] = "yes" if checkpointing else "no"
        failed = next((run["not_run"] for run in runs if "not_run" in run), None)
        if failed:
            result.append(row | {"not_run": {words(arm): failed}})
            continue
        row["ms"] = spread(ms for run in runs for ms in run["ms"])
        row["tokens_s"] = 1000 * job.rows * job.tokens / row["ms"]["median"]
        row["of_ceiling"] = over(3 * forward / rate, row["ms"]["median"] / 1000) if rate else None
        row |= {"first_s": max(run["first_s"] for run in runs), "peak_GB": runs[0].get("peak_GB")}
        result.append(row)
    best = max((row["tokens_s"] for row in result if row["system"] == "transformers" and "ms" in row), default=None)
    fastest = max((row["tokens_s"] for row in result if "ms" in row), default=None)
    for row in result:
        if "ms" in row:
            row |= {"x_best": over(row["tokens_s"], best), "of_fastest": over(row["tokens_s"], fastest)}
    return result


if __name__ == "__main__":
    given = Job(**json.loads(sys.argv[1]))
    print(json.dumps(system(given.system)(given)))
