"""What importing does and does not do, each in a process of its own; what is in a release, and that its types serve."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

import opt_common
from backends import COMPLETE
from opt_common.frameworks import registered
from opt_common.weights import HEADS

ROOT = Path(__file__).parents[1]
OWN = {"opt_common": ()} | {framework.package: framework.needs for framework in registered().values()}
ALL = {name for names in OWN.values() for name in names}


def python(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("package", OWN)
def test_imports_no_other_framework(package, tmp_path):
    """Nor needs one: with the others blocked it imports too. (TensorFlow itself tries jax; that is not ours.)"""
    missing = [f.missing for f in registered().values() if f.package == package and f.missing]
    if missing:
        pytest.skip(missing[0])
    others = sorted(ALL - set(OWN[package]))
    own = "".join(f"import {name}; " for name in OWN[package])
    # its own framework first: Keras looks for scikit-learn, which looks at torch; a fork asks with the others blocked
    program = f"""
import os, sys
{own}
before, blocked = set(sys.modules), os.fork()
if not blocked:
    sys.modules.update(dict.fromkeys({others}))
import {package}
if not blocked:
    sys.exit()
assert os.waitpid(blocked, 0)[1] == 0
print(*[m for m in {others} if m in sys.modules and m not in before])
"""
    ran = python(program, tmp_path)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


def test_a_folder_named_common_is_no_trouble(tmp_path):
    """A user's own common/ must not shadow ours, nor ours theirs."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("mine = True")
    program = "import common, opt_pt; assert common.mine; print(opt_pt.OPTConfig.from_size('350m').embed_dim)"
    ran = python(program, tmp_path)
    assert ran.stdout.strip() == "512", ran.stderr


@pytest.mark.skipif(bool(registered()["tf"].missing), reason="tensorflow and keras not installed")
def test_another_keras_backend_is_refused(tmp_path):
    ran = python("import opt_tf", tmp_path, KERAS_BACKEND="jax")
    assert ran.returncode != 0
    assert "KERAS_BACKEND=tensorflow" in ran.stderr.splitlines()[-1]
    ran = python("import opt_tf, keras; print(keras.backend.backend())", tmp_path, KERAS_BACKEND="tensorflow")
    assert ran.stdout.strip() == "tensorflow", ran.stderr


AUTO = {"AutoConfig", "AutoTokenizer"}
AUTO |= {name.replace("OPTFor", "AutoModelFor").replace("OPTModel", "AutoModel") for name in HEADS}
NAMES = {"GPT2Tokenizer", "KVCache", "OPTConfig", *HEADS, *AUTO}
EXTRA = {"flax": {"shardings"}}


def test_the_same_names_in_all(framework):
    described = registered()[framework]
    package = described.module()
    names = {name.removeprefix(described.prefix) for name in package.__all__}
    assert names == NAMES | EXTRA.get(framework, set()) if framework in COMPLETE else names < NAMES
    assert all(hasattr(package, name) for name in package.__all__)


def test_listing_the_frameworks_imports_none(tmp_path):
    """Nor does `opt-zoo --help`, which lists them."""
    program = (
        "import sys; from typer.testing import CliRunner; from opt_common.cli import app;"
        "ran = CliRunner().invoke(app, ['parity', '--help']);"
        "from opt_common.frameworks import registered; assert ' or '.join(registered()) in ran.output, ran.output;"
        "titles = [f.title for f in registered().values()];"
        f"assert len(titles) >= 3; print(*[m for m in {sorted(ALL)} if m in sys.modules])"
    )
    ran = python(program, tmp_path, COLUMNS="200")
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist, made from a copy of the repository."""
    folder = tmp_path_factory.mktemp("release")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "copy")
        patch.setattr(sys, "argv", sys.argv[:1])
        return folder / build_meta.build_wheel(str(folder)), folder / build_meta.build_sdist(str(folder))


def test_one_version(release):
    version = opt_common.__version__
    wheel, sdist = release
    assert (wheel.name, sdist.name) == (f"opt_zoo-{version}-py3-none-any.whl", f"opt_zoo-{version}.tar.gz")
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_version_of_each_package(framework):
    assert registered()[framework].module().__version__ == opt_common.__version__


def test_what_is_in_a_release(release):
    """The wheel: packages, their types, opt-demo. The sdist: all that the tests need, too."""
    wheel, sdist = release
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"opt_common", "opt_pt", "opt_tf", "opt_flax"}
    assert {f"{top}/py.typed" for top in tops} < names
    assert {f"opt_common/opt-demo/{path.name}" for path in (ROOT / "common/opt_common/opt-demo").iterdir()} < names
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "examples", "benchmarks", "docs"):
        wanted = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in wanted if "__pycache__" not in name} <= packed
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "constraints.txt", "LICENSE"} <= packed


def test_the_card_of_the_demo():
    """In the Hub's format, and of these weights."""
    folder = ROOT / "common" / "opt_common" / "opt-demo"
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    config = opt_common.OPTConfig.from_pretrained(folder)
    assert {"license: apache-2.0", "pipeline_tag: text-generation"} <= set(front.splitlines())
    assert f"| parameters | {opt_common.parameter_count(config):,} |" in text
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    assert f"| layers, width, heads | {', '.join(map(str, sizes))} |" in text
    assert f"| positions | {config.max_position_embeddings} |" in text


