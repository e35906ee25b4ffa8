"""What importing does and does not do, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends import COMPLETE
from opt_common.frameworks import registered
from opt_common.weights import HEADS

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
    ran = python(
        f"import sys; {own}before = set(sys.modules); import {package};"
        f"print(*[m for m in {others} if m in sys.modules and m not in before])",
        tmp_path,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
    # its own framework first: Keras looks for scikit-learn, which looks at torch
    ran = python(f"import sys; {own}sys.modules.update(dict.fromkeys({others})); import {package}", tmp_path)
    assert ran.returncode == 0, ran.stderr


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


def test_the_same_names_in_all(framework):
    described = registered()[framework]
    package = described.module()
    names = {name.removeprefix(described.prefix) for name in package.__all__}
    assert names == NAMES if framework in COMPLETE else names < NAMES
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
