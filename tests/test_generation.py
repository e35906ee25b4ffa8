"""What `generate` shares between frameworks: stop strings and the text that is streamed."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import opt_common.generation
from opt_common.generation import StopStrings, TextIteratorStreamer, TextStreamer, columns, crowded, pieces
from opt_common.hub import fetch
from opt_common.tokenizer import GPT2Tokenizer

TEXT = "Übung macht den Meister — ‘naïve’ 日本語 🙂 done.\n\nAnd so on"


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.from_pretrained("opt-demo")


def test_few_widths():
    widths = [columns(n) for n in range(2049)]
    assert sorted({*widths}) == [32, *range(64, 513, 64), 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert all(n <= width for n, width in enumerate(widths))


def test_crowded(monkeypatch):
    assert not crowded()
    with open("/proc/self/maps") as file:
        maps = len(list(file))
    monkeypatch.setattr(Path, "read_text", lambda path: f"{maps}\n")
    assert crowded()


def test_pieces_add_up_to_the_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = list(pieces((np.array([i]) for i in ids), tokenizer))
    assert "".join(found) == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    assert len(found) > 10
    cut = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("\N{REPLACEMENT CHARACTER}"))
    assert "".join(pieces(([i] for i in ids[:cut]), tokenizer)) == tokenizer.decode(ids[:cut])  # a half character


@pytest.mark.parametrize(
    "strings", [["Meister"], ["r — "], ["語"], ["\n\nAnd"], ["🙂 d", "zz"], ["xyz"], ["g m"]], ids=str
)
def test_stop_strings_end_where_transformers_ends(strings, tokenizer):
    reference = transformers.GPT2Tokenizer.from_pretrained(fetch("opt-demo", []))
    wanted = transformers.StopStringCriteria(reference, strings)
    stops = StopStrings(tokenizer, strings)
    ids = tokenizer(TEXT)["input_ids"]
    ended = [bool(wanted(torch.tensor([ids[:n]]), None)) for n in range(1, len(ids) + 1)]
    assert [stops(ids[:n]) for n in range(1, len(ids) + 1)] == ended
    assert any(ended) == (strings != ["xyz"])


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_prints_what_transformers_prints(skip_prompt, tokenizer, capsys):
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    printed = []
    for module in (transformers, opt_common.generation):
        streamer = module.TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        for _ in range(2):  # and again, for the next text
            streamer.put(ids[None, :5])
            for token in ids[5:]:
                streamer.put(token[None])
            streamer.end()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    with pytest.raises(ValueError, match="TextStreamer: found 2 rows, wanted one"):
        TextStreamer(tokenizer).put(torch.ones(2, 3))


def test_a_streamer_of_another_thread(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    ids = np.array(tokenizer(TEXT)["input_ids"])

    def write():
        streamer.put(ids[None, :5])
        for token in ids[5:]:
            streamer.put(token[None])
        streamer.end()

    threading.Thread(target=write).start()
    assert "".join(streamer) == tokenizer.decode(ids[5:])
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))


def test_the_snippet_of_the_page(capsys):
    """Beams, a stream and a draft, with opt-demo in place of the large models."""
    page = (Path(__file__).parents[1] / "docs" / "generating.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    for name in ("facebook/opt-6.7b", "facebook/opt-125m"):
        assert name in code
        code = code.replace(name, "opt-demo")
    found: dict[str, Any] = {}
    exec(code.replace("float16", "float32").replace(', device="cuda"', ""), found)
    assert len(capsys.readouterr().out) > 10
    plain = found["model"].generate(**found["inputs"])
    assert torch.equal(found["tokens"], plain)
