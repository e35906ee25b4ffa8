"""The command `opt-zoo`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .checkpoints.convert import Plan
from .checkpoints.layouts import LAYOUTS, WRITABLE
from .checkpoints.shards import MAX_SHARD_SIZE
from .continuations import Journal, Row, check_text, continue_all, read_prompts, share, texts
from .files import json_text, naming, plain, read_bytes
from .frameworks import LAUNCHED, registered
from .hub import DEMO
from .progress import counter
from .quantization import QuantizationConfig

KEYS = " or ".join(registered())
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Model = Annotated[str, typer.Option(help='a folder, a Hub name, or "opt-demo"')]
From = Annotated[str | None, typer.Option("--from", help=f"which layout to read of several: {', '.join(LAYOUTS)}")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _drawable(plot: Path | None) -> Path | None:
    if plot is not None:
        from .plots import check_plot

        check_plot(plot)
    return plot


Plot = Annotated[Path | None, typer.Option(callback=_drawable, help="draw it there: a .png, .svg or .pdf")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"opt-zoo {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    show: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show it")] = False,
) -> None:
    """OPT in several frameworks, from one checkpoint."""


@app.command()
def parity(
    model: Model = DEMO,
    prompt: Annotated[str, typer.Option(help="the text to continue")] = "Once upon a time",
    new_tokens: Annotated[int, typer.Option(help="how many tokens to add", min=1)] = 200,
    framework: Annotated[list[str] | None, typer.Option(help=f"{KEYS}; may be repeated; default: all")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Run all frameworks on one text and show how far each is from a float64 run.

    Fails if greedy tokens differ, or if an error relative to the largest magnitude exceeds 2e-5. --plot draws the
    errors layer by layer, with those of transformers where it is installed.
    """
    from .parity import TOLERANCE
    from .parity import parity as run
    from .plots import draw_parity
    from .tokenizer import GPT2Tokenizer

    keys = [_framework(key) for key in framework or registered()]
    given: Row = {"prompt": prompt}
    check_text(given, "prompt")
    ids = GPT2Tokenizer.from_pretrained(model)(prompt)["input_ids"]
    _check_early(model, None, [ids], [given], {"max_new_tokens": new_tokens})
    with Console(stderr=True).status("Running " + ", ".join(registered()[key].title for key in keys)):
        report = run(model, prompt, new_tokens, keys, beside=plot is not None)
    if plot is not None:
        draw_parity(report, TOLERANCE, plot)
    if as_json:
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in report.rows]
        shown = {"model": model, "prompt": prompt, "text": report.text, "passed": report.passed, "rows": rows}
        _print_json(shown | ({} if plot is None else {"beside": report.beside}))
        raise typer.Exit(0 if report.passed else 1)

    title = f"{model}, {new_tokens} greedy tokens after {prompt!r}, float32 against float64"
    summary = Table(title=title, box=box.SIMPLE)
    for name in ("framework", "version", "load s", "tok/s", "tokens", "logits", "layers", ""):
        summary.add_column(name, justify="left" if name in ("framework", "version", "") else "right")
    for row in report.rows:
        title = registered()[row.framework].title
        if row.problem:
            summary.add_row(title, row.version, *["-"] * 5, "[yellow]not run[/]")
            continue
        summary.add_row(
            title,
            row.version.partition("+")[0],
            f"{row.load_seconds:.2f}",
            f"{row.tokens_per_second:.0f}",
            "same" if row.tokens_equal else "[red]not[/]",
            f"{row.logits:.1e}",
            f"{max(row.layers):.1e}",
            "[green]equal[/]" if row.passed else "[red]differs[/]",
        )
    console.print(summary)
    for row in report.rows:
        if row.problem:
            console.print(f"{registered()[row.framework].title}: {row.problem}", markup=False, soft_wrap=True)

    ran = [row for row in report.rows if row.layers]
    if ran:
        layers = Table(title="Largest error over largest magnitude, hidden state by hidden state", box=box.SIMPLE)
        layers.add_column("hidden state")
        for row in ran:
            layers.add_column(registered()[row.framework].title, justify="right")
        last = len(ran[0].layers) - 1
        for i in range(last + 1):
            title = "final" if i == last else f"into layer {i}"
            errors = (row.layers[i] for row in ran)
            layers.add_row(title, *(f"{e:.1e}" if e <= TOLERANCE else f"[red]{e:.1e}[/]" for e in errors))
        console.print(layers)
    console.print(report.text, markup=False, highlight=False)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help='a folder, a Hub name, or "opt-demo"')] = DEMO,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="how often each is timed")] = 5,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compare the speed of what is installed here: the frameworks, and transformers where it is. A quick look.

    Each loads the model in a process of its own, on a GPU if it sees one, and is timed in turns.
    """
    from .bench import bench as run
    from .plots import draw_bench

    if dtype not in (wanted := ("float32", "float16", "bfloat16")):
        raise ValueError(f"--dtype: found {dtype!r}, wanted one of {', '.join(wanted)}")
    found = run(model, dtype, rounds)
    if plot is not None and found.ran:
        draw_bench(found, plot)
    if as_json:
        _print_json(found.as_json())
        raise typer.Exit(0 if found.ran else 1)

    title = f"{model}, {dtype}, one row: the first token after {found.long}, and {found.new} tokens after {found.short}"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for name in ("on", "first, ms", "x", "tok/s", "x", "text"):
        table.add_column(name, justify="left" if name in ("on", "text") else "right", no_wrap=True)
    for row in found.rows:
        if row.problem:
            table.add_row(row.title, "-", *["-"] * 4, "[yellow]not run[/]")
            continue
        first, rate, base = found.first_ms(row), found.rate(row), found.base
        ratios = (found.first_ms(base) / first, rate / found.rate(base))
        same = "same" if row.tokens == base.tokens else "[yellow]another[/]"
        table.add_row(
            row.title, row.device, f"{first:.1f}", f"{ratios[0]:.2f}", f"{rate:.0f}", f"{ratios[1]:.2f}", same
        )
    console.print(table)
    for row in found.rows:
        if row.problem:
            console.print(f"{row.title}: {row.problem}", markup=False, soft_wrap=True)
    if found.ran:
        widest = max(max(seconds) / min(seconds) for row in found.ran for seconds in (row.first, row.whole))
        text = (
            f"x: times faster than {found.base.title}. Medians of {rounds}; the slowest of a cell took up to "
            f"{widest:.1f} times the fastest. A quick look: for numbers to quote, python -m benchmarks --help"
        )
        console.print(text, highlight=False)
    raise typer.Exit(0 if found.ran else 1)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="the texts to continue")] = None,
    file: Annotated[str | None, typer.Option(help='prompts as JSON lines, or "-" for standard input')] = None,
    output: Annotated[
        Path | None, typer.Option(help="write JSON lines there; a killed job continues where it stopped")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="how many prompts at once")] = 8,
    model: Model = DEMO,
    framework: Annotated[str, typer.Option(help=KEYS)] = "pt",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto for the checkpoint's")] = "float32",
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:1; default: a GPU if there is one")] = None,
    attn: Annotated[str | None, typer.Option(help="attention: sdpa, eager, flash_attention_2 or cudnn")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="how many tokens to add at most")] = 100,
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens instead of taking the likeliest")] = False,
    temperature: Annotated[float, typer.Option(help="with --sample: divides the logits")] = 1.0,
    top_k: Annotated[int, typer.Option(help="with --sample: keep the k likeliest tokens; 0 for all")] = 50,
    top_p: Annotated[float, typer.Option(help="with --sample: keep the likeliest tokens that add up to p")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="with --sample: makes the text repeatable")] = None,
    beams: Annotated[int, typer.Option(min=1, help="beam search")] = 1,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 penalizes tokens already there")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends a text; may be repeated")] = None,
    draft: Annotated[str | None, typer.Option(help="a smaller model that drafts tokens: the same text, faster")] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="split the model over so many GPUs; with --device cpu, over processes")
    ] = 1,
    option: Annotated[list[str] | None, typer.Option(help="any other of generate's, as NAME=JSON; repeatable")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts. One is shown as it is written; those of a file are written to a file.

    Under torchrun several processes share the prompts of --file, and with --devices the model.
    """
    from .tokenizer import GPT2Tokenizer

    chosen = registered()[_framework(framework)]
    if chosen.missing:
        raise ImportError(chosen.missing)
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        num_beams=beams, repetition_penalty=repetition_penalty, stop_strings=stop or None,
    ) | _named(option or [])  # fmt: skip
    rank, processes = _among(devices, file, output)
    rows = _rows(prompts, file)
    job = {"model": model, "framework": framework, "dtype": dtype, "attn": attn, "draft": draft, "options": options,
           "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}  # fmt: skip
    tokenizer = GPT2Tokenizer.from_pretrained(model, padding_side="left")
    options = options | {"tokenizer": tokenizer}  # not in the job
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    _check_early(model, draft, ids, rows, options)
    split = devices > 1
    if split and processes == 1:
        chosen.launch(["-m", f"{__package__}.cli", *sys.argv[1:]], devices, device)
        return
    share_of = 0 if split else rank
    journal = None if output is None or (split and rank) else Journal(output, job, share_of)
    settings = {"dtype": dtype} | ({} if attn is None else {"attn_implementation": attn})
    if processes > 1:
        settings |= chosen.meet(job | {"output": output and str(output)}, split, device)
    lengths = [*map(len, ids)]
    mine = share(lengths, batch_size, share_of, 1 if split else processes)
    streams = len(rows) == 1 and output is None and not as_json and console.is_terminal and beams == 1
    load = functools.partial(chosen.model_class().from_pretrained, **settings)
    with chosen.on(device):
        with Console(stderr=True).status(f"Loading {chosen.title}"):
            network = load(model)
            options["assistant_model"] = None if draft is None else load(draft)
        if split:  # all make the same passes
            done = {} if journal is None else journal.done
            mine, streams = chosen.of_first(([i for i in mine if i not in done], streams))
        show = functools.partial(print, end="", flush=True) if rank == 0 else lambda text: None
        if streams:
            show(rows[0]["prompt"])
            for piece in network.stream(**chosen.inputs(tokenizer, [rows[0]["prompt"]]), **options):
                show(piece)
            show("\n")
            return
        write = functools.partial(texts, chosen, network, tokenizer, options)
        with counter(f"Generating with {chosen.title}", len(mine)) as progress:
            found = continue_all(rows, lengths, write, batch_size, journal, progress, mine)
    for row in found if output is None and rank == 0 else []:
        if file is not None:
            print(json.dumps(row, ensure_ascii=False))
        elif as_json:
            _print_json({"model": model, "framework": framework} | row)
        else:
            for text in [row["text"]] if isinstance(row["text"], str) else row["text"]:
                console.print(text, markup=False, highlight=False, soft_wrap=True)


def _among(devices: int, file: str | None, output: Path | None) -> tuple[int, int]:
    """Which process this is of how many that run the command."""
    rank, processes = (int(os.environ.get(name, one)) for name, one in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if devices > 1 and "RANK" in os.environ and devices != processes:
        raise ValueError(f"--devices: found {devices} under torchrun, wanted its {processes} processes, or none")
    if (devices > 1 or processes > 1) and file == "-":
        raise ValueError("--file: found -, wanted a file, which all processes read")
    if devices == 1 and processes > 1:
        if output is None:
            raise ValueError("--output: found none under torchrun, wanted a file, to which its processes write")

        def stop(*_: Any) -> None:  # at once: an exception may come where it is ignored, and what is written stays
            who, how = f"process {rank} of {processes}", "start the command again, and it goes on where it was"
            os.write(2, f"error: {who} was stopped, as all are when one has ended: {how}\n".encode())
            os._exit(1)

        signal.signal(signal.SIGTERM, stop)
    return rank, processes


def _check_early(model: str, draft: str | None, ids: list[list[int]], rows: list[Row], options: dict[str, Any]) -> None:
    """What can be said of a call before its models are loaded, which takes the most of its time. ids: of each row."""
    from .checkpoints.open import find_checkpoint
    from .generation import GenerationConfig
    from .generation.prompts import prompt

    if not all(row["prompt"] for row in rows):
        warnings.warn("prompt: found an empty one; the text starts from nothing", stacklevel=1)
    if draft is not None:
        find_checkpoint(draft, prefer=True)
    checkpoint, config = find_checkpoint(model, prefer=True)
    held = GenerationConfig.from_folder(checkpoint.folder, config)
    longest = max(ids, key=len)
    try:
        with warnings.catch_warnings(action="ignore"):  # generate says it again
            prompt(config, [longest], [[1] * len(longest)], options, held)
    except TypeError as error:  # JSON of another kind than the option takes
        raise ValueError(f"--option: found a value of a wrong type: {error}") from error


def _named(options: list[str]) -> dict[str, Any]:
    """Options of `generate` given as NAME=JSON."""
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError) as error:
            wanted = "NAME=JSON, such as num_return_sequences=2"
            raise ValueError(f"--option: found {option!r:.80}, wanted {wanted}") from error
    return found


def _rows(prompts: list[str] | None, file: str | None) -> list[Row]:
    """The prompts of a command: its arguments, or the lines of a file or of standard input."""
    if (file is None) == (not prompts):
        raise ValueError("prompts, --file: found neither or both, wanted one of them")
    if file is None:
        rows: list[Row] = [{"prompt": prompt} for prompt in prompts or []]
        for row in rows:
            check_text(row, "prompt")
        return rows
    piped = file == "-"
    name = "standard input" if piped else file
    try:
        with naming(name), open(sys.stdin.fileno() if piped else file, encoding="utf-8", closefd=not piped) as lines:
            return read_prompts(lines, name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: wanted UTF-8 text: {error}") from error


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help='a folder, a weight file, a Hub name, or "opt-demo"')],
    target: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option(help=f"layout to write: {', '.join(WRITABLE)}")] = "safetensors",
    layout: From = None,
    dtype: Annotated[str | None, typer.Option(help="cast to float16, bfloat16 or float32; default: unchanged")] = None,
    bits: Annotated[int | None, typer.Option(help="round the layers' matrices to 8 or 4 bits")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="how many weights of a row share a scale; default: all in 8 bits, 128 in 4")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="a text: round so that what the model makes of its beginning changes least; needs PyTorch"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file, such as 200MB")] = MAX_SHARD_SIZE,
    plan: Annotated[
        bool, typer.Option("--plan", help="write nothing; show the files, memory and time it would take")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another layout, dtype or sharding, with its config, generation config and tokenizer.

    Bit for bit unless --dtype or --bits is given. --dtype alone turns quantized weights into floats. Killed at any
    moment, it leaves the target unchanged or complete.
    """
    from .checkpoints import convert as job

    for option, value in (("--group-size", group_size), ("--calibrate", calibrate)):
        if bits is None and value is not None:
            raise ValueError(f"{option}: found {value}, wanted none without --bits")
    quantization = None if bits is None else QuantizationConfig.rounding(bits, group_size)
    if plan:
        _print_plan(job.plan(source, target, to, dtype, max_shard_size, layout, quantization), as_json)
        return
    rounding = None
    if quantization and calibrate:
        rounding = functools.partial(_calibrated, source, calibrate, quantization, layout)
    files = job.convert(source, target, to, dtype, max_shard_size, layout, quantization, rounding)
    written = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    if as_json:
        _print_json(written)
    else:
        for name, size in _some_files((row["file"], row["bytes"]) for row in written):
            console.print(f"{name}  {size:,} bytes", highlight=False, markup=False, soft_wrap=True)


def _calibrated(source: str, text: Path, quantization: QuantizationConfig, layout: str | None, dtype: str) -> Any:
    from .checkpoints.open import find_checkpoint
    from .tokenizer import GPT2Tokenizer

    chosen = registered()["pt"]
    if chosen.missing:
        raise ImportError(chosen.missing)
    ids = GPT2Tokenizer.from_pretrained(source)(read_bytes(text).decode(errors="replace"))["input_ids"]
    length = min(2048, find_checkpoint(source, layout, prefer=True)[1].max_position_embeddings)
    if len(ids) < length:
        raise ValueError(f"--calibrate: found a text of {len(ids)} tokens in {text}, wanted {length} or more")
    rows = np.array(ids[: min(128, len(ids) // length) * length]).reshape(-1, length)
    with chosen.on(None):
        return chosen.calibrate(source, layout, rows, quantization, dtype)


def _some_files(files: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Names and bytes; of very many, as Orbax writes, the first ones and the sum of the others. --json has all."""
    files = list(files)
    if len(files) <= 100:
        return files
    return [*files[:20], (f"and {len(files) - 20} more:", sum(size for _, size in files[20:]))]


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        _print_json({**dataclasses.asdict(plan), "bytes": plan.bytes})
        return
    shown = Table(show_header=False, box=None)
    for name, size in _some_files(plan.files):
        shown.add_row(name, f"{size:,} bytes")
    shown.add_row("all", f"{plan.bytes:,} bytes" + ("" if plan.exact else ", tensor data only"))
    shown.add_row("free", f"{plan.free:,} bytes" + ("" if plan.free > plan.bytes else ", [red]not enough space[/]"))
    shown.add_row("memory", f"{plan.memory:,} bytes at most, twice the largest tensor")
    if plan.seconds is None or plan.write is None:
        shown.add_row("time", "not estimated: cannot write there")
    else:
        rates = f"{plan.read / 1e6:,.0f} MB/s reading and {plan.write / 1e6:,.0f} MB/s writing"
        shown.add_row("time", f"{plan.seconds:,.0f} s, at {rates}, measured now on a short piece")
    console.print(shown, highlight=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help='a folder, a weight file, a Hub name, or "opt-demo"')],
    layout: From = None,
    sha256: Annotated[bool, typer.Option("--sha256", help="a digest of each tensor, the same in all layouts")] = False,
    check: Annotated[bool, typer.Option("--check", help="look for NaN and infinite weights")] = False,
    source: Annotated[
        str | None, typer.Option(help="the floats that 8 or 4 bits were rounded from: show the largest relative error")
    ] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, and what does not fit its config. --plot draws sizes and ranges of values by layer.

    Reads weights only for --sha256, --check, --source and --plot.
    """
    from .checkpoints.examine import examine
    from .checkpoints.fit import SHOWN
    from .plots import draw_ranges

    facts = examine(model, layout, sha256, check, plot is not None, source)
    if plot is not None:
        draw_ranges(model, facts, plot)
    if as_json:
        _print_json(facts)
        return
    digests, not_finite, shards = facts.pop("sha256", {}), facts.pop("not_finite", None), facts.pop("shards")
    facts.pop("ranges", None)
    misfits, dtypes = facts.pop("misfits"), facts.pop("dtypes")
    facts["dtype"] = ", ".join(f"{name} ({count})" if len(dtypes) > 1 else name for name, count in dtypes.items())
    facts["beside"] = ", ".join(facts["beside"]) or None
    if errors := facts.pop("errors", None):
        worst = max(errors, key=lambda name: errors[name])
        facts["largest error"] = f"{errors[worst]:.2%}, {worst}"
    shown = Table(show_header=False, box=None)
    for key, value in facts.items():
        if value is not None:
            shown.add_row(key, f"{value:,}" if isinstance(value, int) else escape(plain(str(value))))
    if len(shards) > 1:
        for name, size in _some_files(shards.items()):
            shown.add_row("shard", f"{escape(plain(name))}  {size:,} bytes")
    shown.add_row("fits its config", "[green]yes[/]" if not misfits else "[red]no[/]")
    if not_finite is not None:
        shown.add_row("NaN or infinite", "[red]found[/]" if not_finite else "[green]none[/]")
    console.print(shown, highlight=False)
    more = [f"and {len(misfits) - SHOWN} more: --json lists all"] if len(misfits) > SHOWN else []
    for line in [
        *misfits[:SHOWN],
        *more,
        *(f"{name}: {count:,} numbers are NaN or infinite" for name, count in (not_finite or {}).items()),
        *(f"{digest}  {name}" for name, digest in digests.items()),
    ]:
        console.print(plain(line), markup=False, highlight=False, soft_wrap=True)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help='a folder, a weight file, a Hub name, or "opt-demo"')],
    second: Annotated[str, typer.Argument(help="another")],
    first_layout: Annotated[str | None, typer.Option("--from", help="layout of the first")] = None,
    second_layout: Annotated[str | None, typer.Option("--with", help="layout of the second")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints, of any layouts, tensor by tensor. Fails if they differ in any bit."""
    from .checkpoints.examine import diff as compare

    found = list(compare(first, second, (first_layout, second_layout)))
    if as_json:
        _print_json({"same": not found, "differences": [dataclasses.asdict(row) for row in found]})
    else:
        for row in found:
            console.print(plain(f"{row.name}: {row.what}: {row.text}"), markup=False, highlight=False, soft_wrap=True)
        console.print(f"{len(found)} differences" if found else "the same, bit for bit", highlight=False)
    raise typer.Exit(1 if found else 0)


def _framework(key: str) -> str:
    if key not in registered():
        raise ValueError(f"framework: found {key!r}, wanted one of {', '.join(registered())}")
    return key


def _print_json(value: Any) -> None:
    print(json_text(value))


def main() -> None:
    """Run the command. An error in the input is one line on stderr and exit status 1, not a traceback."""
    errors = Console(stderr=True)

    def say(kind: str, message: object) -> None:
        short = re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", str(message))
        errors.print(kind, escape(plain(short)), highlight=False, soft_wrap=True)

    def note(message: Warning | str, *_: Any) -> None:
        say("[yellow]note:[/]", message)

    warnings.showwarning = note
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        launched = os.environ.get("TORCHELASTIC_RUN_ID") == LAUNCHED
        if launched and not isinstance(error, ConnectionError):  # the command that started this process says one
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": str(error)}))
        if not launched:
            say("[red]error:[/]", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
