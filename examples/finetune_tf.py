"""Fine-tune a causal OPT on a text file, in Keras; killed and started again it goes on from its last save.

python examples/finetune_tf.py TEXT OUT    # OUT gets the model, and loss.png
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import typer

from opt_tf import GPT2Tokenizer, TFOPTForCausalLM

matplotlib.use("Agg")  # no window

import keras
import matplotlib.pyplot as plt


class Batches(keras.utils.PyDataset):
    """Rows of consecutive tokens, of the steps from `first` on."""

    def __init__(self, words: np.ndarray, rows: int, tokens: int, first: int, steps: int) -> None:
        super().__init__()
        self.words, self.rows, self.tokens, self.first, self.steps = words, rows, tokens, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, i: int) -> tuple[dict[str, np.ndarray]]:
        starts = np.random.default_rng(self.first + i).integers(0, len(self.words) - self.tokens, self.rows)
        batch = self.words[starts[:, None] + np.arange(self.tokens)]
        return ({"input_ids": batch, "labels": batch},)


class Save(keras.callbacks.Callback):
    """The model with its optimizer and dropout's seeds, and the losses so far."""

    def __init__(self, out: Path, losses: list[float], every: int) -> None:
        super().__init__()
        self.out, self.losses, self.every, self.total = out, losses, every, 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        total = (logs or {})["loss"] * (batch + 1)  # Keras tells the mean of the run so far
        self.losses.append(total - self.total)
        self.total = total
        if len(self.losses) % self.every == 0:
            (self.out / "losses.new").write_text(json.dumps(self.losses))
            self.model.save(self.out / "new.keras")
            # each the old save or the new one, never half of one; what losses.json holds beyond the model is cut off
            os.replace(self.out / "losses.new", self.out / "losses.json")
            os.replace(self.out / "new.keras", self.out / "training.keras")


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
    keras.utils.set_random_seed(0)
    tokenizer = GPT2Tokenizer.from_pretrained(model_name)
    words = np.array(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    losses: list[float] = []
    if (out / "training.keras").exists():
        model = keras.saving.load_model(out / "training.keras")
        losses = json.loads((out / "losses.json").read_text())[: int(model.optimizer.iterations)]
    else:
        model = TFOPTForCausalLM.from_pretrained(model_name)
        model.compile(keras.optimizers.AdamW(learning_rate))

    print(f"step {len(losses)} of {steps}", flush=True)
    if len(losses) < steps:
        batches = Batches(words, rows, tokens, len(losses), steps)
        model.fit(batches, shuffle=False, callbacks=[Save(out, losses, save_every)])

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("loss, nats per token")
    plt.savefig(out / "loss.png")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {out} holds the model and loss.png")


if __name__ == "__main__":
    typer.run(main)