RIGHT = {
    "pt": """
import torch
from opt_pt import GPT2Tokenizer, OPTConfig, OPTForCausalLM

tokenizer = GPT2Tokenizer.from_pretrained("opt-demo")
model = OPTForCausalLM.from_pretrained("opt-demo", dtype="float16").eval()
out = model(**tokenizer("Once upon", return_tensors="pt"), output_hidden_states=True)
logits: torch.Tensor = out.logits
assert out.hidden_states is not None
tokens = model.generate(torch.tensor([[2, 5]]), max_new_tokens=3)
layers: int = OPTConfig.from_size("350m").num_hidden_layers
""",
    "tf": """
from opt_tf import GPT2Tokenizer, OPTConfig, TFOPTForCausalLM

tokenizer = GPT2Tokenizer.from_pretrained("opt-demo")
model = TFOPTForCausalLM.from_pretrained("opt-demo")
tokens = model.generate(**tokenizer("Once upon", return_tensors="tf"), max_new_tokens=3)
model.save_pretrained("copy")
layers: int = OPTConfig.from_size("350m").num_hidden_layers
""",
    "flax": """
import jax.numpy as jnp
from opt_flax import FlaxOPTForCausalLM, GPT2Tokenizer, OPTConfig

tokenizer = GPT2Tokenizer.from_pretrained("opt-demo")
model = FlaxOPTForCausalLM.from_pretrained("opt-demo")
out = model(jnp.array([[2, 5]]), output_hidden_states=True)
logits = out.logits
tokens = model.generate(**tokenizer("Once upon", return_tensors="jax"), max_new_tokens=3)
layers: int = OPTConfig.from_size("350m").num_hidden_layers
""",
}
# wrong -> what a type checker says of it
WRONG = {
    "from opt_{key} import OPTForCasualLM": '"OPTForCasualLM" is unknown import symbol',
    "import opt_{key}; opt_{key}.GPT2Tokenizer.from_pretraind('opt-demo')": 'attribute "from_pretraind"',
    "import opt_{key}; opt_{key}.{prefix}OPTForCausalLM.from_pretrained()": "Argument missing for parameter",
    "import opt_{key}; x: str = opt_{key}.OPTConfig.from_size('350m').num_hidden_layers": '"int" is not assignable',
}


@pytest.fixture(scope="module")
def type_errors(release, tmp_path_factory) -> dict[str, list[str]]:
    """What pyright says of each script, line by line, beside the unpacked wheel."""
    site, scripts = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("scripts")
    zipfile.ZipFile(release[0]).extractall(site)
    for key, framework in registered().items():
        if key in RIGHT and not framework.missing:
            (scripts / f"right_{key}.py").write_text(RIGHT[key])
            wrong = [line.format(key=key, prefix=framework.prefix) for line in WRONG]
            (scripts / f"wrong_{key}.py").write_text("\n".join(wrong))
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(scripts)],
        capture_output=True,
        text=True,
        cwd=scripts,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    found = {path.name: [] for path in scripts.iterdir()}
    for said in json.loads(ran.stdout)["generalDiagnostics"]:
        line = said["range"]["start"]["line"]
        found[Path(said["file"]).name].append(f"{line}: {said['message']}")
    return found


@pytest.mark.parametrize("key", RIGHT)
def test_types_are_read(key, type_errors):
    """py.typed: a user's script passes, and what is wrong in one is named."""
    if registered()[key].missing:
        pytest.skip(str(registered()[key].missing))
    assert type_errors[f"right_{key}.py"] == []
    for number, said in enumerate(WRONG.values()):
        lines = [line for line in type_errors[f"wrong_{key}.py"] if line.startswith(f"{number}: ")]
        assert any(said in line for line in lines), (number, said, lines)
