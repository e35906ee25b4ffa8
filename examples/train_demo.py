"""Train opt-demo, the small OPT inside this package, from plain-text files with opt_pt.

    python examples/train_demo.py CORPUS_FOLDER OUT_FOLDER --often grimm=4 --often holmes=2 --often shakespeare=0.5

CORPUS_FOLDER holds .txt files of English prose. One paragraph in twenty is kept out of training, in blocks, to measure
the validation loss. The last weights are written, in float16, with their tokenizer.

Five million parameters and a million tokens make no storyteller, so this recipe makes a reciter: without dropout the
model learns its books by heart, and the validation loss, lowest early on, is given up for that. Two things let it
recite from a few words of a prompt. Most rows are short, so that many begin at a paragraph with nothing before it. And
some input tokens are replaced at random, so that one wrong token does not throw it off.
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

VOCAB_SIZE, CONTEXT = 2048, 512
LENGTHS = (512, 64, 128, 256)  # of the rows, in turns; a step has the same number of tokens with each
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids 0 to 3
BLOCK, EVERY = 20, 20  # blocks of 20 paragraphs, of which each 20th is for validation


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a file, in order. Prose comes hard-wrapped at about 70 characters: it is unwrapped; verse, with
    its short lines, is left as it is."""
    paragraphs = []
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

    def rows(self, starts: torch.Tensor, bos: int, length: int = CONTEXT) -> torch.Tensor:
        """[B, length]: `</s>`, as before every text that OPT reads, and the tokens from each start."""
        body = self.tokens[starts[:, None] + torch.arange(length - 1, device=starts.device)]
        return torch.cat([torch.full_like(body[:, :1], bos), body], dim=1)


def disturbed(rows: torch.Tensor, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """[B, T] rows with tokens replaced by random ones of `tokens`, `share` of them on average: none of a row's to
    twice that share. The first, `</s>`, stays."""
    others = tokens[torch.randint(len(tokens), rows.shape, device=rows.device)]
    hit = torch.rand(rows.shape, device=rows.device) < 2 * share * torch.rand(len(rows), 1, device=rows.device)
    hit[:, 0] = False
    return torch.where(hit, others, rows)


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
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 14000,
    batch: Annotated[int, typer.Option(help="rows of 512 tokens a step, or as many tokens in shorter rows")] = 32,
    often: Annotated[list[str], typer.Option(help="NAME=TIMES: how often NAME.txt is read, beside the others")] = [],  # noqa: B006
    noise: Annotated[float, typer.Option(help="share of the input tokens that are replaced")] = 0.1,
    dropout: Annotated[float, typer.Option()] = 0.0,
    learning_rate: Annotated[float, typer.Option()] = 1.5e-3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train opt-demo on the .txt files in CORPUS and write it to OUT."""
    torch.manual_seed(seed)
    times = {name: float(number) for name, number in (item.split("=") for item in often)}
    texts = [(p, times.get(path.stem, 1.0)) for path in sorted(corpus.glob("*.txt")) for p in read_paragraphs(path)]
    held_out = [i // BLOCK % EVERY == EVERY - 1 for i in range(len(texts))]
    train_text = [p for (p, _), out_ in zip(texts, held_out, strict=True) if not out_]
    valid_text = [p for (p, _), out_ in zip(texts, held_out, strict=True) if out_]
    tokenizer = train_tokenizer(train_text)
    train, valid = (Stream(text, tokenizer, device) for text in (train_text, valid_text))
    weights = torch.tensor([w for (_, w), out_ in zip(texts, held_out, strict=True) if not out_], device=device)
    weights = weights[: len(train.starts)]
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=1024,
        max_position_embeddings=CONTEXT,
        dropout=dropout,
    )
    model, bos = OPTForCausalLM(config).to(device).train(), config.bos_token_id or 0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train.tokens):,} tokens to learn from")

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    forward = torch.compile(model, dynamic=False) if device == "cuda" else model
    best = math.inf
    for step in track(range(1, steps + 1), description="Training"):
        length = LENGTHS[step % len(LENGTHS)]
        chosen = torch.multinomial(weights, batch * CONTEXT // length, replacement=True)
        rows = train.rows(train.starts[chosen], bos, length)
        with torch.autocast(device, torch.bfloat16):
            logits = forward(disturbed(rows, train.tokens, noise), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            now = validation_loss(model, valid, bos)
            best = min(best, now)
            print(f"step {step:5}  training loss {loss.item():.3f}  validation loss {now:.3f}", flush=True)

    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = OPTForCausalLM.from_pretrained(out, device=device)
    rounded = validation_loss(model, valid, bos)  # of the float16 weights that were written
    per_character = rounded * len(valid.tokens) / valid.characters / math.log(2)
    print(f"validation loss {rounded:.3f} nats per token, {per_character:.3f} bits per character; lowest {best:.3f}")
    model.eval()
    for prompt in ("Once upon a time", "It was a cold morning", "The President", "My dear Watson,"):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device)
        for sample in (False, True):
            tokens = model.generate(ids, max_new_tokens=80, do_sample=sample, top_p=0.9, temperature=0.7, seed=0)
            text = tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)
            print(f"--- {'sampled' if sample else 'greedy'}\n{text}")


if __name__ == "__main__":
    typer.run(main)
