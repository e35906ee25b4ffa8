"""One system on the CPU: what `benchmarks.cpu` starts in a process of its own, in the environment that has the system.

    python -m benchmarks.cpu_peers '{"system": "ctranslate2", "dtype": "int8", "folder": "checkpoint", ...}'    # a Job

A peer's environment need not have what this repository needs: numpy and the peer are enough. Prints a line of JSON.
Every framework takes all cores. Nothing ends a row, so that every `generate` writes the same number of tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Ids = np.ndarray  # [B, T]
Calls = tuple[Callable[[Ids], Any], Callable[[Ids], Any]]  # all logits [B, T, V]; prompts and what follows [B, T + new]
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What to measure: `forward` over [1, tokens], then `generate` of `new` tokens after `prompt` for each batch."""

    system: str
    dtype: str
    folder: str
    tokens: int
    prompt: int
    new: int
    batches: list[int]
    repeats: tuple[int, int]  # of forward, of generate

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(Path(self.folder, "config.json").read_text())


def opt_pt(job: Job, packed: bool = False) -> Calls:
    import torch

    from opt_pt import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
    if packed:
        model.pack()

    @torch.inference_mode()
    def forward(ids: Ids) -> Any:
        return model(torch.from_numpy(ids)).logits

    return forward, lambda ids: model.generate(torch.from_numpy(ids), max_new_tokens=job.new, eos_token_id=[])


def opt_pt_packed(job: Job) -> Calls:
    return opt_pt(job, packed=True)


def opt_tf(job: Job) -> Calls:
    import tensorflow as tf

    from opt_tf import TFOPTForCausalLM

    model = TFOPTForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
    forward = tf.function(lambda ids: model(ids).logits, jit_compile=True)
    return _tf(forward, lambda ids: model.generate(ids, max_new_tokens=job.new, eos_token_id=[]))


def opt_flax(job: Job) -> Calls:
    import jax

    from opt_flax import FlaxOPTForCausalLM

    model = FlaxOPTForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
    compiled = jax.jit(lambda model, ids: model(ids).logits)

    def generate(ids: Ids) -> Any:
        return model.generate(ids, max_new_tokens=job.new, eos_token_id=[]).block_until_ready()

    return lambda ids: compiled(model, ids).block_until_ready(), generate


def transformers_pt(job: Job) -> Calls:
    import torch
    import transformers

    dtype = getattr(torch, job.dtype)
    model = transformers.OPTForCausalLM.from_pretrained(job.folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.config.eos_token_id = None
    model.generation_config = transformers.GenerationConfig(pad_token_id=job.config["pad_token_id"])

    @torch.inference_mode()
    def forward(ids: Ids) -> Any:
        return model(torch.from_numpy(ids), use_cache=False).logits

    def generate(ids: Ids) -> Any:
        ids, mask = torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.long)
        return model.generate(ids, attention_mask=mask, max_new_tokens=job.new, do_sample=False)

    return forward, generate


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
    return _tf(forward, lambda ids: compiled(ids, attention_mask=tf.ones_like(ids), max_new_tokens=job.new))


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

    return lambda ids: call(forward, ids), lambda ids: call(generate, ids)


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

    return _tf(compiled, generate)


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

    def generate(ids: Ids) -> Any:
        prompts = [[words[i] for i in row] for row in ids]
        length = {"max_length": job.new, "min_length": job.new}
        results = model.generate_batch(prompts, beam_size=1, include_prompt_in_result=False, **length)
        return [[*row, *result.sequences_ids[0]] for row, result in zip(ids, results, strict=True)]

    return forward, generate


OURS = (opt_pt, opt_pt_packed, opt_tf, opt_flax)
PEERS = (transformers_pt, transformers_tf, transformers_flax, keras_hub, ctranslate2)
SYSTEMS = {f.__name__: f for f in OURS + PEERS}


def _tf(forward: Callable[[Any], Any], generate: Callable[[Any], Any]) -> Calls:
    """The two on TensorFlow's own tensors, and waited for."""
    import tensorflow as tf

    def call(run: Callable[[Any], Any], ids: Ids) -> Any:
        out = run(tf.constant(ids, tf.int32))
        tf.test.experimental.sync_devices()
        return out

    return lambda ids: call(forward, ids), lambda ids: call(generate, ids)


def measure(job: Job) -> dict[str, Any]:
    """The seconds of every call, those of the first, which may compile, apart; a few logits, to see that all agree."""
    first_s, seconds, rng = {}, {}, np.random.default_rng(0)
    start = time.perf_counter()
    forward, generate = SYSTEMS[job.system](job)
    load_s = time.perf_counter() - start

    def words(B: int, T: int) -> Ids:
        return rng.integers(4, job.config["vocab_size"], (B, T))  # the special ids not among them

    ids = words(1, job.tokens)
    first_s["prefill"], seconds["prefill"], logits = _timed(lambda: forward(ids), job.repeats[0])
    some = [float(x) for x in logits[0, -1, :100]]
    del logits
    for B in job.batches:
        ids = words(B, job.prompt)
        first_s[f"B{B}"], seconds[f"B{B}"], text = _timed(lambda ids=ids: generate(ids), job.repeats[1])
        wanted = (B, job.prompt + job.new)
        if np.shape(text) != wanted or not np.array_equal(np.asarray(text)[:, : job.prompt], ids):
            raise RuntimeError(f"generate: found {np.shape(text)}, wanted {wanted}, the prompts first")
    return {"load_s": load_s, "first_s": first_s, "seconds": seconds, "logits": some}


def _timed(run: Callable[[], Any], repeats: int) -> tuple[float, list[float], Any]:
    """The seconds of the first call, those of `repeats` more after a second one, and what the last returned."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        out = run()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[2:], out


def ceilings(job: Job) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of reading memory: the best of what is installed, by what."""
    import torch

    smoke = job.tokens < 512
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
            found[name] = amount / min(_timed(run, 1 if smoke else 7)[1])
    return found


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(ceilings(job) if job.system == "ceilings" else measure(job)))
