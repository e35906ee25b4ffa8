"""Every measurement of this project: `python -m benchmarks --help`."""

from __future__ import annotations

import typer

from benchmarks import (
    bits,
    compare,
    convert,
    generation,
    gpu,
    growth,
    load,
    parallel,
    perplexity,
    picture,
    speedup,
    train,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What the claims about speed and memory rest on.")
app.command()(bits.bits)
app.command()(compare.cpu)
app.command()(convert.convert)
app.command()(generation.generation)
app.command()(gpu.gpu)
app.command()(growth.growth)
app.command()(load.load)
app.command("parallel")(parallel.parallel_)
app.command("perplexity")(perplexity.perplexities)
app.command()(picture.picture)
app.command()(train.train)
app.add_typer(speedup.app, name="speedup")

if __name__ == "__main__":
    app()
