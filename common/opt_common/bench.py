"""`opt-zoo bench`: a quick comparison of what is installed here, by whole calls of `generate`.

Each system loads the model in a process of its own, so that none shares another's threads or GPU memory, and warms up;
then they take turns. All models are in memory at once. The numbers that the project quotes come from benchmarks/, which
takes longer.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .checkpoints.open import find_checkpoint
from .frameworks import registered, transformers_title
from .progress import counter
from .weights import table

TRANSFORMERS = "transformers"
LONG, SHORT, NEW = 512, 32, 64  # tokens, if the model has as many positions
WARM = 2  # calls


@dataclass
class Row:
    """One system's seconds, a number for each round: `first` until the first token after a long prompt, `whole` for all
    new tokens after a short one. `tokens`: those. `device`: "CPU" or "GPU". `problem`: why it was not measured."""

    key: str
    title: str
    device: str = ""
    problem: str = ""
    tokens: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """The rows, and the lengths in tokens of the long prompt, of the short one, and of what is written after it."""

    model: str
    dtype: str
    long: int
    short: int
    new: int
    rows: list[Row]

    @property
    def ran(self) -> list[Row]:
        """The rows that were measured."""
        return [row for row in self.rows if not row.problem]

    @property
    def base(self) -> Row:
        """What the others are held to: transformers, or else the first that ran."""
        return next((row for row in self.ran if row.key == TRANSFORMERS), self.ran[0])

    def first_ms(self, row: Row) -> float:
        """Milliseconds to the first token, the median."""
        return 1000 * statistics.median(row.first)

    def rate(self, row: Row) -> float:
        """New tokens a second, by the median."""
        return self.new / statistics.median(row.whole)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the medians, and how many times faster each is than `base`."""
        rows = []
        for row in self.rows:
            found = {"system": row.title, "device": row.device, "problem": row.problem}
            if not row.problem:
                found |= {
                    "first_token_ms": self.first_ms(row),
                    "first_token_faster": self.first_ms(self.base) / self.first_ms(row),
                    "tokens_per_second": self.rate(row),
                    "tokens_per_second_faster": self.rate(row) / self.rate(self.base),
                    "same_tokens": row.tokens == self.base.tokens,
                    "first_s": row.first,
                    "whole_s": row.whole,
                }
            rows.append(found)
        names = ("model", "dtype", "long", "short", "new")
        compared = {"compared_with": self.base.title} if self.ran else {}
        return {name: getattr(self, name) for name in names} | compared | {"rows": rows}


def bench(model: str, dtype: str = "float32", rounds: int = 5) -> Comparison:
    """Compare the frameworks, and transformers where it is installed, on one model: a folder, "opt-demo" or a Hub name.

    Raises as `find_checkpoint`. What fails in one system is its row's `problem`.
    """
    checkpoint, config = find_checkpoint(model, prefer=True)
    long, short = min(LONG, config.max_position_embeddings - 1), min(SHORT, config.max_position_embeddings // 2)
    new = min(NEW, config.max_position_embeddings - short)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, config.vocab_size, (1, length)) for length in (long, short)]  # 0 to 3 are special
    rows = [
        Row(one.key, one.title, problem=one.missing)
        if one.missing
        else Row(one.key, f"{one.title} {one.version.partition('+')[0]}")
        for one in registered().values()
    ]
    if title := transformers_title():
        rows.append(Row(TRANSFORMERS, title))
    found = Comparison(model, dtype, long, short, new, rows)
    with ExitStack() as stack, counter("Comparing", len(found.ran) * (1 + 2 * rounds)) as advance:
        spawn = multiprocessing.get_context("spawn")
        homes = {row.key: stack.enter_context(ProcessPoolExecutor(1, spawn)) for row in found.ran}
        calls = [(prompts[0], 1), (prompts[1], new)]
        for row in found.ran:  # one after another: all at once would wait for each other's threads
            name = str(checkpoint.folder) if row.key == TRANSFORMERS else model
            with _problem(row):
                row.device, row.tokens = homes[row.key].submit(_prepare, row.key, name, dtype, calls).result()
            advance(1)
        for _ in range(rounds):
            for call, name in enumerate(("first", "whole")):
                for row in found.ran:
                    with _problem(row):
                        getattr(row, name).append(homes[row.key].submit(_time, call).result())
                    advance(1)
    return found


@contextmanager
def _problem(row: Row) -> Iterator[None]:
    """Whatever fails in a system's process is a row that did not run, and says why."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row.problem = f"{type(error).__name__}: {lines[0]}"


# Of a system's own process: how it is called.
_calls: list[Callable[[], list[int]]] = []


def _prepare(key: str, model: str, dtype: str, calls: list[tuple[np.ndarray, int]]) -> tuple[str, list[int]]:
    """Load a model and warm it up: where it is, and the tokens of the last of `calls`, prompts and how many tokens to
    write."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, value in (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"), ("TF_FORCE_GPU_ALLOW_GROWTH", "true")):
        os.environ.setdefault(name, value)  # the GPU is shared
    device, generate = (_transformers if key == TRANSFORMERS else partial(_framework, key))(model, dtype)
    _calls[:] = [partial(generate, prompt, new) for prompt, new in calls]
    for _ in range(WARM):
        tokens = [call() for call in _calls]
    return device, tokens[-1]


def _time(call: int) -> float:
    start = time.perf_counter()
    _calls[call]()
    return time.perf_counter() - start


def _framework(key: str, model: str, dtype: str) -> tuple[str, Callable[[np.ndarray, int], list[int]]]:
    framework = registered()[key]
    framework.on(None).__enter__()  # for as long as the process lives
    loaded = framework.model_class().from_pretrained(model, dtype=dtype)
    embedding = framework.naming.parameter(loaded, next(table(loaded.config)))

    def generate(prompt: np.ndarray, new: int) -> list[int]:
        ids = framework.tensor(prompt.astype(framework.ids))
        tokens = loaded.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return framework.numpy(tokens)[0].tolist()

    return "CPU" if "cpu" in str(embedding[...].device).lower() else "GPU", generate


def _transformers(folder: str, dtype: str) -> tuple[str, Callable[[np.ndarray, int], list[int]]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded.to(device)

    def generate(prompt: np.ndarray, new: int) -> list[int]:
        ids = torch.from_numpy(prompt).to(device)
        mask = torch.ones_like(ids)
        how: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return loaded.generate(input_ids=ids, attention_mask=mask, **how)[0].tolist()

    return "GPU" if device == "cuda" else "CPU", generate
