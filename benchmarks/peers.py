"""One system, ours or a peer: what the benchmarks start in a process of its own, in the environment that has it.

    python -m benchmarks.peers '{"system": "ctranslate2", "dtype": "int8", "folder": "checkpoint", ...}'    # a Job

A peer's environment need not have what this repository needs: numpy and the peer are enough. Prints a line of JSON.
Every framework takes all cores. Nothing ends a row, so that every `generate` writes the same number of tokens.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

Ids = np.ndarray  # [B, T]
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What to measure, each cell `repeats` times after `warm` calls, of which the first may compile.

    prefill: (B, S), a forward pass with all logits and no cache. decode: B, a whole `generate` of `new` tokens after
    `prompt`. beams: K, the same with so many beams for one prompt. steps: (B, length, slots), the last `new` tokens up
    to `length` alone, in a cache of so many slots.
    budget_s: no cell is begun after so many seconds. device: "cpu" or "gpu".
    """

    system: str
    dtype: str
    folder: str
    prefill: Sequence[tuple[int, int]] = ()
    decode: Sequence[int] = ()
    beams: Sequence[int] = ()
    steps: Sequence[tuple[int, int, int]] = ()
    prompt: int = 0
    new: int = 0
    repeats: tuple[int, int] = (1, 1)  # of prefill, of the others
    warm: int = 2
    budget_s: float = 1200
    device: str = "cpu"
    attention: str = "sdpa"  # of PyTorch

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(Path(self.folder, "config.json").read_text())


@dataclass(frozen=True)
class System:
    """A system to compare, `key` being what `system` finds, and the packages that it needs by the beginning of their
    versions."""

    key: str
    title: str  # {} is the version of the first package
    dtype: str
    needs: dict[str, str]
    attention: str = "sdpa"  # of PyTorch
    never: bool = False  # nobody has run it

    @property
    def ours(self) -> bool:
        return self.key.startswith("opt_")


class Calls(NamedTuple):
    """forward: all logits [B, T, V]. generate: prompts and what follows, [B, T + new]. step: (B, length, slots) to a
    call that returns the seconds of a step; None where the system has no such cache. search: as generate, by so many
    beams; None where it is not measured."""

    forward: Callable[[Ids], Any]
    generate: Callable[[Ids], Any]
    step: Callable[[int, int, int], Callable[[], float] | None] = lambda B, length, slots: None
    search: Callable[[Ids, int], Any] | None = None


def transformers_pt(job: Job) -> Calls:
    import torch
    import transformers

    device, dtype = "cuda" if job.device == "gpu" else "cpu", getattr(torch, job.dtype)
    how = {"dtype": dtype, "attn_implementation": job.attention}
    model = transformers.OPTForCausalLM.from_pretrained(job.folder, **how).to(device).eval()
    model.config.eos_token_id = None
    model.generation_config = transformers.GenerationConfig(pad_token_id=job.config["pad_token_id"])

    @torch.inference_mode()
    def forward(ids: Ids) -> Any:
        return waited(model(torch.from_numpy(ids).to(device), use_cache=False).logits)

    def generate(ids: Ids, beams: int = 1) -> Any:
        ids = torch.from_numpy(ids).to(device)
        how = {"max_new_tokens": job.new, "do_sample": False, "use_cache": True, "num_beams": beams}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how).cpu()

    def step(B: int, length: int, slots: int) -> Callable[[], float] | None:
        if slots != length:
            return None  # its cache has no slots to spare
        heads, width = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
        past = torch.full((B, heads, length - job.new, width), 0.1, dtype=dtype)

        @torch.inference_mode()
        def run() -> float:
            cache, token = transformers.DynamicCache(), torch.full((B, 1), 5)
            for layer in range(model.config.num_hidden_layers):
                cache.update(past.clone(), past.clone(), layer)
            start = time.perf_counter()
            for _ in range(job.new):
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            return (time.perf_counter() - start) / job.new

        return run

    return Calls(forward, generate, step, generate)


def transformers_tf(job: Job) -> Calls:
    import tensorflow as tf
    import transformers

    with tempfile.TemporaryDirectory() as folder:  # it fails on safetensors
        transformers.OPTForCausalLM.from_pretrained(job.folder).save_pretrained(folder, safe_serialization=False)
        model = transformers.TFOPTForCausalLM.from_pretrained(folder, from_pt=True)
    model.config.eos_token_id = None
    model.generation_config = transformers.GenerationConfig(pad_token_id=job.config["pad_token_id"])
    compiled = tf.function(model.generate, jit_compile=True)
    forward = tf.function(lambda ids: model(ids, use_cache=False).logits, jit_compile=True)
    return tf_calls(forward, lambda ids: compiled(ids, attention_mask=tf.ones_like(ids), max_new_tokens=job.new))


