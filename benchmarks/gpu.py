"""OPT on the GPU: the frameworks beside transformers, then PyTorch more closely: forward pass, decode, memory, first
token and load, against what the GPU can do.

    python -m benchmarks gpu --out gpu.json                           # all but --compiled
    python -m benchmarks gpu --sections prefill,decode --sizes 350m
    python -m benchmarks gpu --smoke                                  # tiny models on the CPU: proves the code alone

Random weights of the real shapes, float16, the same tensors in both systems. Every fraction "of ceiling" is of what
this GPU did in the `ceilings` section of the same run; "faster" is ours over the best that transformers did there.

ceilings   a copy within the GPU's memory (bytes read + written), and a matrix product of 8192 x 8192 x 8192
frameworks the table of `benchmarks.compare`: a whole call of every system in processes of its own, from one checkpoint;
           prompt 64, 128 new tokens. Twice; JAX's compiled programs are kept from the first process to the second
prefill    forward pass, all logits, no cache. ours: the faster of the attentions given. floor: its FLOPs
           (`report.flops`) at the rate of that matrix product. captured: the call with sdpa as a CUDA graph, made by
           `torch.cuda.make_graphed_callables`, up to 2048 tokens; not counted in "ours" and "faster"
padded     B8 S1024 with half the rows left-padded to half, over the same batch without padding
decode     greedy, prompt 64. whole call: 128 new tokens over the seconds of a whole `generate` (transformers' arms on
           a dynamic cache: 32 new tokens), new tokens of all rows, median. steady: 96 more tokens over the seconds
           that a call with 32 + 96 new tokens takes longer than one with 32: without prefill and setting up.
           "faster" compares whole calls. ceiling: steps that read every weight once, at the copy's rate; of that the
           steady rate, and transformers' whole calls
sampling   steady decode with top_k 50 and top_p 0.9, over greedy
memory     the most that is allocated during `generate`, over weights + cache, in a process of its own
first      in a fresh process, once with empty kernel caches (Triton's, Inductor's, the driver's) and once with those it
           then left: the first token, then 128 and 300 new tokens twice each; what the first of the two took longer
           is compiling, and the first token and all compiling together are "until full speed"
load       `from_pretrained` to the GPU in a fresh process that has loaded opt-demo (once: lazy imports and the like),
           the file in the page cache, over the copy of the file's bytes: the file mapped into memory and sent with
           one `.to("cuda")`. ceiling: the same bytes from pinned memory
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import compare, systems
from benchmarks.load import memory
from benchmarks.peers import Job
from benchmarks.report import MB, ON_CPU, Row, console, flops, heading, over, reason, say, show
from benchmarks.systems import THEIRS, Arm, Setup, event_ms, forward, wall_ms
from opt_common.config import OPTConfig
from opt_common.files import write_atomically
from opt_common.hub import DEMO
from opt_common.weights import byte_count, table
from opt_pt import OPTForCausalLM

SHAPES = [(1, 512), (8, 512), (1, 1024), (8, 1024), (1, 2048), (4, 2048), (8, 2048)]
PROMPT, NEW, SHORT, MORE = 64, 128, 32, 96


@dataclass
class Bench:
    """What the sections need to know, and the models they share."""

    setup: Setup
    sizes: list[str]
    attention: list[str]  # ours; generate, whose steps are the same with each, takes the first
    compiled: bool = False
    copy: float | None = None  # bytes/s
    matmul: float | None = None  # FLOP/s
    held: dict[str, tuple[OPTForCausalLM, Any]] = field(default_factory=dict)

    def models(self, size: str) -> tuple[OPTForCausalLM, Any]:
        if size not in self.held:
            self.held[size] = systems.build(self.setup, size)
        return self.held[size]

    def weight_bytes(self, size: str) -> int:
        return byte_count(self.setup.config(size), str(self.setup.dtype).removeprefix("torch."))

    def child(self, section: str, env: dict[str, str] | None = None, **options: str) -> list[Row]:
        """The rows of a section that needs a process of its own; its models are not beside ours."""
        self.held.clear()
        self.setup.free()
        options = {"sizes": ",".join(self.sizes), "attention": ",".join(self.attention)} | options
        command = [sys.executable, "-m", "benchmarks", "gpu", "--child", section, *(["--smoke"] * self.setup.smoke)]
        for name, value in options.items():
            command += [f"--{name}", value]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=300)
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1])
        return json.loads(ran.stdout.splitlines()[-1])


def ceilings(bench: Bench) -> Iterator[Row]:
    setup = bench.setup
    n = 2**20 if setup.smoke else 2**32
    source = torch.randint(256, (n,), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    bench.copy = _rate(setup, 2 * n, lambda a=source, b=target: b.copy_(a))
    yield {"ceiling": f"copy of {n / 2**30:.3g} GiB, read + written", "rate": bench.copy / 1e12, "unit": "TB/s"}
    del source, target
    setup.free()
    n = 128 if setup.smoke else 8192
    a, b = (torch.randn(n, n, dtype=setup.dtype, device=setup.device) for _ in range(2))
    bench.matmul = _rate(setup, 2 * n**3, lambda: a @ b)
    yield {"ceiling": f"{n} x {n} x {n} matrix product", "rate": bench.matmul / 1e12, "unit": "TFLOP/s"}


def _rate(setup: Setup, amount: int, run: Callable[[], Any]) -> float:
    """Amount per second, the median of 10 rows of 10 calls."""

    def ten() -> None:
        for _ in range(10):
            run()

    ten()
    return 10 * amount / statistics.median(event_ms(setup, ten) for _ in range(setup.repeats(10))) * 1000


def frameworks(bench: Bench) -> Iterator[Row]:
    setup = bench.setup
    bench.held.clear()
    setup.free()  # JAX takes what is free
    systems = [replace(s, dtype="float32") for s in compare.GPU] if setup.smoke else compare.GPU
    for size in bench.sizes:
        planned = compare.plan(systems)
        rows = [row for _, _, row in planned]
        with tempfile.TemporaryDirectory() as folder:
            say(f"frameworks {size}: writing a checkpoint")
            config = checkpoint(setup, size, folder)
            job = Job("", "", folder, [(8, setup.length(2048))], [1, 16])
            job = replace(job, prompt=setup.length(PROMPT), new=setup.length(NEW))
            job = replace(job, repeats=(setup.repeats(7), setup.repeats(4)), device="cpu" if setup.smoke else "gpu")
            env = ON_CPU if setup.smoke else {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax"}
            for _ in range(setup.repeats(2)):
                compare.turn(planned, job, env)
        rates = {"read": bench.copy or 0, "float32" if setup.smoke else "float16": bench.matmul or 0}
        compare.summarize(rows, config, job, rates)
        yield from ({"size": size} | row for row in rows)


def show_frameworks(printed: Console, title: str, rows: list[Row]) -> None:
    """A table for each size, and what the first `generate` of a process took."""
    for size in dict.fromkeys(row["size"] for row in rows):
        some = [row for row in rows if row["size"] == size]
        columns = list(dict.fromkeys(key for row in some for key in row if key.startswith(("prefill", "decode"))))
        lines = [f"{title}: opt-{size}", compare.drawn(some, columns), *compare.notes(some)]
        for row in (row for row in some if "not_run" not in row):
            took = ", ".join(f"{s:.1f}" for s in row["first_s"]["decode B1"])
            lines.append(f"first call of decode B1 in a process, the first process first: {row['system']}: {took} s")
        for line in lines:
            printed.print(line, markup=False, highlight=False)


def prefill(bench: Bench) -> Iterator[Row]:
    for size in bench.sizes:
        ours, theirs = bench.models(size)
        for B, S in SHAPES:
            say(f"prefill {size} B{B} S{S}")
            ids = bench.setup.tokens(size, B, S)
            arms = systems.forward_arms(ours, theirs, bench.attention, ids)
            if B * S <= 2048:  # where the host is what takes the time
                for who, model in (("transformers", theirs), ("ours", ours)):
                    arms[f"captured {who}"] = Arm(model, "sdpa", systems.captured(model, ids))
            ms, not_run = systems.in_turns(bench.setup, arms)
            yield prefill_row(bench, size, B, S, ms, not_run)
        bench.setup.free()


def prefill_row(bench: Bench, size: str, B: int, S: int, ms: dict[str, float], not_run: dict[str, str]) -> Row:
    floor = over(flops(bench.setup.config(size), B, bench.setup.length(S)), bench.matmul)
    floor = None if floor is None else 1000 * floor
    row: Row = {"size": size, "B": B, "S": S, "floor_ms": floor}
    names = [f"transformers {name}" for name in THEIRS] + [f"ours {name}" for name in bench.attention]
    row |= {name: ms.get(name) for name in names}
    row["best_of_transformers"] = _least(ms, "transformers")
    row["ours"] = _least(ms, "ours")
    row["faster"] = over(row["best_of_transformers"], row["ours"])
    row |= {name.replace(" ", "_"): ms.get(name) for name in ("captured transformers", "captured ours")}
    row["of_ceiling"] = over(floor, row["ours"])
    flash = ms.get("ours flash_attention_2")
    row["ours_FA2_over_their_eager"] = over(ms.get("transformers eager"), flash)
    if "eager" in bench.attention:
        row["ours_FA2_over_our_eager"] = over(ms.get("ours eager"), flash)
    return row | {"not_run": not_run}


def _least(ms: dict[str, float], who: str) -> float | None:
    return min((value for name, value in ms.items() if name.startswith(who)), default=None)


def padded(bench: Bench) -> Iterator[Row]:
    for size in bench.sizes:
        say(f"padded {size}")
        ours, theirs = bench.models(size)
        full = bench.setup.tokens(size, 8, 1024)
        ids, mask = full.clone(), torch.ones_like(full)
        half = full.shape[1] // 2
        ids[:4, :half], mask[:4, :half] = 1, 0
        pairs = [("transformers flash_attention_2", theirs, "flash_attention_2")]
        pairs += [(f"ours {name}", ours, name) for name in bench.attention]
        arms = {}
        for name, model, attention in pairs:
            arms[f"{name}, full"] = Arm(model, attention, lambda m=model, x=full: forward(m, x))
            arms[f"{name}, padded"] = Arm(model, attention, lambda m=model, x=ids, a=mask: forward(m, x, a))
        ms, not_run = systems.in_turns(bench.setup, arms)
        for name, _, _ in pairs:
            row: Row = {"size": size, "system": name}
            row |= {"full_ms": ms.get(f"{name}, full"), "padded_ms": ms.get(f"{name}, padded")}
            row["padded_over_full"] = over(row["padded_ms"], row["full_ms"])
            yield row | {"not_run": {arm: why for arm, why in not_run.items() if arm.startswith(name)}}
        bench.setup.free()


def decode(bench: Bench) -> Iterator[Row]:
    setup = bench.setup
    for size in bench.sizes:
        ours, theirs = bench.models(size)
        for B in (1, 16):
            ids = setup.tokens(size, B, PROMPT)
            best = None
            routes = [(name, None) for name in THEIRS] + [("sdpa", "static")] * (bench.compiled and B == 1)
            for name, cache in routes:
                system = f"transformers {name}" + (", static cache, compiled" if cache else "")
                say(f"decode {size} B{B} {system}")
                row: Row = {"size": size, "B": B, "system": system, "whole_call": None, "not_run": {}}
                try:
                    row |= _their_speed(setup, theirs, name, cache, ids)
                    best = max(best or 0, row["whole_call"])
                    row["of_ceiling"] = over(row["whole_call"] / B * bench.weight_bytes(size), bench.copy)
                except Exception as error:  # one arm that cannot run must not cost the others
                    row["not_run"][system] = reason(error)
                yield row

            say(f"decode {size} B{B} ours")
            ours.set_attn_implementation(bench.attention[0])
            call = generator(ours, ids)
            call(setup.length(NEW))
            took = [wall_ms(setup, lambda c=call: c(setup.length(NEW))) for _ in range(setup.repeats(5))]
            whole = 1000 * B * setup.length(NEW) / statistics.median(took)
            tokens = steady(setup, {"greedy": call}, B)["greedy"]
            yield {
                "size": size,
                "B": B,
                "system": f"ours {bench.attention[0]}",
                "whole_call": whole,
                "steady": tokens,
                "ms_a_step": 1000 * B / tokens,
                "faster": over(whole, best),
                "of_ceiling": over(tokens / B * bench.weight_bytes(size), bench.copy),
            }
            setup.free()


def _their_speed(setup: Setup, model: Any, attention: str, cache: str | None, ids: torch.Tensor) -> Row:
    """New tokens per second of transformers' generate. It takes its time, so a dynamic cache gets few tokens."""
    model.set_attn_implementation(attention)
    mask = torch.ones_like(ids)

    def call(new: int) -> None:
        how: Row = {"cache_implementation": cache} if cache else {}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **how)
        _check_length(out, ids, new)

    if cache is None:
        call(setup.length(8))
        new = setup.length(32)
        took = [wall_ms(setup, lambda: call(new)) for _ in range(setup.repeats(2))]
        return {"whole_call": 1000 * ids.shape[0] * new / statistics.median(took)}
    new = setup.length(NEW)  # the cache's size is compiled in: the same for every call
    first = [wall_ms(setup, lambda: call(new)) for _ in range(2)]
    once = statistics.median(wall_ms(setup, lambda: call(new)) for _ in range(setup.repeats(3)))
    return {"whole_call": 1000 * ids.shape[0] * new / once, "compiling_s": (sum(first) - 2 * once) / 1000}


