"""The command `opt-zoo`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .checkpoint import Checkpoint
from .config import OPTConfig
from .frameworks import FRAMEWORKS, to_numpy
from .hub import DEMO, fetch_checkpoint
from .tensors import MAX_SHARD_SIZE
from .weights import match, parameter_count

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Model = Annotated[str, typer.Option(help='a folder, a Hub name, or "opt-demo"')]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback()
def describe() -> None:
    """OPT in PyTorch, TensorFlow and JAX, from one checkpoint."""


@app.command()
def parity(
    model: Model = DEMO,
    prompt: Annotated[str, typer.Option(help="the text to continue")] = "Once upon a time",
    new_tokens: Annotated[int, typer.Option(help="how many tokens to add", min=1)] = 200,
    framework: Annotated[list[str] | None, typer.Option(help="pt, tf or flax; may be repeated; default: all")] = None,
    as_json: AsJson = False,
) -> None:
    """Run all frameworks on one text and show how far each is from a float64 run.

    Fails if greedy tokens differ or an error, relative to the largest magnitude, exceeds 2e-5.
    """
    from .parity import TOLERANCE
    from .parity import parity as run

    keys = [_framework(key) for key in framework or FRAMEWORKS]
    with Console(stderr=True).status("Running " + ", ".join(FRAMEWORKS[key].title for key in keys)):
        report = run(model, prompt, new_tokens, keys)
    if as_json:
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in report.rows]
        _print_json({"model": model, "prompt": prompt, "text": report.text, "passed": report.passed, "rows": rows})
        raise typer.Exit(0 if report.passed else 1)

    title = f"{model}, {new_tokens} greedy tokens after {prompt!r}, float32 against float64"
    summary = Table(title=title, box=box.SIMPLE)
    for name in ("framework", "version", "load s", "tok/s", "tokens", "logits", "layers", ""):
        summary.add_column(name, justify="left" if name in ("framework", "version", "") else "right")
    for row in report.rows:
        title = FRAMEWORKS[row.framework].title
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
            console.print(f"{FRAMEWORKS[row.framework].title}: {row.problem}", markup=False, soft_wrap=True)

    ran = [row for row in report.rows if row.layers]
    if ran:
        layers = Table(title="Largest error over largest magnitude, hidden state by hidden state", box=box.SIMPLE)
        layers.add_column("hidden state")
        for row in ran:
            layers.add_column(FRAMEWORKS[row.framework].title, justify="right")
        last = len(ran[0].layers) - 1
        for i in range(last + 1):
            title = "final" if i == last else f"into layer {i}"
            errors = (row.layers[i] for row in ran)
            layers.add_row(title, *(f"{e:.1e}" if e <= TOLERANCE else f"[red]{e:.1e}[/]" for e in errors))
        console.print(layers)
    console.print(report.text, markup=False, highlight=False)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    model: Model = DEMO,
    framework: Annotated[str, typer.Option(help="pt, tf or flax")] = "pt",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto for the checkpoint's")] = "float32",
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens instead of taking the likeliest")] = False,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 50,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    from .tokenizer import GPT2Tokenizer

    chosen = FRAMEWORKS[_framework(framework)]
    if chosen.missing:
        raise ImportError(chosen.missing)
    tokenizer = GPT2Tokenizer.from_pretrained(model)
    with Console(stderr=True).status(f"Generating with {chosen.title}"):
        tokens = (
            chosen.model_class()
            .from_pretrained(model, dtype=dtype)
            .generate(
                **tokenizer(prompt, return_tensors=chosen.tensors),
                max_new_tokens=max_new_tokens,
                do_sample=sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
            )
        )
    ids = to_numpy(tokens)[0].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if as_json:
        _print_json({"model": model, "framework": framework, "text": text, "tokens": ids})
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help='a folder, a Hub name, or "opt-demo"')],
    target: Annotated[Path, typer.Argument(help="the folder to write")],
    dtype: Annotated[str | None, typer.Option(help="cast to float16, bfloat16 or float32; default: as it is")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file, such as 200MB")] = MAX_SHARD_SIZE,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as Hub safetensors: .bin or safetensors in, any dtype and sharding out."""
    from .convert import convert as run

    files = run(source, target, dtype, max_shard_size)
    written = [{"file": str(file), "bytes": file.stat().st_size} for file in files]
    if as_json:
        _print_json(written)
    else:
        for row in written:
            console.print(f"{row['file']}  {row['bytes']:,} bytes", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help='a folder, a Hub name, or "opt-demo"')], as_json: AsJson = False
) -> None:
    """Say what a checkpoint holds, and whether it fits its config. Reads headers, not weights."""
    folder = fetch_checkpoint(model)
    checkpoint, config = Checkpoint(folder), OPTConfig.from_pretrained(folder)
    _, tied = match(checkpoint, config)
    facts = {
        "folder": str(folder),
        "layout": checkpoint.layout,
        "files": len(checkpoint.files),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "tensors": len(checkpoint),
        "dtype": checkpoint.dtype,
        "parameters": parameter_count(dataclasses.replace(config, tie_word_embeddings=tied)),
        "head": "tied to the embedding" if tied else "its own",
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "embedding": config.embed_dim,
        "norm": "before" if config.do_layer_norm_before else "after",
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }
    if as_json:
        _print_json(facts)
        return
    shown = Table(show_header=False, box=None)
    for key, value in facts.items():
        shown.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(shown, highlight=False)


def _framework(key: str) -> str:
    if key not in FRAMEWORKS:
        raise ValueError(f"framework: found {key!r}, wanted one of {', '.join(FRAMEWORKS)}")
    return key


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command; what is wrong with the input is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print("[red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