def transformers_flax(job: Job) -> Calls:
    import jax
    import jax.numpy as jnp
    import transformers

    model = transformers.FlaxOPTForCausalLM.from_pretrained(job.folder, from_pt=True)
    never = {"eos_token_id": -1, "min_length": -1}  # it fails on None
    model.generation_config = transformers.GenerationConfig(pad_token_id=job.config["pad_token_id"], **never)

    @jax.jit
    def forward(params: Any, ids: Any) -> Any:
        return model(ids, params=params).logits

    @jax.jit
    def generate(params: Any, ids: Any) -> Any:
        mask = jnp.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, params=params, max_new_tokens=job.new, do_sample=False
        ).sequences

    def call(compiled: Any, ids: Ids) -> Any:
        return compiled(model.params, ids.astype(np.int32)).block_until_ready()

    return Calls(lambda ids: call(forward, ids), lambda ids: call(generate, ids))


def keras_hub(job: Job) -> Calls:
    """With random weights of its own: its speed is not in their values."""
    import tensorflow as tf
    from keras_hub.models import OPTBackbone, OPTCausalLM

    config = job.config
    backbone = OPTBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["ffn_dim"],
        max_sequence_length=config["max_position_embeddings"],
    )
    model = OPTCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy", jit_compile=True)
    compiled = tf.function(lambda ids: model({"token_ids": ids, "padding_mask": tf.ones_like(ids)}), jit_compile=True)

    def generate(ids: Any) -> Any:
        ids = tf.pad(ids, [[0, 0], [0, job.new]])
        mask = tf.sequence_mask([job.prompt] * ids.shape[0], ids.shape[1], tf.int32)
        return model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)["token_ids"]

    return tf_calls(compiled, generate)


def ctranslate2(job: Job) -> Calls:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    words = [f"w{i}" for i in range(job.config["vocab_size"])]

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:  # random weights come without one
            vocabulary = {word: i for i, word in enumerate(words)}
            return SimpleNamespace(get_vocab=lambda: vocabulary, bos_token="w2", eos_token="w2", unk_token="w3")

    with tempfile.TemporaryDirectory() as folder:
        Converter(job.folder).convert(folder, force=True)
        model = ctranslate2.Generator(folder, compute_type=job.dtype, intra_threads=THREADS)

    def forward(ids: Ids) -> Any:
        lengths = np.full(len(ids), ids.shape[1], np.int32)
        views = (ctranslate2.StorageView.from_array(x) for x in (ids.astype(np.int32), lengths))
        return np.asarray(model.forward_batch(*views))

    def write(ids: Ids, seen: Callable[[Any], bool] | None = None, beams: int = 1) -> list[Any]:
        prompts = [[words[i] for i in row] for row in ids]
        length = {"max_length": job.new, "min_length": job.new}
        return model.generate_batch(prompts, beam_size=beams, include_prompt_in_result=False, callback=seen, **length)

    def generate(ids: Ids, beams: int = 1) -> Any:
        return [[*row, *result.sequences_ids[0]] for row, result in zip(ids, write(ids, beams=beams), strict=True)]

    def step(B: int, length: int, slots: int) -> Callable[[], float] | None:
        if slots != length:
            return None

        def run() -> float:
            times: list[float] = []

            def seen(token: Any) -> bool:
                if token.batch_id == 0:
                    times.append(time.perf_counter())
                return False

            write(np.full((B, length - job.new), 5), seen)
            return (times[-1] - times[0]) / (len(times) - 1)

        return run

    return Calls(forward, generate, step, generate)


PEERS = (transformers_pt, transformers_tf, transformers_flax, keras_hub, ctranslate2)


def loading(dtype: str) -> dict[str, Any]:
    """How ours load: "int8" and "int4" are the layers' matrices in 8 and 4 bits, all else in float32."""
    bits = {"int8": {"load_in_8bit": True}, "int4": {"load_in_4bit": True}}.get(dtype)
    return {"dtype": dtype} if bits is None else {"dtype": "float32"} | bits


def system(name: str) -> Callable[[Job], Calls]:
    """A peer, or one of ours, which is looked up only then: a peer's environment has none of them."""
    if name.startswith("opt_"):
        return importlib.import_module(f"benchmarks.ours.{name.split('_')[1]}").SYSTEMS[name]
    return {peer.__name__: peer for peer in PEERS}[name]


