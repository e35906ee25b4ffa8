"""Long runs: memory and compiled programs of thousands of `generate`s, as many as wanted; `test_inputs.py` runs some.

    python tests/long_runs.py --framework pt|tf|flax [--minutes 10] [--parts loop,models,threads,workers]

loop: generate with other lengths, rows and settings at each call. After each variety has been seen once, and a hundred
    calls, a call may leave at most LEFT bytes, and none may compile a program.
models: load a model, generate, drop it. What is left of each must be small beside it.
threads: eight of them call generate on one model, and get what one alone gets.
workers: a DataLoader with forked workers is read beside it.
It ends with an error if anything else is found. Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_common.config import OPTConfig
from opt_common.frameworks import registered

LEFT = 1024  # bytes a call
# Rows of a call, and the most tokens of one. Prompts of 4 to 19 and 34 to 49 tokens and up to 12 new ones stay below 32
# and 64, the widths that programs are made for, so that each variety has one program.
ROWS, WIDTHS = (1, 3), (20, 50)
SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, max_position_embeddings=128,
    init_std=0.3,
)  # fmt: skip


def kinds(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Settings of each kind, with numbers of their own."""
    seed, penalty = int(rng.integers(1000)), float(rng.uniform(1.0, 2.0))
    sampled = {"do_sample": True, "seed": seed, "temperature": float(rng.uniform(0.5, 1.5))}
    return {
        "greedy": {},
        "sampled": {**sampled, "top_k": int(rng.integers(1, 50)), "top_p": float(rng.uniform(0.5, 1.0))},
        "texts": {**sampled, "num_return_sequences": 2},
        "beams": {"num_beams": 3, "length_penalty": penalty, "num_return_sequences": 2},
        "penalties": {"repetition_penalty": penalty, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
        "biased": {"suppress_tokens": [int(rng.integers(3, 90))], "sequence_bias": {(5, 6): penalty}},
        "scores": {"return_dict_in_generate": True, "output_scores": True},
        "prefixes": {"prefix_allowed_tokens_fn": lambda row, ids: [*range(3, 60)]},
    }


def prompts(rng: np.random.Generator, rows: int, width: int) -> dict[str, np.ndarray]:
    """Prompts of random lengths, the first the longest, padded on the left."""
    lengths = rng.integers(1, width, size=rows)
    lengths[0] = max(*lengths, rng.integers(width - 16, width))
    mask = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    ids = np.where(mask, rng.integers(3, SIZES["vocab_size"], size=mask.shape), 1)
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


class Run:
    """A framework and one small model of it."""

    def __init__(self, key: str) -> None:
        self.key, self.framework = key, registered()[key]
        self.kind = self.framework.model_class()
        if key == "pt":
            # oneDNN keeps code for each number of tokens that a product has had, 0.4 MB, of 1,024 products by default
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
            import torch

            torch.set_num_threads(1)  # tiny tensors
        self.model = self.made()
        self.programs = programs(key)

    def made(self) -> Any:
        model = self.kind(OPTConfig(**SIZES))
        return model.eval() if self.key == "pt" else model

    def generate(self, given: dict[str, np.ndarray], options: dict[str, Any], new: int, model: Any = None) -> Any:
        """The text of a `generate` of `new` tokens, an array."""
        tensors = {name: self.framework.tensor(x) for name, x in given.items()}
        made = (self.model if model is None else model).generate(**tensors, **options, max_new_tokens=new)
        return self.framework.numpy(made["sequences"] if options.get("return_dict_in_generate") else made)

    # === The parts ===

    def loop(self, minutes: float) -> dict[str, Any]:
        rng, used = np.random.default_rng(0), []
        varieties = [*itertools.product(kinds(rng), ROWS, WIDTHS)]

        def call(kind: str, rows: int, width: int) -> None:
            self.generate(prompts(rng, rows, width), kinds(rng)[kind], int(rng.integers(3, 13)))

        for variety in varieties:
            call(*variety)
        calls, first, end = len(varieties), self.programs.count, time.monotonic() + 60 * minutes
        while time.monotonic() < end or len(used) < 4:
            call(*varieties[rng.integers(len(varieties))])
            calls += 1
            if calls >= 100 and calls % 10 == 0:
                used.append((calls, memory()))
        found = {"calls": calls, "MB": used[-1][1] >> 20, "left_a_call": round(slope(used))}
        return found | {"programs": first, "later_programs": self.programs.count - first}

    def models(self, count: int) -> dict[str, Any]:
        """Models of 17 MB, one after the other."""
        size = SIZES | {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "vocab_size": 4096}
        given, used = prompts(np.random.default_rng(0), 2, 20), []
        with tempfile.TemporaryDirectory() as folder:
            made = self.kind(OPTConfig(**size))
            made.save_pretrained(folder)
            weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            del made
            for _ in range(count):
                self.generate(given, {}, 5, self.kind.from_pretrained(folder))
                used.append((len(used), memory()))
        half = used[len(used) // 2 :]
        return {"models": count, "MB_each": weights >> 20, "left_MB_a_model": round(slope(half) / 2**20, 2)}

    def threads(self, count: int = 8, each: int = 6, names: Sequence[str] | None = None) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        names = names or [name for name in kinds(rng) if name != "prefixes"]
        work = [
            (prompts(rng, int(rng.choice(ROWS)), 20), kinds(rng)[names[i % len(names)]], int(rng.integers(3, 20)))
            for i in range(count * each)
        ]
        wanted = [self.generate(*one) for one in work]
        found: dict[int, Any] = {}

        def some(k: int) -> None:
            for i in range(k, len(work), count):
                try:
                    found[i] = self.generate(*work[i])
                except Exception as error:
                    found[i] = error

        threads = [threading.Thread(target=some, args=(k,)) for k in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong = [i for i, text in enumerate(wanted) if not np.array_equal(found[i], text)]
        return {
            "threads": count,
            "calls": len(work),
            "wrong": len(wrong),
            "first": str(found[wrong[0]]) if wrong else "",
        }

    def workers(self, count: int = 2, batches: int = 8) -> dict[str, Any]:
        from torch.utils.data import DataLoader

        rng = np.random.default_rng(2)
        texts = [prompts(rng, 1, 20)["input_ids"][0].tolist() for _ in range(4 * batches)]
        wanted = [self.generate({"input_ids": np.array([text])}, {}, 5) for text in texts]
        every: Any = texts
        loader: Any = DataLoader(
            every, batch_size=4, num_workers=count, collate_fn=list, timeout=60, multiprocessing_context="fork"
        )
        found = [self.generate({"input_ids": np.array([text])}, {}, 5) for batch in loader for text in batch]
        wrong = sum(not np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
        return {"workers": count, "texts": len(found), "wrong": wrong}


class programs:
    """How many programs the framework has compiled since."""

    def __init__(self, key: str) -> None:
        self.key, self.compiled = key, 0
        if key == "flax":
            import jax

            jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.compiled += event.endswith("backend_compile_duration")

    @property
    def count(self) -> int:
        if self.key == "tf":
            module = importlib.import_module("opt_tf.generation.generate")  # not the function of that name
            both = (*module._generate, *module._first, *module._further)
            return sum(function.experimental_get_tracing_count() for function in both)
        return self.compiled


def memory() -> int:
    """Bytes that are resident, once garbage is collected, and what the allocator keeps is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def resident() -> int:
    """Bytes of this process that are in memory; 0 where that cannot be read."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def slope(used: list[tuple[int, int]]) -> float:
    """Bytes a call, of (call, bytes)."""
    calls, memory = zip(*used, strict=True)
    return float(np.polyfit(calls, memory, 1)[0])


def faults(part: str, found: dict[str, Any]) -> Iterator[str]:
    """What is beyond its bound."""
    if part == "loop" and found["left_a_call"] > LEFT:
        yield f"a call leaves {found['left_a_call']} bytes, more than {LEFT}"
    if part == "loop" and found["later_programs"]:
        yield f"{found['later_programs']} programs were compiled for varieties that had been seen"
    if part == "models" and found["left_MB_a_model"] > found["MB_each"] / 8:
        yield f"a model of {found['MB_each']} MB leaves {found['left_MB_a_model']} MB"
    if found.get("wrong"):
        yield f"{found['wrong']} texts differ from those of one thread"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("pt", "tf", "flax"), required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the loop")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--parts", default="loop,models,threads,workers")
    given = parser.parse_args()
    run, bad = Run(given.framework), 0
    for part in given.parts.split(","):
        amount = {"loop": (given.minutes,), "models": (given.models,)}.get(part, ())
        found = getattr(run, part)(*amount)
        print(given.framework, part, *(f"{name} {value}" for name, value in found.items() if value != ""), flush=True)
        for fault in faults(part, found):
            print("  FAULT:", fault, flush=True)
            bad += 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
