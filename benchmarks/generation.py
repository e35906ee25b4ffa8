"""What `generate` does besides one text a row by the likeliest token, against that, and beside transformers: beams,
sampling, and drafts.

    python -m benchmarks generation --out generation.json
    python -m benchmarks generation --smoke                   # tiny models on the CPU: proves the code alone

Random weights of the real shapes, float16, the same tensors in both; prompt 64. Ours: 96 more new tokens over the
seconds that a call with 32 + 96 takes longer than one with 32, the two in turns; transformers: whole calls, 32
new tokens. Tokens of beams are those of all rows, as of four texts.

beams      beam search, 4 beams of one prompt, over the likeliest token of 4 prompts
sampling   top-p 0.9 with a repetition penalty of 1.2, over the likeliest token
drafts     a draft of 5 tokens by opt-125m, its guesses replaced by the text that is written, and one of 5 tokens by a
           wrong one, so that the machinery is measured and not what two random models agree in; over no draft
lookup     10 tokens that followed the last two where they stand earlier: a random model repeats itself. Over no draft
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from benchmarks import systems
from benchmarks.gpu import PROMPT, generator, steady
from benchmarks.report import Row, console, heading, over, reason, say, show
from benchmarks.systems import Setup, wall_ms
from opt_common.files import write_atomically
from opt_pt import OPTForCausalLM
from opt_pt.generation import drafts
from opt_pt.generation.text import Text

PENALIZED = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}
TARGETS = {
    ("beams", "over_greedy"): ("beam 4, one prompt, over greedy with 4 rows", 0.75),
    ("beams", "faster"): ("beam 4 over transformers'", 4),
    ("sampling", "over_greedy"): ("top-p with repetition penalty over greedy", 0.95),
    ("drafts", "over_greedy"): ("a draft of which 4 of 5 tokens are right over none", 2.2),
    ("lookup", "over_greedy"): ("prompt lookup in a text that repeats itself over none", 2),
}


class Forced(drafts.Assistant):
    """Guesses at the cost of a model what is written anyway, but for one token of five."""

    written: Tensor

    def guess(self, text: Text, most: int) -> tuple[list[int], Tensor | None]:
        guessed, _ = super().guess(text, most)
        right = self.written[0, text.length : text.length + len(guessed)].tolist()
        return [token if (text.length + i) % 5 else token ^ 1 for i, token in enumerate(right)], None


def _row(
    setup: Setup, ours: OPTForCausalLM, theirs: Any, calls: dict[str, Any], B: int, new: Tensor, **how: Any
) -> Row:
    """Our steady speed by two calls, plain and the other, and transformers' of the other."""
    speed = steady(setup, calls, B)
    (plain, other), row = speed.values(), dict[str, Any](not_run={})
    row |= {"plain": plain, "ours": other, "over_greedy": over(other, plain)}
    if theirs is None:
        return row
    try:
        short = setup.length(32)

        def call() -> None:
            theirs.generate(new, attention_mask=torch.ones_like(new), max_new_tokens=short, **how)

        call()
        row["transformers"] = 1000 * B * short / min(wall_ms(setup, call) for _ in range(setup.repeats(2)))
        row["faster"] = over(row["ours"], row["transformers"])
    except Exception as error:  # what transformers cannot run must not cost the rest
        row["not_run"]["transformers"] = reason(error)
    return row


def beams(setup: Setup, size: str) -> Iterator[Row]:
    ours, theirs = systems.build(setup, size)
    one, four = (setup.tokens(size, B, PROMPT) for B in (1, 4))
    calls = {"greedy, 4 rows": generator(ours, four), "beams": generator(ours, one, num_beams=4)}
    yield {"size": size} | _row(setup, ours, theirs, calls, 4, one, num_beams=4)


def sampling(setup: Setup, size: str) -> Iterator[Row]:
    ours, theirs = systems.build(setup, size)
    one = setup.tokens(size, 1, PROMPT)
    calls = {"greedy": generator(ours, one), "sampled": generator(ours, one, **PENALIZED)}
    yield {"size": size} | _row(setup, ours, theirs, calls, 1, one, **PENALIZED)


def drafted(setup: Setup, size: str) -> Iterator[Row]:
    ours, assistant = systems.build_ours(setup, size), systems.build_ours(setup, "125m")
    one = setup.tokens(size, 1, PROMPT)
    Forced.written = ours.generate(one, max_new_tokens=setup.length(32) + setup.length(96), eos_token_id=[])
    with patch.object(drafts, "Assistant", Forced):
        draft = {"assistant_model": assistant, "num_assistant_tokens": 5}
        calls = {"greedy": generator(ours, one), "drafted": generator(ours, one, **draft)}
        yield {"size": size} | _row(setup, ours, None, calls, 1, one)


def lookup(setup: Setup, size: str) -> Iterator[Row]:
    ours, theirs = systems.build(setup, size)
    one = setup.tokens(size, 1, PROMPT)
    found = {"prompt_lookup_num_tokens": 10}
    calls = {"greedy": generator(ours, one), "looked up": generator(ours, one, **found)}
    yield {"size": size} | _row(setup, ours, theirs, calls, 1, one, **found)


SECTIONS = {
    "beams": (beams, "2.7b"),
    "sampling": (sampling, "2.7b"),
    "drafts": (drafted, "6.7b"),
    "lookup": (lookup, "6.7b"),
}


def generation(
    out: Annotated[Path | None, typer.Option(help="JSON with every number, written after each section")] = None,
    sections: Annotated[str, typer.Option()] = ",".join(SECTIONS),
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
) -> None:
    """Beams, sampling and drafts on the GPU, beside greedy search and transformers."""
    setup, printed = Setup(smoke), console()
    report: Row = systems.machine(setup) | {"sections": {}}
    printed.print(heading(report), report["dtype"], highlight=False)
    for name in sections.split(","):
        measure, size = SECTIONS[name]
        say(f"{name} {size}")
        setup.free()
        report["sections"][name] = rows = list(measure(setup, size))
        if out is not None:
            write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        show(printed, f"{name}: new tokens per second", rows)
    reached = [
        {"target": what, "to_reach": f"≥ {limit}", "reached": row.get(key)}
        | {"met": "smoke" if smoke else "yes" if (row.get(key) or 0) >= limit else "NO"}
        for (section, key), (what, limit) in TARGETS.items()
        for row in report["sections"].get(section, [])
    ]
    show(printed, "Targets", reached)
