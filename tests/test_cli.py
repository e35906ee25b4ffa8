"""The command: each once in a process of its own, as a user runs it, and otherwise in this one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import opt_common.parity
from checkpoints import random_checkpoint, tiny_config
from commands import opt_zoo, process
from opt_common import cli
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.open import open_checkpoint
from opt_common.config import OPTConfig
from opt_common.frameworks import Framework, registered
from opt_common.hub import DEMO, fetch
from opt_common.parity import parity

KEYS = ", ".join(registered())
PRESENT = [key for key, framework in registered().items() if framework.missing is None]


def test_parity_on_the_demo(tmp_path, monkeypatch):
    """The main job: equal tokens, and logits within 2e-5 of the float64 run, in every framework; and its picture. The
    programs are those that a user runs: XLA optimizes them."""
    for quick in ("XLA_FLAGS", "TF_XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # conftest's
        monkeypatch.delenv(quick, raising=False)
    ran = process("parity", "--json", "--plot", tmp_path / "errors.svg")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["passed"]
    assert [row["framework"] for row in report["rows"]] == list(registered())
    for row in report["rows"]:
        if row["framework"] in PRESENT:
            assert len(row["tokens"]) > 200
            assert row["tokens"] == report["rows"][0]["tokens"]
            assert row["logits"] <= 2e-5
            assert len(row["layers"]) == OPTConfig.from_pretrained(DEMO).num_hidden_layers + 1
            assert max(row["layers"]) <= 2e-5
            assert f"<!-- {registered()[row['framework']].title} -->" in (tmp_path / "errors.svg").read_text()
    if "pt" in PRESENT:
        (errors,) = report["beside"].values()  # transformers'
        assert len(errors) == OPTConfig.from_pretrained(DEMO).num_hidden_layers + 2 and max(errors) <= 2e-5


@pytest.mark.parametrize("key", PRESENT)
def test_parity_sees_a_disturbed_weight(key, tmp_path, monkeypatch):
    """A hundredth on one number of one framework's weights turns that framework, and only that, red. The number is one
    that every token uses: behind a relu it might be one that none of these does."""
    shutil.copytree(fetch(DEMO, []), tmp_path / "disturbed")
    path = tmp_path / "disturbed" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["model.decoder.layers.2.self_attn.v_proj.weight"][3, 5] += np.float16(0.01)
    safetensors.numpy.save_file(weights, path)
    model_class = Framework.model_class

    class Disturbed:
        @staticmethod
        def from_pretrained(name):
            return model_class(registered()[key]).from_pretrained(tmp_path / "disturbed")

    monkeypatch.setattr(Framework, "model_class", lambda self: Disturbed if self.key == key else model_class(self))
    report = parity(DEMO, "Once upon a time", 8)
    assert not report.passed
    assert [row.framework for row in report.rows if row.installed and not row.passed] == [key]


def test_parity_fails_through_the_command(monkeypatch):
    """The exit status, with a float64 judge that disagrees with all."""
    true = opt_common.parity.forward

    def forward(*arguments):
        logits, hidden = true(*arguments)
        return logits * 1.001, hidden

    monkeypatch.setattr(opt_common.parity, "forward", forward)
    ran = opt_zoo("parity", "--new-tokens", "4")
    assert ran.returncode == 1
    assert "differs" in ran.stdout


def test_a_missing_framework_is_a_row(monkeypatch):
    monkeypatch.setattr(Framework, "missing", property(lambda self: "jax not installed: pip install 'opt-zoo[flax]'"
                                                       if self.key == "flax" else None))  # fmt: skip
    if "pt" not in PRESENT:
        pytest.skip(str(registered()["pt"].missing))
    report = parity(DEMO, "The", 3, ["pt", "flax"])
    assert report.passed
    assert report.rows[1].problem == "jax not installed: pip install 'opt-zoo[flax]'"


def test_a_missing_framework_in_the_command():
    """The row, and the sentence that installs it, brackets and all."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name in ('jax', 'torch') else find(name, *a);"
        "import opt_common.cli as c; sys.argv = ['opt-zoo', *sys.argv[1:]]; c.main()"
    )
    arguments = ["parity", "--new-tokens", "2", "--framework", "flax", "--framework", "pt"]
    ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert ran.returncode == 1  # nothing ran
    assert "not run" in ran.stdout
    assert "JAX: jax not installed: pip install 'opt-zoo[flax]'" in ran.stdout
    ran = subprocess.run([sys.executable, "-c", program, "generate", "x"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "error: torch not installed: pip install 'opt-zoo[pt]'\n")


def test_generate_prints_the_same_text_from_each():
    texts = {key: opt_zoo("generate", "Once upon a time", "--framework", key) for key in PRESENT}
    texts["process"] = process("generate", "Once upon a time", "--framework", PRESENT[0])
    for ran in texts.values():
        assert ran.returncode == 0, ran.stderr
    assert len({ran.stdout for ran in texts.values()}) == 1
    text = texts[PRESENT[0]].stdout
    assert text.startswith("Once upon a time")
    assert len(text.split()) > 40
    assert "</s>" not in text


def test_generate_samples_with_a_seed():
    arguments = ("generate", "The", "--sample", "--seed", 5, "--max-new-tokens", 20, "--json")
    first, second = opt_zoo(*arguments), opt_zoo(*arguments)
    assert json.loads(first.stdout)["tokens"] == json.loads(second.stdout)["tokens"]


def test_generate_from_a_file_to_a_file(tmp_path):
    """Batches of padded prompts give what each gives alone; options by name; other keys of a line are kept."""
    prompts = ["Once upon a time", "The dog", "Lily and Tom went to the park and"]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(prompts))
    )
    arguments = ("--max-new-tokens", 12, "--framework", PRESENT[0], "--option", "no_repeat_ngram_size=2")
    ran = opt_zoo("generate", "--file", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *arguments)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == list(enumerate(prompts))
    for row in rows:
        assert row["text"] == row["prompt"] + row["continuation"]
        alone = json.loads(opt_zoo("generate", row["prompt"], "--json", *arguments).stdout)
        assert alone["text"] == row["text"]