def generator(model: OPTForCausalLM, ids: torch.Tensor, **how: Any) -> Callable[[int], None]:
    """Our generate of so many new tokens, which no end of text cuts short."""

    def call(new: int) -> None:
        _check_length(model.generate(ids, max_new_tokens=new, eos_token_id=[], **how), ids, new)

    return call


def _check_length(out: torch.Tensor, ids: torch.Tensor, new: int) -> None:
    if out.shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"generate: {out.shape[1] - ids.shape[1]} new tokens, wanted {new}")


def steady(setup: Setup, calls: dict[str, Callable[[int], None]], B: int, times: int = 3) -> dict[str, float]:
    """New tokens per second over all rows, without what a call costs once; the calls in turns."""
    short, more = setup.length(SHORT), setup.length(MORE)
    lengths = (short, short + more)
    took: dict[tuple[str, int], list[float]] = {(name, n): [] for name in calls for n in lengths}
    for i in range(1 + setup.repeats(times)):
        for name, n in took:
            ms = wall_ms(setup, lambda c=calls[name], n=n: c(n))
            if i > 0:  # the first of each is the warm-up
                took[name, n].append(ms)
    ms = {key: statistics.median(values) for key, values in took.items()}
    return {name: 1000 * B * more / (ms[name, short + more] - ms[name, short]) for name in calls}


