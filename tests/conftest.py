"""Tiny random checkpoints, made by transformers, whose weights are large enough that a mistake shows."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach the network unasked

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; and the tests run beside each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# LLVM takes longer to optimize a tiny model's program than it takes to run; test_parity_on_the_demo runs optimized ones
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true " + os.environ.get("XLA_FLAGS", "")
)

if "OPT_ZOO_PROGRAMS" not in os.environ:  # what XLA compiles in one process, the workers and commands of this run reuse
    programs = os.environ["OPT_ZOO_PROGRAMS"] = tempfile.mkdtemp(prefix="opt-zoo-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{programs}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["TF_XLA_FLAGS"] = (
        f"{os.environ.get('TF_XLA_FLAGS', '')} --tf_xla_persistent_cache_directory={programs}/tf"
    )

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; it wants to know before it is imported
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton"):  # whoever imports it after TensorFlow brings the process down
    importlib.import_module("triton")

import transformers

from backends import Backend
from long_runs import memory, resident
from opt_common.frameworks import registered

SMALL: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=128,
    max_position_embeddings=64,
    init_std=0.3,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "pre-norm-narrow": {"word_embed_proj_dim": 32},
    "removed-final-norm": {"_remove_final_layer_norm": True},
    "no-bias": {"enable_bias": False},
    "no-affine": {"layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"activation_function": "gelu"},
    "gelu_new": {"activation_function": "gelu_new"},
    "silu": {"activation_function": "silu"},
}
SEEDS = {"350m": 4}  # one whose greedy text is not a single repeated token

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector, which would walk through it each time, leaves it be."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def make_reference(seed: int = 0, **changes: Any) -> transformers.OPTForCausalLM:
    """A random OPT of transformers', float64, whose weights are float32 numbers."""
    torch.manual_seed(seed)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**(SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0: swapped or dropped ones would not show
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.model.decoder.embed_positions.weight *= 3  # or post-norm models say one token for ever
    return model.double()


def save_reference(model: transformers.OPTForCausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    model.double()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, transformers.OPTForCausalLM]]:
    """tiny(name) -> (checkpoint folder, transformers' float64 model of it), for a name in CONFIGS."""
    made: dict[str, tuple[Path, transformers.OPTForCausalLM]] = {}

    def make(name: str = "pre-norm") -> tuple[Path, transformers.OPTForCausalLM]:
        if name not in made:
            model = make_reference(SEEDS.get(name, 0), **CONFIGS[name])
            made[name] = save_reference(model, tmp_path_factory.mktemp("tiny") / name), model
        return made[name]

    return make


@pytest.fixture(params=list(registered()))
def framework(request: pytest.FixtureRequest) -> str:
    """Each framework in turn; skipped, saying so, where it is not installed."""
    missing = registered()[request.param].missing
    if missing:
        pytest.skip(missing)
    return request.param


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[..., Backend]]:
    """load(framework, folder, **options) -> Backend, each loaded once in a file of tests."""
    loaded: dict[Any, Backend] = {}

    def once(key: str, path: Path, **options: Any) -> Backend:
        name = (key, path, tuple(options.items()))
        if name not in loaded:
            loaded[name] = Backend(key, path, **options)
        return loaded[name]

    yield once


_memory = [0]  # after programs were last forgotten, in bytes


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """JAX keeps what it compiled, which the tests of one file share; thousands of programs are gigabytes."""
    yield
    if "jax" in sys.modules and resident() > max(4e9, _memory[0] + 1e9):
        sys.modules["jax"].clear_caches()
        _memory[0] = memory()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