def tf_calls(
    forward: Callable[[Any], Any], generate: Callable[[Any], Any], step: Callable[..., Any] | None = None
) -> Calls:
    """The calls on TensorFlow's own tensors, and waited for."""
    import tensorflow as tf

    def call(run: Callable[[Any], Any], ids: Ids) -> Any:
        out = run(tf.constant(ids, tf.int32))
        tf.test.experimental.sync_devices()
        return out

    calls = Calls(lambda ids: call(forward, ids), lambda ids: call(generate, ids))
    return calls._replace(step=step) if step else calls


def waited(tensor: Any) -> Any:
    """A torch tensor whose device has computed it."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return tensor


def each(steps: int, run: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of one of so many steps that a call takes."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / steps

    return timed


def measure(job: Job) -> dict[str, Any]:
    """The seconds of every call of every cell, those of the first apart; a few logits, to see that all agree."""
    first_s: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    calls = system(job.system)(job)
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "first_s": first_s, "seconds": seconds}

    def words(B: int, T: int) -> Ids:
        return rng.integers(4, job.config["vocab_size"], (B, T))  # the special ids not among them

    def late() -> bool:
        return time.perf_counter() - start > job.budget_s

    for B, S in job.prefill:
        if not late():
            ids, name = words(B, S), f"prefill B{B} S{S}"
            first_s[name], seconds[name], logits = _timed(lambda ids=ids: calls.forward(ids), job.repeats[0], job.warm)
            if "logits" not in found:
                found["logits"] = [float(x) for x in logits[0, -1, :100]]
            del logits
    search = calls.search
    cells = [(f"decode B{B}", B, calls.generate) for B in job.decode]
    cells += [(f"beams B{K}", 1, partial(search, beams=K)) for K in job.beams if search]
    for name, B, write in cells:
        if not late():
            ids = words(B, job.prompt)
            first_s[name], seconds[name], text = _timed(partial(write, ids), job.repeats[1], job.warm)
            wanted = (B, job.prompt + job.new)
            if np.shape(text) != wanted or not np.array_equal(np.asarray(text)[:, : job.prompt], ids):
                raise RuntimeError(f"generate: found {np.shape(text)}, wanted {wanted}, the prompts first")
    for B, length, slots in job.steps:
        run = None if late() else calls.step(B, length, slots)
        if run is not None:
            took = [run() for _ in range(job.warm + job.repeats[1])]
            seconds[f"step B{B} L{length} of {slots}"] = took[job.warm :]
    return found


def _timed(run: Callable[[], Any], repeats: int, warm: int) -> tuple[float, list[float], Any]:
    """The seconds of the first of the `warm` calls, those of `repeats` more, and what the last returned."""
    seconds, out = [], None
    for _ in range(warm + repeats):
        out = None  # all logits are large: not two at once
        start = time.perf_counter()
        out = run()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[warm:], out


def ceilings(job: Job) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of reading memory: the best of what is installed, by what."""
    import torch

    smoke = job.repeats[0] == 1
    n, size = (128, 2**20) if smoke else (3072, 2**30)
    a, b = (np.random.default_rng(0).standard_normal((n, n), np.float32) for _ in range(2))
    x, w = torch.from_numpy(a), torch.from_numpy(b)
    half_x, half_w = x.bfloat16(), w.bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(w, n)
    many = np.ones(size // 4, np.float32)
    numbers = torch.from_numpy(many)
    matrix = numbers.view(-1, 1024)
    vector = torch.ones(1024)
    products = {
        "float32 numpy": lambda: a @ b,
        "float32 torch": lambda: x @ w,
        "float32 torch oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "bfloat16 torch": lambda: half_x @ half_w,
    }
    reads = {"read torch sum": lambda: numbers.sum(), "read torch mv": lambda: matrix @ vector}
    try:
        import jax
    except ImportError:
        pass
    else:
        ja, jb, jmany = jax.numpy.asarray(a), jax.numpy.asarray(b), jax.numpy.asarray(many)
        product, total = jax.jit(jax.numpy.matmul), jax.jit(jax.numpy.sum)
        products["float32 jax"] = lambda: product(ja, jb).block_until_ready()
        reads["read jax sum"] = lambda: total(jmany).block_until_ready()
    found = {}
    for runs, amount in ((products, 2 * n**3), (reads, size)):
        for name, run in runs.items():
            found[name] = amount / min(_timed(run, 1 if smoke else 7, 2)[1])
    return found


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(ceilings(job) if job.system == "ceilings" else measure(job)))