def sampling(bench: Bench) -> Iterator[Row]:
    size = bench.sizes[-1]
    say(f"sampling {size}")
    ours, _ = bench.models(size)
    ours.set_attn_implementation(bench.attention[0])
    ids = bench.setup.tokens(size, 1, PROMPT)
    sample = {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0}
    speed = steady(bench.setup, {"greedy": generator(ours, ids), "sampled": generator(ours, ids, **sample)}, 1, 5)
    for name, tokens in speed.items():
        row: Row = {"size": size, "B": 1, "choice": name, "steady": tokens, "over_greedy": tokens / speed["greedy"]}
        yield row | {"of_ceiling": over(tokens * bench.weight_bytes(size), bench.copy)}


def memory_of_decode(bench: Bench) -> Iterator[Row]:
    say("memory, in a process of its own")
    if bench.setup.smoke:
        yield {"not_run": {"memory": "it is the GPU's"}}
        return
    yield from bench.child("memory")


def memory_child(bench: Bench) -> Iterator[Row]:
    """The most allocated over two calls, as what a call leaves behind is the next one's burden."""
    for size in bench.sizes:
        ours = systems.build_ours(bench.setup, size)
        ours.set_attn_implementation(bench.attention[0])
        config = ours.config
        for B in (1, 16):
            call = generator(ours, bench.setup.tokens(size, B, PROMPT))
            bench.setup.free()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                call(NEW)
            slots = PROMPT + NEW - 1  # the last token is never fed back
            cache = 2 * config.num_hidden_layers * B * slots * config.hidden_size * 2
            wanted, peak = bench.weight_bytes(size) + cache, torch.cuda.max_memory_allocated()
            reserved = torch.cuda.max_memory_reserved()
            yield {
                "size": size,
                "B": B,
                "weights_MB": bench.weight_bytes(size) / MB,
                "cache_MB": cache / MB,
                "before_MB": before / MB,
                "peak_MB": peak / MB,
                "over_weights_and_cache": peak / wanted,
                "reserved_MB": reserved / MB,
                "reserved_over_weights_and_cache": reserved / wanted,
            }
        del ours, call


