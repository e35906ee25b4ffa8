"""Perplexity with weights of 8 and 4 bits, rounded to the nearest and calibrated, beside floats.

    python -m benchmarks perplexity grimm.txt holmes.txt

Of each text, the first half calibrates and the second is predicted: `rows` rows of as many tokens as the model has
positions, 2,048 at most, from where each half begins. float32 on a CPU, scales in the checkpoint's dtype.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.report import Row, console, heading, machine, say, show
from opt_common.checkpoints.convert import convert
from opt_common.files import write_atomically
from opt_common.hub import DEMO
from opt_common.quantization import Packing, QuantizationConfig
from opt_pt import GPT2Tokenizer, OPTForCausalLM
from opt_pt.calibration import calibrate

KINDS = (Packing(8), Packing(4), Packing(4, 128), Packing(4, 32))


@torch.no_grad()
def perplexity(model: OPTForCausalLM, rows: Tensor) -> float:
    """Of the tokens of each row, all but the first."""
    return math.exp(sum(float(model(row[None], labels=row[None]).loss) for row in rows) / len(rows))


def perplexities(
    texts: Annotated[list[Path], typer.Argument(help="UTF-8")],
    model: Annotated[str, typer.Option(help='a folder, a Hub name, or "opt-demo"')] = DEMO,
    rows: Annotated[int, typer.Option(help="of each half of a text", min=1)] = 16,
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
) -> None:
    """Perplexity of 8 and 4 bits, nearest and calibrated, on texts."""
    tokenizer, floats = GPT2Tokenizer.from_pretrained(model), OPTForCausalLM.from_pretrained(model)
    length = min(2048, floats.config.max_position_embeddings)
    halves: tuple[list[Tensor], list[Tensor]] = [], []
    for text in (path.read_text(encoding="utf-8") for path in texts):
        for part, half in zip(halves, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
            ids = tokenizer(half)["input_ids"]
            found = min(rows, len(ids) // length)
            part.append(torch.tensor(ids[: found * length]).view(found, length))
    first, second = (torch.cat(part) for part in halves)
    report: Row = machine() | {"model": model, "calibrated_on": first.numel(), "predicted": second.numel()}
    report["rows"] = [{"weights": "floats", "nearest": perplexity(floats, second), "calibrated": None}]
    for packing in KINDS:
        say(str(packing))
        chosen = QuantizationConfig(((("Linear",), packing),))
        row: Row = {"weights": str(packing)}
        for kind in ("nearest", "calibrated"):
            numbers = None
            if kind == "calibrated":
                whole = OPTForCausalLM.from_pretrained(model)
                numbers = lambda dtype, m=whole, q=chosen: calibrate(m, first, q, dtype)  # noqa: E731
            with tempfile.TemporaryDirectory() as folder:
                convert(model, folder, quantization=chosen, calibrate=numbers)
                row[kind] = perplexity(OPTForCausalLM.from_pretrained(folder), second)
        report["rows"].append(row)
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    printed = console()
    printed.print(heading(report), markup=False, highlight=False)
    shown = f"{model}, {second.numel():,} tokens predicted, calibrated on {first.numel():,}"
    show(printed, shown, report["rows"])
