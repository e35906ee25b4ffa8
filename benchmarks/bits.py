"""Decoding with weights of 8 and 4 bits on a GPU, beside float16.

    python -m benchmarks bits --out bits.json
    python -m benchmarks bits --sizes 66b --bits 8,4      # what float16 does not fit in
    python -m benchmarks bits --smoke                     # tiny models on the CPU: proves the code alone

Random weights of the real shapes: float16, 8 bits with a scale a row, 4 bits in groups of 128; embeddings, norms,
biases and the head float16. Greedy, prompt 64: 96 more new tokens over the seconds that a call with 32 + 96 takes
longer than one with 32, one kind after the other. over_float16: tokens per second over float16's.
read: bytes of all weights a step. of_copy: of the rate of a copy within the GPU's memory, bytes read and written, in
the same run. first_ms: a prompt of 512 tokens and one new token, whole call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import systems
from benchmarks.gpu import PROMPT, generator, steady
from benchmarks.report import Row, console, heading, over, say, show
from benchmarks.systems import Setup, event_ms, wall_ms
from opt_common.files import write_atomically
from opt_common.quantization import QuantizationConfig
from opt_pt import OPTForCausalLM
from opt_pt.quantized import QuantizedLinear

TARGETS = {(8, 1): 1.7, (4, 1): 2.6, (8, 16): 1.4, (4, 16): 1.8}  # over float16, from 6.7b up


def build(setup: Setup, size: str, bits: int) -> OPTForCausalLM:
    """Random weights, drawn where they are to lie."""
    return systems.build_ours(setup, size) if bits == 16 else drawn(setup, hollow(setup, size, bits))


def hollow(setup: Setup, size: str, bits: int) -> OPTForCausalLM:
    """A model without memory for its weights."""
    group = None if bits == 8 else 32 if setup.smoke else 128
    packing = None if bits == 16 else QuantizationConfig.rounding(bits, group)
    with torch.device("meta"):
        return OPTForCausalLM(setup.config(size).changed(quantization_config=packing)).to(setup.dtype)


@torch.no_grad()
def drawn(setup: Setup, model: OPTForCausalLM) -> OPTForCausalLM:
    """Give a hollow model its weights."""
    model.to_empty(device=setup.device)
    model.tie_weights()
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.fill_(1) if "norm.weight" in name else p.normal_(0, 0.02)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.reset_parameters(0.02)
    return model.eval()


def copied(setup: Setup) -> float | None:
    """Bytes read and written a second by a copy within the GPU's memory."""
    if setup.smoke:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(event_ms(setup, lambda: target.copy_(source)) for _ in range(5)) * 1000


def measure(setup: Setup, size: str, bits: list[int], rows: list[int], copy: float | None) -> Iterator[Row]:
    plain: dict[int, float] = {}
    for kind in sorted(bits, reverse=True):
        say(f"opt-{size}: {kind} bits")
        model = build(setup, size, kind)
        read = sum(p.numel() * p.element_size() for p in model.parameters())
        long = setup.tokens(size, 1, 512)
        first = min(wall_ms(setup, lambda m=model, ids=long: generator(m, ids)(1)) for _ in range(3))
        for B in rows:
            speed = steady(setup, {"": generator(model, setup.tokens(size, B, PROMPT))}, B)[""]
            if kind == 16:
                plain[B] = speed
            row = {"size": size, "bits": kind, "B": B, "steady": speed, "over_float16": over(speed, plain.get(B))}
            yield row | {"read": read, "of_copy": over(read * speed / B, copy), "first_ms": first}
        del model
        setup.free()


def bits(
    out: Annotated[Path | None, typer.Option(help="JSON with every number, written after each size")] = None,
    sizes: Annotated[str, typer.Option()] = "6.7b,13b",
    bits: Annotated[str, typer.Option(help="16 is float16")] = "16,8,4",
    rows: Annotated[str, typer.Option()] = "1,16",
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
) -> None:
    """Decoding with weights of 8 and 4 bits on a GPU, beside float16."""
    setup, printed = Setup(smoke), console()
    report: Row = systems.machine(setup) | {"copy": copied(setup), "rows": []}
    printed.print(heading(report), report["dtype"], highlight=False)
    kinds, counts = ([int(n) for n in option.split(",")] for option in (bits, rows))
    for size in sizes.split(","):
        report["rows"] += measure(setup, size, kinds, counts, report["copy"])
        if out is not None:
            write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show(printed, "New tokens per second over all rows", report["rows"])
    reached = [
        {"target": f"{row['size']}, {row['bits']} bits, {row['B']} rows, over float16", "to_reach": f"≥ {limit}"}
        | {"reached": row["over_float16"], "met": "smoke" if smoke else "yes" if row["over_float16"] >= limit else "NO"}
        for row in report["rows"]
        if (limit := TARGETS.get((row["bits"], row["B"]))) and row["over_float16"]
    ]
    show(printed, "Targets", reached)