def first(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH")
        env = {name: str(Path(folder) / name) for name in names}
        for caches in ("empty", "filled"):
            say(f"first, kernel caches {caches}, in a process of its own")
            for row in bench.child("first", env, sizes=bench.sizes[-1]):
                yield {"kernel_caches": caches} | row


def first_child(bench: Bench) -> Iterator[Row]:
    setup, size = bench.setup, bench.sizes[-1]
    ours = systems.build_ours(setup, size)
    ours.set_attn_implementation(bench.attention[0])
    call = generator(ours, setup.tokens(size, 1, PROMPT))
    token = wall_ms(setup, lambda: call(1))
    took = {new: [wall_ms(setup, lambda n=new: call(setup.length(n))) for _ in range(2)] for new in (NEW, 300)}
    compiling = sum(max(0.0, a - b) for a, b in took.values())
    speed = {new: [1000 * setup.length(new) / ms for ms in values] for new, values in took.items()}
    yield {
        "size": size,
        "system": f"ours {bench.attention[0]}",
        "first_token_s": token / 1000,
        "until_full_speed_s": (token + compiling) / 1000,
        "128_new_tokens_per_s": speed[NEW][0],
        "128_again": speed[NEW][1],
        "300_new_tokens_per_s": speed[300][0],
        "300_again": speed[300][1],
    }


def load(bench: Bench) -> Iterator[Row]:
    setup, size = bench.setup, bench.sizes[-1]
    with tempfile.TemporaryDirectory() as folder:
        say(f"load: writing a checkpoint of opt-{size}")
        checkpoint(setup, size, folder)
        say("load, in a process of its own")
        yield from bench.child("load", sizes=size, folder=folder)


def checkpoint(setup: Setup, size: str, folder: str) -> OPTConfig:
    """Random weights, drawn on the GPU; norms are left at that too."""
    from safetensors.torch import save_file

    config = setup.config(size)
    config.save_pretrained(folder)
    draw = {s.name: torch.empty(s.shape, dtype=setup.dtype, device=setup.device) for s in table(config)}
    save_file({k: v.normal_(0, 0.02) for k, v in draw.items()}, f"{folder}/model.safetensors", {"format": "pt"})
    return config


def load_child(bench: Bench, folder: Path) -> Iterator[Row]:
    setup, size = bench.setup, bench.sizes[-1]
    file = folder / "model.safetensors"
    n, dtype = file.stat().st_size, str(setup.dtype).removeprefix("torch.")
    piece = bytearray(64 * 2**20)
    with open(file, "rb", buffering=0) as stream:  # into the page cache, if it is not there already
        while stream.readinto(piece):
            pass
    torch.zeros(1, device=setup.device).add_(1)  # starting CUDA is the process's cost, not the load's

    def loading(path: Path | str) -> float:
        return wall_ms(setup, lambda: OPTForCausalLM.from_pretrained(path, dtype=dtype, device=setup.device)) / 1000

    def mapped() -> torch.Tensor:
        return torch.from_file(str(file), shared=False, size=n, dtype=torch.uint8)

    def copying() -> torch.Tensor:
        return mapped().clone() if setup.smoke else mapped().to(setup.device)

    once = loading(DEMO)
    before = memory("VmRSS")
    forget_peak()
    load_s = loading(folder)
    peak = host_peak() - before
    row: Row = {"size": size, "file_MB": n / MB, "once_s": once, "load_s": load_s, "again_s": loading(folder)}
    setup.free()
    row["copy_s"] = statistics.median(wall_ms(setup, copying) / 1000 for _ in range(setup.repeats(3)))
    row["load_over_copy"] = load_s / row["copy_s"]
    if not setup.smoke:
        pinned = mapped()[: 2**30].pin_memory()
        target = torch.empty_like(pinned, device=setup.device)
        ms = statistics.median(event_ms(setup, lambda: target.copy_(pinned)) for _ in range(5))
        row["copy_from_pinned_s"] = ms / 1000 * n / pinned.numel()
        row["of_ceiling"] = row["copy_from_pinned_s"] / load_s
    row |= {"host_peak_MB": peak / MB, "largest_shard_MB": n / MB, "host_peak_over_largest_shard": peak / n}
    yield row


def forget_peak() -> None:
    """Reset VmHWM, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        say(f"host_peak_MB is the peak since the process began, an upper bound: {reason(error)}")


def host_peak() -> int:
    """The highest resident memory of this process, in bytes."""
    try:
        return memory("VmHWM")
    except StopIteration:  # a sandbox whose kernel does not tell
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SECTIONS: dict[str, tuple[str, Callable[[Bench], Iterator[Row]]]] = {
    "ceilings": ("What the GPU can do", ceilings),
    "frameworks": ("The frameworks side by side", frameworks),
    "prefill": ("Forward pass, all logits, no cache: milliseconds", prefill),
    "padded": ("Left-padded B8 S1024, half the rows half padding", padded),
    "decode": (f"Greedy decode, prompt {PROMPT}: new tokens per second over all rows", decode),
    "sampling": ("Sampling, top_k 50, top_p 0.9: new tokens per second", sampling),
    "memory": (f"GPU memory of generate, prompt {PROMPT}, {NEW} new tokens", memory_of_decode),
    "first": ("First use in a fresh process, weights made, B1", first),
    "load": ("from_pretrained straight to the GPU, page cache warm", load),
}


JAX_TARGETS = (
    ("2.7b", "prefill B8 S2048", "≤", 160),
    ("350m", "prefill B8 S2048", "≤", 25),
    ("2.7b", "decode B1", "≥", 430),
    ("350m", "decode B1", "≥", 1200),
    ("2.7b", "decode B16", "≥", 6000),
    ("350m", "decode B16", "≥", 18000),
)


def targets(report: Row) -> list[Row]:
    """The table of the project's targets, each with what this run reached; one that was not measured says so."""

    def rows(section: str, **where: Any) -> list[Row]:
        found = report["sections"].get(section, {}).get("rows", [])
        return [row for row in found if all(row.get(key) == value for key, value in where.items())]

    def row(section: str, **where: Any) -> Row:
        return next(iter(rows(section, **where)), {})

    result: list[Row] = []

    def target(
        what: str, sign: str, limit: float, unit: str, reached: Any, theirs: Any = None, part: Any = None
    ) -> None:
        met = "not measured" if reached is None else "NO"
        if reached is not None and (reached <= limit if sign == "≤" else reached >= limit):
            met = "yes"
        ratio = over(theirs, reached) if sign == "≤" else over(reached, theirs)
        line: Row = {"target": what, "to_reach": f"{sign} {limit:,} {unit}".strip(), "reached": reached}
        line |= {
            "met": "smoke" if report["smoke"] else met,
            "transformers": theirs,
            "better": ratio,
            "of_ceiling": part,
        }
        result.append(line)

    cells = [cell for cell in rows("prefill") if cell["faster"] is not None]
    least = min(cells, key=lambda cell: cell["faster"], default={})
    where = f"{least['size']} B{least['B']} S{least['S']}" if least else ""
    what = f"prefill against the best of transformers: least of {len(cells)} cells, {where}"
    target(what, "≥", 1, "x", least.get("faster"), None, least.get("of_ceiling"))
    for size, B, S, limit in (("350m", 1, 512, 3), ("2.7b", 8, 2048, 150), ("350m", 8, 2048, 23)):
        cell = row("prefill", size=size, B=B, S=S)
        numbers = (cell.get(key) for key in ("ours", "best_of_transformers", "of_ceiling"))
        target(f"prefill {size} B{B} S{S}", "≤", limit, "ms", *numbers)
        if (ours := cell.get("captured_ours")) is not None:
            numbers = (ours, cell.get("captured_transformers"), over(cell["floor_ms"], ours))
            target(f"prefill {size} B{B} S{S}, captured", "≤", limit, "ms", *numbers)
    for size, limit in (("2.7b", 4.2), ("350m", 9)):
        cell = row("prefill", size=size, B=8, S=2048)
        theirs = over(cell.get("transformers eager"), cell.get("transformers flash_attention_2"))
        target(
            f"FA2 against their eager, {size} B8 S2048", "≥", limit, "x", cell.get("ours_FA2_over_their_eager"), theirs
        )
    for size in ("2.7b", "350m"):
        who = ("ours flash_attention_2", "transformers flash_attention_2")
        numbers = (row("padded", size=size, system=name).get("padded_over_full") for name in who)
        target(f"padded over full, FA2, {size} B8 S1024", "≤", 0.85, "", *numbers)
    for size, B, limit in (("2.7b", 1, 450), ("350m", 1, 1500), ("2.7b", 16, 6000), ("350m", 16, 18000)):
        found = rows("decode", size=size, B=B)
        theirs = [r["whole_call"] for r in found if r["system"].startswith("transformers") and r["whole_call"]]
        ours = next((r for r in found if r["system"].startswith("ours")), {})
        for key in ("steady", "whole_call"):
            part = over(ours["of_ceiling"] * ours[key], ours["steady"]) if ours.get("of_ceiling") else None
            what = f"greedy decode {size} B{B}, {key.replace('_', ' ')}"
            target(what, "≥", limit, "tokens/s", ours.get(key), max(theirs, default=None), part)
    for size, column, sign, limit in JAX_TARGETS:
        cell = row("frameworks", size=size, key="opt_flax").get(column, {})
        theirs = over(cell.get("median"), cell.get("x_best"))
        unit = "ms" if sign == "≤" else "tokens/s"
        target(f"opt_flax {column} {size}", sign, limit, unit, cell.get("median"), theirs, cell.get("of_ceiling"))
    sampled = row("sampling", size="2.7b", choice="sampled")
    target("sampling over greedy, 2.7b B1", "≥", 0.95, "", sampled.get("over_greedy"), None, sampled.get("of_ceiling"))
    fresh = row("first", size="2.7b", kernel_caches="empty")
    target("first token, 2.7b, fresh process, empty caches", "≤", 5, "s", fresh.get("first_token_s"))
    target("the same and all compiling, until full speed", "≤", 5, "s", fresh.get("until_full_speed_s"))
    most = max((r["over_weights_and_cache"] for r in rows("memory") if "size" in r), default=None)
    target("GPU memory while decoding over weights + cache, the most", "≤", 1.1, "", most)
    loaded = row("load", size="2.7b")
    target("from_pretrained 2.7b over copy", "≤", 1.5, "", loaded.get("load_over_copy"), None, loaded.get("of_ceiling"))
    target("its host memory over largest shard", "≤", 1, "", loaded.get("host_peak_over_largest_shard"))
    return result


def gpu(
    out: Annotated[Path | None, typer.Option(help="JSON with every number, written after each section")] = None,
    sections: Annotated[str, typer.Option(help="the ceilings are always measured")] = ",".join(SECTIONS),
    sizes: Annotated[str, typer.Option(help="sampling, first and load take the last")] = "350m,2.7b",
    attention: Annotated[str, typer.Option(help="ours; generate takes the first")] = "",
    compiled: Annotated[bool, typer.Option(help="transformers' static cache + torch.compile too: minutes")] = False,
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """The frameworks on the GPU beside transformers, and PyTorch more closely."""
    default = "sdpa,flash_attention_2" if smoke else "flash_attention_2,sdpa"  # generate must run in a smoke run
    bench = Bench(Setup(smoke), sizes.split(","), (attention or default).split(","), compiled)
    if smoke:
        torch.set_num_threads(1)  # tiny models: threads would only wait for each other
    if child:
        rows = {"memory": memory_child, "first": first_child, "load": lambda b: load_child(b, folder)}[child](bench)
        print(json.dumps(list(rows)))
        return
    unknown = [name for name in sections.split(",") if name not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: wanted some of {', '.join(SECTIONS)}")
    printed = console()
    report: Row = systems.machine(bench.setup) | {"sections": {}}
    printed.print(heading(report), report["dtype"], highlight=False)
    for name in ["ceilings", *(name for name in sections.split(",") if name != "ceilings")]:
        title, measure = SECTIONS[name]
        entry = report["sections"][name] = {"rows": []}
        start = time.perf_counter()
        try:
            for row in measure(bench):
                entry["rows"].append(row)
        except Exception as error:  # the other sections are still worth their numbers
            entry["failed"] = reason(error)
        entry["seconds"] = time.perf_counter() - start
        report["targets"] = targets(report)
        if out is not None:
            write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (show_frameworks if name == "frameworks" else show)(printed, title, entry["rows"])
        if "failed" in entry:
            printed.print(f"FAILED: {entry['failed']}", style="red", markup=False)
        printed.print(f"{entry['seconds']:.1f} s\n", highlight=False)
    show(printed, "Targets", report["targets"])
    entries = report["sections"].values()
    # without a GPU some arms cannot run; with one, each that did not is a failure
    missing = not smoke and any(row.get("not_run") for entry in entries for row in entry["rows"])
    if missing or any("failed" in entry for entry in entries):
        raise typer.Exit(1)
