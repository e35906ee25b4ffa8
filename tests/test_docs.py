"""README.md and docs/: the site builds, every snippet runs, every public name has a docstring and is in the reference.

A page's Python and `opt-zoo` commands run from top to bottom, in one namespace and one folder, which holds tiny
checkpoints by the Hub's names. What cannot run here is listed by name: it is compiled, and its imports are checked.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opt_common.checkpoints.convert import convert
from opt_common.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INCLUDED = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)  # files of the repository that are pages of the site too
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]
    if "notebooks" not in path.parts and not INCLUDED.search(path.read_text())
)
NAMES = ["125m", "350m", "1.3b", "6.7b", "13b", "66b"]

# Snippets that do not run here, by a word of theirs: what they need, and who runs them.
ELSEWHERE = {
    "flash_attention_2": "a GPU",
    "make_graphed_callables": "a GPU",
    "tp_plan": "torchrun: tests/test_pt_parallel.py",
    "import AutoTokenizer, TFOPT": "a process for each of the two scripts: tests/test_migration.py",
    "from transformers import FlaxOPT": "transformers 4.57: tests/test_flax_functional.py",
    "keras_hub": "keras-hub: tests/test_keras_hub.py",
}


def snippets(page: str) -> list[tuple[str, str]]:
    """The blocks of a page, in tabs and columns too, with their languages."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^( *)```(python|sh)\b[^\n]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(code)) for _, language, code in blocks]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with facebook/opt-…, one layer of random weights beside opt-demo's tokenizer."""
    from opt_common.config import OPTConfig
    from opt_common.hub import fetch
    from opt_common.tokenizer import GPT2Tokenizer
    from opt_pt import OPTForCausalLM

    folder, demo = tmp_path_factory.mktemp("hub"), fetch("opt-demo", ["config.json"])
    first = folder / "facebook" / f"opt-{NAMES[0]}"
    sizes: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=1, num_attention_heads=4, ffn_dim=256)
    config = OPTConfig.from_pretrained(demo, word_embed_proj_dim=128, **sizes)
    OPTForCausalLM(config).save_pretrained(first)
    GPT2Tokenizer.from_pretrained(demo).save_pretrained(first)
    for name in NAMES[1:]:
        shutil.copytree(first, first.with_name(f"opt-{name}"))
    return folder


@pytest.fixture
def folder(hub, tmp_path, monkeypatch) -> Path:
    """The current directory of a snippet: checkpoints by the Hub's names, and the files that pages speak of."""
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night, and the king's daughter slept. " * 200)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Once", "A king")))
    source = tmp_path / "facebook" / f"opt-{NAMES[0]}"
    for target, layout in {"my-opt": "safetensors", "my-preset": "keras-hub", "125m": "metaseq"}.items():
        convert(source, tmp_path / target, layout)
    (tmp_path / "125m" / "restored.pt").rename(tmp_path / "125m" / "reshard.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*are not in a keras-hub preset")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets(page, folder):
    found: dict[str, Any] = {"__name__": "__main__"}
    for language, code in snippets(page):
        if language == "sh":
            for words in commands(code):
                program = words[0].removeprefix(".venv/bin/")
                assert program in RUN, f"{program}: no test knows how to check it"
                RUN[program](words[1:])
        elif any(word in code for word in ELSEWHERE):
            imports_exist(compile(code, page, "exec", ast.PyCF_ONLY_AST))
        else:
            exec(compile(code.replace('"cuda"', '"cpu"'), page, "exec"), found)


def test_before_and_after_give_the_same_numbers(folder):
    import torch

    before, after = [code for _, code in snippets("docs/coming-from-transformers.md")][:2]
    assert before.replace("from transformers import", "from opt_pt import") == after != before
    found: list[dict[str, Any]] = [{}, {}]
    for code, names in zip((before, after), found, strict=True):
        exec(code, names)
    theirs, ours = found
    assert type(theirs["model"]).__module__.startswith("transformers")
    torch.testing.assert_close(ours["out"].logits, theirs["out"].logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["out"].loss, theirs["out"].loss)
    assert torch.equal(ours["tokens"], theirs["tokens"])


def imports_exist(tree: ast.AST) -> None:
    """What a snippet imports from this repository's packages is there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opt_"):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, as lists of words."""
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def run_opt_zoo(words: list[str]) -> None:
    if (
        words[0] in ("parity", "bench") or "--devices" in words
    ):  # tests/test_parity.py, _plots and _pt_parallel run them
        parse(app, words)
        return
    words = [word for word in words if not word.startswith("cuda")]
    if "--device" in words:
        words.remove("--device")
    ran = CliRunner().invoke(app, words)
    differ = words[0] == "diff" and isinstance(ran.exception, SystemExit)  # status 1 says that they differ
    assert ran.exit_code == 0 or differ, (words, ran.output, ran.exception)


