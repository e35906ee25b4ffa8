"""The examples as they are printed, broken off and started again."""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.numpy import load_file

import opt_common
from checkpoints import random_checkpoint, tiny_config
from opt_common.frameworks import registered

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import lm_eval_opt  # noqa: E402

# The state of a training in progress, once it is whole; "training.KEY" where nothing else is said.
SAVED = {"tf": "training.keras", "flax": "training/4/_CHECKPOINT_METADATA"}


# The promises that these hold are the frameworks' own tests', too.
SLOW = {"tf", "flax"}
QUICK_FIRST = [pytest.param(key, marks=[pytest.mark.slow] * (key in SLOW)) for key in registered()]


@pytest.fixture
def given(tmp_path) -> dict[str, object]:
    """The options of a short run, from a tiny model with a real tokenizer."""
    demo = Path(opt_common.__file__).parent / "opt-demo"
    vocabulary = opt_common.OPTConfig.from_pretrained(demo).vocab_size
    config = tiny_config(layers=2, vocab_size=vocabulary, max_position_embeddings=64, dtype="float32", dropout=0.1)
    random_checkpoint(tmp_path / "model", config)
    opt_common.GPT2Tokenizer.from_pretrained(demo).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The king had a daughter who was beautiful beyond all measure. " * 40)
    return {"--model": tmp_path / "model", "--save-every": 4, "--rows": 2, "--learning-rate": 1e-2}


def command(framework: str, out: Path, **options: object) -> list[str]:
    example = EXAMPLES / f"finetune_{framework}.py"
    if not example.exists():
        pytest.skip(f"no examples/{example.name}")
    words = [example, out.parent / "text.txt", out, *(word for pair in options.items() for word in pair)]
    return [sys.executable, *map(str, words)]


def finished(ran: subprocess.CompletedProcess[str], out: Path) -> int:
    """The step that a run began at."""
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"^step (\d+) of 20$", ran.stdout, re.MULTILINE)
    assert found, ran.stdout
    first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", ran.stdout)[0])
    assert last < first
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    return int(found[1])


def test_fine_tuning(framework, tmp_path, given):
    out = tmp_path / "out"
    ran = subprocess.run(command(framework, out, **given, **{"--steps": 20}), capture_output=True, text=True)
    assert finished(ran, out) == 0
    assert load_file(out / "model.safetensors").keys() == load_file(tmp_path / "model" / "model.safetensors").keys()


@pytest.mark.parametrize("framework", QUICK_FIRST, indirect=True)
def test_killed_and_started_again(framework, tmp_path, given):
    """The weights are those of a run that was never broken off."""
    saved = tmp_path / "killed" / SAVED.get(framework, f"training.{framework}")
    endless = command(framework, tmp_path / "killed", **given, **{"--steps": 100_000})
    process = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not saved.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in (tmp_path / "killed", tmp_path / "whole"):
        ran = subprocess.run(command(framework, out, **given, **{"--steps": 20}), capture_output=True, text=True)
        assert (0 < finished(ran, out) < 20) == (out.name == "killed"), ran.stdout
    weights, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    for name, array in wanted.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


@pytest.mark.parametrize("framework", QUICK_FIRST, indirect=True)
def test_lm_evaluation_harness(framework, tmp_path):
    """Likelihoods, perplexity and greedy texts of opt-demo: the scores that the harness gives transformers."""
    lines = [
        "The king had a daughter who was beautiful beyond all measure.",
        "Once upon a time there lived a poor man.",
        "The wolf said to the fox",
        "They went into the forest and were never seen again, and the king was sad.",
    ]
    path = tmp_path / "tales.jsonl"
    path.write_text("\n".join(json.dumps({"text": line, "words": line.split(" ")}) for line in lines) + "\n")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    tasks = [
        data | {
            "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{words[:4]|join(' ')}}",
            "doc_to_choice": "{{[words[4:]|join(' '), 'blue blue blue', 'sea']}}", "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        data | {
            "task": "whole", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        data | {
            "task": "say", "output_type": "generate_until", "doc_to_text": "{{words[:3]|join(' ')}}",
            "doc_to_target": "{{text}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]  # fmt: skip
    folder = Path(opt_common.__file__).parent / "opt-demo"
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    found, wanted = (
        simple_evaluate(model=model, tasks=copy.deepcopy(tasks), log_samples=True, bootstrap_iters=0, random_seed=0)
        for model in (lm_eval_opt.OPT(str(folder), framework, batch_size=2), theirs)
    )
    assert found["results"].keys() == wanted["results"].keys() == {"choice", "whole", "say"}
    for task, scores in wanted["results"].items():
        for name, score in scores.items():
            same = pytest.approx(score, rel=1e-6) if isinstance(score, float) else score
            assert found["results"][task][name] == same, (task, name)
    for task, samples in wanted["samples"].items():
        for ours, other in zip(found["samples"][task], samples, strict=True):
            for a, b in zip(ours["filtered_resps"], other["filtered_resps"], strict=True):
                if task == "say":
                    assert a == b
                else:
                    first, second = (x if isinstance(x, tuple | list) else [x] for x in (a, b))
                    assert float(first[0]) == pytest.approx(float(second[0]), rel=1e-5)
                    assert [str(x) for x in first[1:]] == [str(x) for x in second[1:]]
