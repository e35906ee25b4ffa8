"""Train opt-demo, the small OPT inside this package, from plain-text files with opt_pt.

    python examples/train_demo.py CORPUS_FOLDER OUT_FOLDER

CORPUS_FOLDER holds .txt files of English prose. One paragraph in twenty is kept out of training, in blocks, to measure
the validation loss. The last weights are written, in float16, with their tokenizer: on a million tokens the validation
loss is lowest early, while the sentences are still bad; they improve as the model learns the books by heart.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import typer
from rich.progress import track

from opt_pt import GPT2Tokenizer, OPTConfig, OPTForCausalLM

VOCAB_SIZE, CONTEXT = 4096, 512
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids 0 to 3
BLOCK, EVERY = 20, 20  # blocks of 20 paragraphs, of which each 20th is for validation


def read_paragraphs(folder: Path) -> list[str]:
    """The paragraphs of all files, in order. Prose comes hard-wrapped at about 70 characters: it is unwrapped; verse,
    with its short lines, is left as it is."""
    paragraphs = []
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            lines = [line.rstrip() for line in block.strip("\n").splitlines()]
            if not any(lines):
                continue
            wrapped = len(lines) > 1 and np.mean([len(line) for line in lines[:-1]]) > 55
            paragraphs.append(" ".join(line.strip() for line in lines) if wrapped else "\n".join(lines))
    return paragraphs


def train_tokenizer(paragraphs: list[str]) -> GPT2Tokenizer:
    """GPT-2's byte-level BPE with OPT's special tokens in front."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(paragraphs, vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    return GPT2Tokenizer(learned["vocab"], merges)


class Stream:
    """Tokens of consecutive paragraphs, and where each paragraph begins."""

    def __init__(self, paragraphs: list[str], tokenizer: GPT2Tokenizer, device: str) -> None:
        texts = [paragraph + "\n\n" for paragraph in paragraphs]
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.starts = torch.tensor(np.cumsum([0, *map(len, rows)])[:-1], device=device)
        self.tokens = torch.tensor([token for row in rows for token in row], device=device)
        self.characters = sum(map(len, texts))
        self.starts = self.starts[self.starts < len(self.tokens) - CONTEXT]

    def rows(self, starts: torch.Tensor, bos: int) -> torch.Tensor:
        """[B, CONTEXT]: `</s>`, as before every text that OPT reads, and the tokens from each start."""
        body = self.tokens[starts[:, None] + torch.arange(CONTEXT - 1, device=starts.device)]
        return torch.cat([torch.full_like(body[:, :1], bos), body], dim=1)


@torch.no_grad()
def validation_loss(model: OPTForCausalLM, stream: Stream, bos: int) -> float:
    """Mean loss, nats per token, over the whole stream in windows of CONTEXT."""
    model.eval()
    starts = torch.arange(0, len(stream.tokens) - CONTEXT, CONTEXT - 1, device=stream.tokens.device)
    losses = []
    for part in starts.split(32):
        rows = stream.rows(part, bos)
        losses.append(model(rows, labels=rows).loss * len(part))
    model.train()
    return float(torch.stack(losses).sum() / len(starts))


def main(
    corpus: Path,
    out: Path,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 3000,
    batch: Annotated[int, typer.Option(help="rows of 512 tokens a step")] = 32,
    dropout: Annotated[float, typer.Option()] = 0.1,
    learning_rate: Annotated[float, typer.Option()] = 1.5e-3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train opt-demo on the .txt files in CORPUS and write it to OUT."""
    torch.manual_seed(seed)
    paragraphs = read_paragraphs(corpus)
    held_out = [i // BLOCK % EVERY == EVERY - 1 for i in range(len(paragraphs))]
    train_text = [p for p, out_ in zip(paragraphs, held_out, strict=True) if not out_]
    valid_text = [p for p, out_ in zip(paragraphs, held_out, strict=True) if out_]
    tokenizer = train_tokenizer(train_text)
    train, valid = (Stream(text, tokenizer, device) for text in (train_text, valid_text))
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        ffn_dim=1024,
        max_position_embeddings=CONTEXT,
        dropout=dropout,
    )
    model = OPTForCausalLM(config).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train.tokens):,} tokens to learn from")

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    forward = torch.compile(model) if device == "cuda" else model
    best = math.inf
    for step in track(range(1, steps + 1), description="Training"):
        starts = train.starts[torch.randint(len(train.starts), (batch,), device=device)]
        rows = train.rows(starts, config.bos_token_id or 0)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            now = validation_loss(model, valid, config.bos_token_id or 0)
            best = min(best, now)
            print(f"step {step:5}  training loss {loss.item():.3f}  validation loss {now:.3f}", flush=True)

    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = OPTForCausalLM.from_pretrained(out, device=device)
    rounded = validation_loss(model, valid, config.bos_token_id or 0)  # of the float16 weights that were written
    per_character = rounded * len(valid.tokens) / valid.characters / math.log(2)
    print(f"validation loss {rounded:.3f} nats per token, {per_character:.3f} bits per character; lowest {best:.3f}")
    model.eval()
    for prompt in ("Once upon a time", "It was a cold morning", "The President", "My dear Watson,"):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device)
        for sample in (False, True):
            tokens = model.generate(ids, max_new_tokens=80, do_sample=sample, top_k=40, seed=0, temperature=0.8)
            text = tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)
            print(f"--- {'sampled' if sample else 'greedy'}\n{text}")


if __name__ == "__main__":
    typer.run(main)
