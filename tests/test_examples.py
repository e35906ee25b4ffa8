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

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import lm_eval_opt  # noqa: E402

# The state of a training in progress, once it is whole; "training.KEY" where nothing else is said.
SAVED = {"tf": "training.keras", "flax": "training/4/_CHECKPOINT_METADATA"}


def test_killed_and_started_again(framework, tmp_path):
    """The weights are those of a run that was never broken off."""
    example, saved = EXAMPLES / f"finetune_{framework}.py", SAVED.get(framework, f"training.{framework}")
    if not example.exists():
        pytest.skip(f"no examples/{example.name}")
    text = tmp_path / "text.txt"
    text.write_text("The king had a daughter who was beautiful beyond all measure. " * 40, encoding="utf-8")

    def command(out: str, steps: int) -> list[str]:
        given = {"--steps": steps, "--save-every": 4, "--rows": 2}
        return [
            sys.executable,
            str(example),
            str(text),
            str(tmp_path / out),
            *(str(x) for pair in given.items() for x in pair),
        ]

    process = subprocess.Popen(command("killed", 100_000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / saved).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in ("killed", "whole"):
        ran = subprocess.run(command(out, 20), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found = re.search(r"^step (\d+) of 20$", ran.stdout, re.MULTILINE)
        assert found and (0 < int(found[1]) < 20) == (out == "killed"), ran.stdout
        first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", ran.stdout)[0])
        assert last < first
        assert (tmp_path / out / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    for name, array in wanted.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


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
