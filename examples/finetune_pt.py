"""Fine-tune a causal OPT on a text file, in PyTorch; killed and started again it goes on from its last save.

python examples/finetune_pt.py TEXT OUT    # OUT gets the model, and loss.png
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from rich.progress import track

from opt_pt import GPT2Tokenizer, OPTForCausalLM

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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = GPT2Tokenizer.from_pretrained(model_name)
    model = OPTForCausalLM.from_pretrained(model_name, device=device).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    words = np.array(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    losses: list[float] = []

    saved = out / "training.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]

    print(f"step {len(losses)} of {steps}", flush=True)
    for step in track(range(len(losses), steps), "steps"):
        torch.manual_seed(step)  # dropout is the same whether or not the run was broken off before
        starts = np.random.default_rng(step).integers(0, len(words) - tokens, rows)
        batch = torch.tensor(words[starts[:, None] + np.arange(tokens)], device=device)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            torch.save(state, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)  # the old save or the new one, never half of one

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("loss, nats per token")
    plt.savefig(out / "loss.png")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {out} holds the model and loss.png")


if __name__ == "__main__":
    typer.run(main)
