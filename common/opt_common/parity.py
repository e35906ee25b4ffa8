"""How far apart the frameworks are: each continues the same text and is compared with a float64 run in numpy."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checkpoints.pretrained import Pretrained, open_pretrained
from .frameworks import Framework, registered, transformers_title
from .quantization import dequantize
from .reference import forward
from .tokenizer import GPT2Tokenizer

TOLERANCE = 2e-5  # largest error over largest magnitude, float32


@dataclass
class Row:
    """One framework's result. `tokens_equal`: the float64 run chooses the same. `layers` holds the relative errors
    of the hidden states, `logits` that of the logits."""

    framework: str
    version: str = ""
    problem: str = ""
    load_seconds: float = 0.0
    tokens_per_second: float = 0.0
    tokens: list[int] = field(default_factory=list)
    tokens_equal: bool = False
    logits: float = float("nan")
    layers: list[float] = field(default_factory=list)
    installed: bool = True

    @property
    def passed(self) -> bool:
        return not self.problem and self.tokens_equal and max([self.logits, *self.layers]) <= TOLERANCE


@dataclass
class Report:
    """The rows, the prompt, and the text that continues it. `beside`: the errors of the hidden states and the logits of
    other libraries on that text, for comparison."""

    model: str
    prompt: str
    text: str
    rows: list[Row]
    beside: dict[str, list[float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every installed framework passed, and at least one is installed."""
        ran = [row for row in self.rows if row.installed]
        return bool(ran) and all(row.passed for row in ran)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over largest magnitude; infinite if anything is not finite or the shapes differ."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def parity(
    model: str, prompt: str, new_tokens: int, frameworks: Iterable[str] | None = None, beside: bool = False
) -> Report:
    """Load `model` in each framework (default: all) in float32, continue `prompt` greedily by `new_tokens`, and compare
    with the float64 run: each token with its likeliest, and the logits and hidden states over the whole text.

    No text ends early, so there are always `new_tokens`. The speed is that of the second of two runs. `beside`: compare
    transformers too, in float32, if it and PyTorch are installed.
    """
    tokenizer = GPT2Tokenizer.from_pretrained(model)
    opened = open_pretrained(model, "OPTForCausalLM", "float64")
    weights = _floats(opened)
    judged: dict[tuple[int, ...], tuple[np.ndarray, list[np.ndarray]]] = {}
    rows, text = [], ""
    for key in registered() if frameworks is None else frameworks:
        framework = registered()[key]
        row, loaded = _run(framework, model, tokenizer, prompt, new_tokens)
        rows.append(row)
        if loaded is None:
            continue
        ids = np.array([row.tokens])
        if tuple(row.tokens) not in judged:  # once, unless they disagree
            judged[tuple(row.tokens)] = forward(opened.config, weights.get, ids)
        logits, hidden = judged[tuple(row.tokens)]
        choices = logits[0, -new_tokens - 1 : -1].copy()
        choices[:, list(opened.config.eos_token_ids)] = -np.inf
        row.tokens_equal = choices.argmax(-1).tolist() == row.tokens[-new_tokens:]
        out = loaded(framework.tensor(ids), output_hidden_states=True)
        row.logits = relative_error(framework.numpy(out.logits), logits)
        row.layers = [relative_error(framework.numpy(f), w) for f, w in zip(out.hidden_states, hidden, strict=True)]
        text = text or tokenizer.decode(row.tokens, skip_special_tokens=True)
    others: dict[str, list[float]] = {}
    if beside and judged and (title := transformers_title()):
        tokens, (logits, hidden) = next(iter(judged.items()))
        # in a process of its own: it imports Triton, whose LLVM ends a process that has TensorFlow's
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            found = apart.submit(_transformers, model, np.array([tokens])).result()
        errors = [relative_error(f, w) for f, w in zip(found, [*hidden, logits], strict=True)]
        others[title] = errors
    return Report(model, prompt, text, rows, others)


def _floats(opened: Pretrained) -> dict[str, np.ndarray]:
    """The weights by their names; of a quantized Linear the float64 weight that it stands for."""
    weights: dict[str, np.ndarray] = {}
    for spec, array in opened.tensors:
        if spec.kind == "shape":  # the last of a Linear's three
            packed, scale = (weights.pop(f"{spec.path}.weight_{part}") for part in ("packed", "scale"))
            assert spec.packing is not None
            weights[f"{spec.path}.weight"] = dequantize(packed, scale.astype(np.float64), spec.packing.bits)
        else:
            weights[spec.name] = array
    return weights


def _transformers(model: str, ids: np.ndarray) -> list[np.ndarray]:
    """The hidden states and the logits of its PyTorch OPT in float32, with these weights, from whatever file."""
    import torch
    import transformers

    opened = open_pretrained(model, "OPTForCausalLM", "float32")
    with torch.device("meta"):
        config = opened.config.changed(quantization_config=None).to_dict()
        theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**config)).eval()
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in _floats(opened).items()}
    theirs.load_state_dict(weights, strict=False, assign=True)  # a tied head is not among them
    theirs.tie_weights()
    with torch.inference_mode():
        out = theirs(torch.from_numpy(ids), output_hidden_states=True)
    return [tensor.numpy() for tensor in (*out.hidden_states, out.logits)]


def _run(
    framework: Framework, model: str, tokenizer: GPT2Tokenizer, prompt: str, new_tokens: int
) -> tuple[Row, Any | None]:
    row = Row(framework.key)
    if framework.missing:
        row.problem, row.installed = framework.missing, False
        return row, None
    row.version = framework.version
    try:
        model_class = framework.model_class()
        start = time.perf_counter()
        loaded = model_class.from_pretrained(model)
        row.load_seconds = time.perf_counter() - start
        inputs = tokenizer(prompt, return_tensors=framework.tensors)
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            tokens = loaded.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            row.tokens = framework.numpy(tokens)[0].tolist()
            row.tokens_per_second = new_tokens / (time.perf_counter() - start)
    except ImportError as error:
        row.problem = str(error)
        return row, None
    return row, loaded
