"""One model over several GPUs, a process each:

    torchrun --nproc-per-node 2 -m benchmarks parallel --out parallel.json
    torchrun --nproc-per-node 1 -m benchmarks parallel --cells 30b:16
    torchrun --nproc-per-node 2 -m benchmarks parallel --smoke     # tiny models on the CPU: proves the code alone

Random weights of the real shapes, made where they lie; a cell is a size and the bits of its layers' weights (16 is
float16; 4 in groups of 128). Greedy, prompt 64: 96 more new tokens over the seconds that a call with 32 + 96 takes
longer than one with 32. read: bytes of weights a step, of one process. of_copy: of the rate at which a GPU copies
within its memory, in the same run. first_ms: 512 tokens of prompt and one new token, whole call. sum_us: one sum of a
row of hidden states over the processes, of many in one CUDA graph, as a step has two a layer.

`load` writes a whole checkpoint of the size in float16, so that it lies in the page cache, and loads it split. GB/s:
of a process, of its part, all at once; of_copy: of the rate at which all copy as many bytes from the main memory at
once. peak_MB: what a process took of the main memory meanwhile; limit_MB: the largest file and, on a CPU, its part.
Linux only. The first process needs room for the whole model on its GPU.

`answers` compares the split model with the whole one on each GPU: relative error of the logits, float16 both, and how
many of 32 greedy tokens agree before the first that does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks import systems
from benchmarks.bits import copied, drawn, hollow
from benchmarks.gpu import PROMPT, generator, steady
from benchmarks.load import memory
from benchmarks.report import MB, Row, console, heading, over, say, show
from benchmarks.systems import Setup, forward, wall_ms
from opt_common.files import write_atomically
from opt_common.weights import TORCH, table
from opt_pt import OPTForCausalLM, parallel


def build(setup: Setup, size: str, bits: int, rank: int, world: int) -> OPTForCausalLM:
    """This process's part, random."""
    model = hollow(setup, size, bits)
    parallel.split(model, rank, world)
    torch.manual_seed(0)
    return drawn(setup, model)


def answers(setup: Setup, size: str, rank: int, world: int) -> Row:
    whole, ids = systems.build_ours(setup, size), setup.tokens(size, 1, PROMPT)
    split = build(setup, size, 16, rank, world)
    for spec in table(whole.config):
        index = parallel.index(spec, rank, world) or ...
        TORCH.parameter(split, spec).data.copy_(TORCH.parameter(whole, spec).data[index])
    one, several = (forward(model, ids).double() for model in (whole, split))
    texts = [
        m.generate(ids, max_new_tokens=setup.length(32), eos_token_id=[])[0, ids.shape[1] :] for m in (whole, split)
    ]
    same = int((texts[0] == texts[1]).int().cumprod(0).sum())
    return {
        "size": size,
        "logits": float((several - one).norm() / one.norm()),
        "same_tokens": same,
        "of": len(texts[0]),
    }


def loading(setup: Setup, size: str, rank: int, world: int) -> Row:
    with TemporaryDirectory() as temporary:
        folder = Path(parallel.of_first(temporary))
        if rank == 0:
            systems.build_ours(setup, size).save_pretrained(folder)
            setup.free()
        parallel.of_first(None)  # all wait until it is written
        before, models = memory("VmRSS"), []
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
        how = {"dtype": setup.dtype, "tp_plan": "auto", "device": setup.device}
        ms = wall_ms(setup, lambda: models.append(OPTForCausalLM.from_pretrained(folder, **how)))
        peak = memory("VmHWM") - before
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        own = sum(p.nbytes for p in models.pop().parameters())
        source = torch.ones(min(own, 1 << 32), dtype=torch.uint8)
        target = torch.empty_like(source, device=setup.device)
        parallel.of_first(None)
        copy = len(source) / min(wall_ms(setup, lambda: target.copy_(source)) for _ in range(3))  # bytes a millisecond
        parallel.of_first(None)  # before the folder is removed
    limit = largest + (own if setup.smoke else 0)
    row: Row = {"size": size, "processes": world, "part_MB": own / MB, "seconds": ms / 1000, "GB/s": own / ms / MB}
    return row | {"of_copy": own / ms / copy, "peak_MB": peak / MB, "limit_MB": limit / MB}


def sum_us(setup: Setup, width: int) -> float | None:
    if setup.smoke:
        return None
    x, times = torch.zeros(1, width, device=setup.device, dtype=setup.dtype), 200
    add = parallel.Sum(*x.shape, device=x.device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        add.into(x)
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(times):
            add.into(x)
        graph.capture_end()
    torch.cuda.synchronize()
    return 1000 * min(wall_ms(setup, graph.replay) for _ in range(5)) / times


def measure(setup: Setup, size: str, bits: int, rows: list[int], copy: float | None) -> list[Row]:
    rank, world = parallel.processes()
    model, found = build(setup, size, bits, rank, world), []
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = setup.tokens(size, 1, 512)
    first = min(wall_ms(setup, lambda: generator(model, ids)(1)) for _ in range(3))
    of_sum = sum_us(setup, model.config.hidden_size)
    for B in rows:
        speed = steady(setup, {"": generator(model, setup.tokens(size, B, PROMPT))}, B)[""]
        row = {"size": size, "bits": bits, "GPUs": world, "B": B, "steady": speed, "read": read}
        found.append(row | {"of_copy": over(read * speed / B, copy), "first_ms": first, "sum_us": of_sum})
    return found


def parallel_(
    out: Annotated[Path | None, typer.Option(help="JSON with every number, written after each cell")] = None,
    cells: Annotated[
        str, typer.Option(help="SIZE:BITS, SIZE:answers or SIZE:load, with commas")
    ] = "6.7b:answers,6.7b:load,30b:16,66b:16,175b:4",
    rows: Annotated[str, typer.Option()] = "1,16",
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
) -> None:
    """One model over several GPUs, under torchrun."""
    rank, world = parallel.processes()
    setup, printed = Setup(smoke), console()
    report: Row = systems.machine(setup) | {
        "processes": world,
        "copy": copied(setup),
        "answers": [],
        "loads": [],
        "rows": [],
    }
    if rank == 0:
        printed.print(heading(report), report["dtype"], highlight=False)
    for cell in cells.split(","):
        size, _, what = cell.partition(":")
        if rank == 0:
            say(f"opt-{size}: {what}")
        if what == "answers":
            report["answers"].append(answers(setup, size, rank, world))
        elif what == "load":
            report["loads"].append(loading(setup, size, rank, world))
        else:
            counts = [int(n) for n in rows.split(",")]
            report["rows"] += measure(setup, size, int(what), counts, report["copy"])
        setup.free()
        if out is not None and rank == 0:
            write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if rank == 0:
        show(printed, "Split against whole", report["answers"])
        show(printed, "Loading a part from the page cache, the first process", report["loads"])
        show(printed, "New tokens per second over all rows", report["rows"])