def parse(typer_app: Any, words: list[str]) -> None:
    """Raises if a command does not take these words."""
    import typer

    command: Any = typer.main.get_command(typer_app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def run_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
    elif words[1] == "benchmarks":
        from benchmarks.__main__ import app as benchmarks

        parse(benchmarks, words[2:])
    else:
        assert words[1] == "build"


def run_python3(words: list[str]) -> None:
    assert words == ["-m", "venv", ".venv"]


def run_pip(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"\.\[(.*?)\]", " ".join(words)):
        assert set(wanted.split(",")) <= set(extras), wanted


def run_pytest(words: list[str]) -> None:
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).is_file(), word


def run_torchrun(words: list[str]) -> None:
    rest = words[words.index("--nproc-per-node") + 2 :]
    if rest[:2] == ["--no-python", "opt-zoo"]:
        parse(app, rest[2:])
    elif rest != ["script.py"]:
        run_python(rest)


def run_nothing(words: list[str]) -> None:
    """A program of others."""


RUN: dict[str, Any] = {
    "opt-zoo": run_opt_zoo, "python": run_python, "python3": run_python3, "pip": run_pip, "pytest": run_pytest,
    "torchrun": run_torchrun, "git": run_nothing, "cd": run_nothing, "ct2-transformers-converter": run_nothing,
    "mkdocs": run_nothing,
}  # fmt: skip


def test_the_site_builds(tmp_path):
    """Strictly: a missing page, link, anchor or name of the reference fails. Nothing in it comes from the network."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = [path.read_text() for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES)
    loaded = {url for page in pages for url in re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"> ]*)", page)}
    loaded |= {
        url for page in pages for url in re.findall(r"<link[^>]* rel=\"?stylesheet[^>]* href=\"?([^\"> ]*)", page)
    }
    assert loaded and not [url for url in loaded if re.match(r"(https?:)?//", url)]


def test_links_of_the_readme():
    """The site's own are checked when it is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).is_file()]


PACKAGES = ["opt_pt", "opt_tf", "opt_flax", "opt_common"]


def public(package: str) -> Iterator[tuple[str, Any]]:
    """What a package exports, and the public methods of its classes, own and inherited from this repository's."""
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        yield name, value
        for cls in inspect.getmro(value) if inspect.isclass(value) else ():
            if cls.__module__.startswith("opt_"):
                yield from ((f"{name}.{key}", x) for key, x in vars(cls).items() if not key.startswith("_"))


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_public_without_a_docstring(package):
    kinds = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property)
    found = [name for name, x in public(package) if isinstance(x, (*kinds, type)) and not inspect.getdoc(x)]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    """By itself, or as another name of one that is."""
    pages = [DOCS / "reference" / f"{package.removeprefix('opt_')}.md", DOCS / "reference" / "common.md"]
    shown = re.findall(r"^::: [\w.]*?(\w+)$|^\| `(\w+)` \| \[", "".join(p.read_text() for p in pages), re.MULTILINE)
    assert set(importlib.import_module(package).__all__) <= {name for names in shown for name in names}


# What people come to do, and a word that the page which says how must have
TASKS = {
    "convert a pytorch_model.bin to safetensors": ("loading.md", ["pytorch_model.bin", "opt-zoo convert"]),
    "load in float16": ("loading.md", ['dtype="float16"']),
    "fit a TFOPT": ("coming-from-tfopt.md", ["TFOPT", "model.fit("]),
    "FlaxOPT with params": ("coming-from-flaxopt.md", ["FlaxOPT", "params", "TrainState"]),
    "8 bits": ("big-models.md", ["load_in_8bit", "--bits 8"]),
    "several GPUs": ("big-models.md", ["several GPUs", "tp_plan", "device_map"]),
    "beam search": ("generating.md", ["Beam search", "num_beams"]),
    "LoRA": ("training.md", ["LoRA", "peft", "enable_lora"]),
    "a cache by hand": ("generating.md", ["past_key_values", "use_cache", "init_cache"]),
    "Orbax": ("coming-from-flaxopt.md", ["Orbax", "--to orbax"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_page_says_how(task):
    page, words = TASKS[task]
    text = re.sub(r"\s+", " ", (DOCS / page).read_text()).lower()
    assert not [word for word in words if word.lower() not in text]
    assert page in (DOCS / "index.md").read_text()


@pytest.mark.parametrize("script", ["pictures.py", "command.py"])
def test_what_scripts_write_is_up_to_date(script):
    written = runpy.run_path(str(DOCS / script))["written"]()
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name} is out of date: python docs/{script}"