def test_version():
    ran = process("--version")
    assert (ran.returncode, ran.stdout) == (0, f"opt-zoo {version('opt-zoo')}\n")


def test_convert_and_inspect(tmp_path):
    ran = process("convert", DEMO, tmp_path / "new", "--dtype", "bfloat16", "--max-shard-size", "4MB", "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)) > 2
    facts = json.loads(process("inspect", tmp_path / "new", "--json").stdout)
    assert (facts["dtype"], facts["layout"], facts["head"]) == ("bfloat16", "safetensors", "tied to the embedding")
    assert facts["parameters"] == sum(np.prod(entry.shape) for entry in Checkpoint(tmp_path / "new").values())
    shown = opt_zoo("inspect", DEMO)
    assert "float16" in shown.stdout and "parameters" in shown.stdout
    again = opt_zoo("generate", "The", "--model", tmp_path / "new", "--framework", PRESENT[0], "--max-new-tokens", 3)
    assert again.returncode == 0, again.stderr


def test_convert_to_another_layout_and_compare(tmp_path):
    folder = tmp_path / "tf"
    plan = json.loads(opt_zoo("convert", DEMO, folder, "--to", "safetensors-tf", "--plan", "--json").stdout)
    assert not folder.exists()
    ran = opt_zoo("convert", DEMO, folder, "--to", "safetensors-tf", "--json")
    assert ran.returncode == 0, ran.stderr
    assert dict(plan["files"]) == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert plan["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert json.loads(opt_zoo("inspect", folder, "--json").stdout)["layout"] == "safetensors-tf"

    same = process("diff", DEMO, folder)
    assert (same.returncode, same.stdout) == (0, "the same, bit for bit\n")
    opt_zoo("convert", folder, tmp_path / "wide", "--dtype", "float32")
    other = opt_zoo("diff", DEMO, tmp_path / "wide", "--json")
    assert other.returncode == 1
    found = json.loads(other.stdout)
    assert not found["same"] and {(row["what"], row["largest"]) for row in found["differences"]} == {("dtype", 0.0)}
    shown = opt_zoo("diff", DEMO, tmp_path / "wide")
    assert shown.returncode == 1 and "fc1.bias: dtype: float16 and float32, largest difference 0" in shown.stdout


def test_the_plan_in_words(tmp_path):
    ran = opt_zoo("convert", DEMO, tmp_path / "new", "--plan", "--max-shard-size", "4MB")
    assert ran.returncode == 0, ran.stderr
    for said in ("model-00001-of-00003.safetensors", "config.json", "merges.txt", "memory", "time", "MB/s", "free"):
        assert said in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_is_wrong(tmp_path):
    shutil.copytree(fetch(DEMO, []), tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["model.decoder.layers.2.fc1.bias"][:2] = np.nan
    weights["\x1b[2Jevil"] = weights.pop("model.decoder.layers.3.fc1.bias")
    safetensors.numpy.save_file(weights, path)
    ran = opt_zoo("inspect", tmp_path / "bad", "--check", "--sha256")
    assert ran.returncode == 0, ran.stderr
    assert "model.decoder.layers.3.fc1.bias: missing, wanted [1024]" in ran.stdout
    assert "model.decoder.layers.2.fc1.bias: 2 numbers are NaN or infinite" in ran.stdout
    assert "\\x1b[2Jevil: unexpected, no such tensor in this OPT" in ran.stdout and "\x1b" not in ran.stdout
    digest = hashlib.sha256(weights["model.decoder.layers.0.fc1.bias"].tobytes()).hexdigest()
    assert f"{digest}  model.decoder.layers.0.fc1.bias" in ran.stdout
    ran = opt_zoo("convert", tmp_path / "bad", tmp_path / "new")
    assert ran.returncode == 1 and "\\x1b[2Jevil" in ran.stderr and "\x1b" not in ran.stderr
    facts = json.loads(opt_zoo("inspect", tmp_path / "bad", "--json").stdout)
    assert len(facts["misfits"]) == 2 and "sha256" not in facts


def test_an_ambiguous_folder_in_the_command(tmp_path):
    shutil.copytree(fetch(DEMO, []), tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"")
    ran = opt_zoo("convert", tmp_path / "both", tmp_path / "new")
    assert ran.returncode == 1
    assert "holds weights of 2 layouts: safetensors (model.safetensors), torch (pytorch_model.bin)" in ran.stderr
    assert "--from" in ran.stderr and ran.stderr.count("\n") == 1
    assert opt_zoo("convert", tmp_path / "both", tmp_path / "new", "--from", "safetensors").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", DEMO, "{tmp}/x", "--to", "onnx"), "error: layout: found 'onnx', wanted one of safetensors, torch"),
        (("convert", DEMO, "{tmp}/x", "--from", "tf-h5"), "no weights of layout tf-h5; wanted one of tf_model.h5"),
        (("diff", DEMO, "/no/such/folder"), "error: /no/such/folder: no such folder"),
        (("inspect", "/no/such/folder"), "error: /no/such/folder: no such folder"),
        (
            ("generate", "The", "--framework", "mx"),
            f"error: framework: found 'mx', wanted one of {', '.join(registered())}",
        ),
        (("parity", "--framework", "mx"), "error: framework: found 'mx'"),
        (("generate", "The", "--max-new-tokens", 4000), "wanted at most 512 (max_position_embeddings)"),
        (("generate", "The", "--dtype", "int8"), "error: dtype: found 'int8'"),
        (("generate", "The", "--device", "moon"), "error: device: found 'moon'"),
        (("generate", "The", "--option", "top_k:3"), "error: --option: found 'top_k:3', wanted NAME=JSON"),
        (("generate", "The", "--option", "beams=3"), "error: generate: found unknown options beams"),
        (("generate",), "error: prompts, --file: found neither or both, wanted one of them"),
        (("convert", DEMO, "{tmp}/x", "--dtype", "int8"), "error: dtype: found 'int8'"),
        (("convert", DEMO, "{tmp}/x", "--max-shard-size", "much"), "error: max_shard_size: found 'much'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_errors_are_one_line_and_a_status(arguments, message, tmp_path):
    ran = opt_zoo(*(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert ran.returncode == 1
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "~nosuchuser/x"), "~nosuchuser/x: no such folder"),
        (("generate", "The", "--model", "~nosuchuser/x"), "~nosuchuser/x: no such folder"),
        (("convert", DEMO, "x", "--max-shard-size", "inf"), "max_shard_size: found 'inf'"),
        (("convert", DEMO, "x", "--max-shard-size", "9" * 400), "max_shard_size: found '999"),
        (("generate", "caf\udce9"), r"prompt: found 'caf\udce9', wanted UTF-8 text"),
        (("parity", "--prompt", "caf\udce9"), r"prompt: found 'caf\udce9', wanted UTF-8 text"),
        (("generate", "The", "--seed", "9" * 23), f"seed: found {'9' * 23}, wanted a number of 64 bits"),
        (("generate", "The", "--sample", "--temperature", "inf"), "temperature: found inf, wanted a finite number"),
        (("generate", "The", "--repetition-penalty", "inf"), "repetition_penalty: found inf, wanted a finite number"),
        (("generate", "a " * 600), " tokens and 100 new ones make "),
        (("parity", "--prompt", "a " * 600), " tokens and 200 new ones make "),
        (("generate", "The", "--draft", "/no/such"), "/no/such: no such folder"),
        (("generate", "The", "--option", "bad_words_ids=3"), "--option: found a value of a wrong type"),
        (("generate", "The", "--option", "x=" + "[" * 100_000), "--option: found 'x=["),
        (("generate", "--file", "/proc/self/mem"), "Input/output error: '/proc/self/mem'"),
        (("inspect", "a" * 5000), "File name too long: 'aaaa"),
        (("generate", "The", "--model", "/" + "a/" * 2500), "File name too long: '/a/a"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_is_refused_before_anything_is_loaded(arguments, message, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, *arguments)
    assert error.startswith("error: ")
    assert message in error.replace("\n", " ")
    assert len(error) < 500


@pytest.mark.filterwarnings("always")
def test_an_empty_prompt_is_noted(monkeypatch, capsys):
    assert "note: prompt: found an empty one" in refused(monkeypatch, capsys, "generate", "")


def test_the_lines_of_a_file_are_text(monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts"
    for text, message in [(b'"The"\n"a\xff"\n', "wanted UTF-8 text"), (b'"The"\n"a\\ud800"\n', "line 2: found")]:
        prompts.write_bytes(text)
        error = refused(monkeypatch, capsys, "generate", "--file", prompts)
        assert f"{prompts}" in error and message in error


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command writes to stderr when it fails, in this process. Loading a model fails too."""

    def load(self: Framework) -> None:
        raise ValueError("a model is loaded")

    monkeypatch.setattr(Framework, "model_class", load)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored, for the command sets its own
    monkeypatch.setattr(sys, "argv", ["opt-zoo", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    return capsys.readouterr().err


def test_of_many_misfits_ten_are_named(tmp_path):
    made = random_checkpoint(tmp_path / "made", tiny_config(layers=4))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"hidden_size": 16, "word_embed_proj_dim": 16}))
    everything = json.loads(opt_zoo("inspect", made, "--json").stdout)["misfits"]
    assert len(everything) > 50
    with pytest.raises(ValueError, match="model.decoder.embed_tokens.weight: found shape") as error:
        open_checkpoint(made)
    first, *lines, last = str(error.value).split("\n")
    assert f"{made}: {len(everything)} tensor(s) do not fit the config:" == first
    assert [line.strip() for line in lines] == everything[:10]
    assert f"and {len(everything) - 10} more" in last
    shown = opt_zoo("inspect", made).stdout
    assert everything[9] in shown and everything[10] not in shown and f"and {len(everything) - 10} more" in shown


def test_the_demo_is_loadable_by_transformers():
    """Weights and tokenizer, as they lie in the package; and they write English."""
    import torch
    import transformers

    from opt_common.tokenizer import GPT2Tokenizer

    folder = fetch(DEMO, [])
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 12_000_000
    model, info = transformers.OPTForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(folder), GPT2Tokenizer.from_pretrained(DEMO)
    text = "Once upon a time, in the year 1776,\n\nHolmes said: “Watson!” 🙂"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    ids = theirs("Once upon a time", return_tensors="pt")
    wanted = model.generate(**ids, max_new_tokens=60, do_sample=False)[0].tolist()
    if "pt" in PRESENT:
        from opt_pt import OPTForCausalLM

        found = OPTForCausalLM.from_pretrained(DEMO).generate(**ids, max_new_tokens=60)[0].tolist()
        assert found == wanted


def test_very_many_files_are_not_all_printed(tmp_path):
    """A hundred lines at most; the bytes are all there."""
    for arguments in (("convert", DEMO, tmp_path / "new", "--to", "orbax"), ("inspect", tmp_path / "new")):
        ran = opt_zoo(*arguments)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("\n") <= 100
        said = ran.stdout.partition("shard")[2] if arguments[0] == "inspect" else ran.stdout
        sizes = [int(n) for n in re.findall(r"(\d+)\s+bytes", said.replace(",", ""))]
        files = json.loads(opt_zoo("inspect", tmp_path / "new", "--json").stdout)["shards"]
        wanted = files if arguments[0] == "inspect" else {n: b for n, b in files.items() if not n.endswith(".zarray")}
        assert len(files) > 100 and sum(sizes) == sum(wanted.values())
