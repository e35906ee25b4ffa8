"""Fine-tune a causal OPT on a text file, in Flax NNX; killed and started again it goes on from its last save.

python examples/finetune_flax.py TEXT OUT    # OUT gets the model, and loss.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax import nnx
from rich.progress import track

from opt_flax import FlaxOPTForCausalLM, GPT2Tokenizer

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt


def main(
    text: Annotated[Path, typer.Argument(help="UTF-8")],
    out: Annotated[Path, typer.Argument(help="a folder, made if need be")],
    model_name: Annotated[str, typer.Option("--model", help="a Hub name or a folder")] = "opt-demo",
    steps: Annotated[int, typer.Option()] = 200,
    save_every: Annotated[int, typer.Option()] = 50,
    rows: Annotated[int, typer.Option()] = 8,
    tokens: Annotated[int, typer.Option(help="a row")] = 64,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
) -> None:
    """Fine-tune a causal OPT on a text file."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = GPT2Tokenizer.from_pretrained(model_name)
    model = FlaxOPTForCausalLM.from_pretrained(model_name)
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)
    words = np.array(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    losses: list[float] = []

    graph, state = nnx.split((model, optimizer))
    saves = ocp.CheckpointManager((out / "training").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1))
    if saves.latest_step() is not None:
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(state), losses=ocp.args.JsonRestore())
        found = saves.restore(saves.latest_step(), args=wanted)
        state, losses = found["state"], found["losses"]

    def learn(state: Any, batch: jax.Array, step: int) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        rngs = nnx.Rngs(dropout=jax.random.key(step))  # the same whether or not the run was broken off before
        loss, gradients = nnx.value_and_grad(lambda m, r: m(batch, labels=batch, rngs=r).loss)(model, rngs)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    learn_compiled = jax.jit(learn, donate_argnums=0)  # the old state's memory is the new one's
    print(f"step {len(losses)} of {steps}", flush=True)
    for step in track(range(len(losses), steps), "steps"):
        starts = np.random.default_rng(step).integers(0, len(words) - tokens, rows)
        state, loss = learn_compiled(state, words[starts[:, None] + np.arange(tokens)], step)
        losses.append(float(loss))
        if len(losses) % save_every == 0:
            saved = ocp.args.Composite(state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(losses))
            saves.save(len(losses), args=saved)
            saves.wait_until_finished()  # the next step takes the memory that is being written

    saves.close()
    nnx.update((model, optimizer), state)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("loss, nats per token")
    plt.savefig(out / "loss.png")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {out} holds the model and loss.png")


if __name__ == "__main__":
    typer.run(main)
