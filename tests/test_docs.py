"""README.md and docs/: the site builds, every snippet runs, every public name has a docstring and is in the reference.

A page's Python runs from top to bottom in one namespace, its `opt-zoo` commands in order, in a folder that holds tiny
checkpoints by the Hub's names. What cannot run here is listed by name: it is compiled, and its imports are checked.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
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
    "import FlaxOPTForCausalLM  # transformers 4": "the old Flax: tests/test_flax_functional.py",
    "keras_hub": "keras-hub: tests/test_keras_hub.py",
}


def snippets(page: str, language: str) -> Iterator[str]:
    """The blocks of a page in a language, in tabs and columns too."""
    blocks = re.findall(
        rf"^( *)```{language}\b[^\n]*\n(.*?)^\1```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return (textwrap.dedent(code) for _, code in blocks)


def cases(language: str) -> list[str]:
    return [page for page in PAGES if any(snippets(page, language))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with facebook/opt-…, random weights of one layer's depth beside opt-demo's tokenizer."""
    from opt_common.config import OPTConfig
    from opt_common.hub import fetch
    from opt_common.tokenizer import GPT2Tokenizer
    from opt_pt import OPTForCausalLM

    folder, demo = tmp_path_factory.mktemp("hub"), fetch("opt-demo", ["config.json"])
    first = folder / "facebook" / f"opt-{NAMES[0]}"
    sizes: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, ffn_dim=256)
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


@pytest.mark.parametrize("page", cases("python"))
def test_python(page, folder):
    found: dict[str, Any] = {"__name__": "__main__"}
    for code in snippets(page, "python"):
        elsewhere = [word for word in ELSEWHERE if word in code]
        program = compile(code.replace('"cuda"', '"cpu"'), page, "exec")
        if elsewhere:
            names_exist(ast.parse(code))
        else:
            exec(program, found)


def names_exist(tree: ast.Module) -> None:
    """What a snippet imports from this repository's packages is there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opt_"):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def commands(page: str) -> Iterator[list[str]]:
    """The commands in a page's shell blocks, as lists of words."""
    for block in snippets(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


@pytest.mark.filterwarnings("ignore:.*are not in a keras-hub preset")
@pytest.mark.parametrize("page", cases("sh"))
def test_commands(page, folder):
    for words in commands(page):
        program = re.sub(r"^(\.venv/bin/)", "", words[0])
        assert program in RUN, f"{words[0]}: no test knows how to check it"
        RUN[program](words[1:])


def run_opt_zoo(words: list[str]) -> None:
    if words[0] in ("parity", "bench"):  # tests/test_parity.py runs it
        parse(app, words)
        return
    words = [word for word in words if not word.startswith("cuda")]
    if "--device" in words:
        words.remove("--device")
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0 or (words[0], ran.exit_code) == ("diff", 1), (words, ran.output, ran.exception)


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
    assert rest == ["script.py"] or not run_python(rest)


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
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = [path.read_text() for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES)
    loaded = {url for page in pages for url in re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"> ]*)", page)}
    loaded |= {
        url for page in pages for url in re.findall(r"<link[^>]* rel=\"?stylesheet[^>]* href=\"?([^\"> ]*)", page)
    }
    assert loaded and not [url for url in loaded if re.match(r"(https?:)?//", url)]
