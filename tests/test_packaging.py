"""What importing does and does not do, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt_common.frameworks import FRAMEWORKS

OWN = {"opt_common": [], "opt_pt": ["torch"], "opt_tf": ["tensorflow", "keras"], "opt_flax": ["jax", "flax"]}
ALL = {name for names in OWN.values() for name in names}


def python(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("package", OWN)
def test_imports_no_other_framework(package, tmp_path):
    """Nor needs one: with the others blocked it imports too. (TensorFlow itself tries jax; that is not ours.)"""
    missing = [f.missing for f in FRAMEWORKS.values() if f.package == package and f.missing]
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


@pytest.mark.skipif(bool(FRAMEWORKS["tf"].missing), reason="tensorflow and keras not installed")
def test_another_keras_backend_is_refused(tmp_path):
    ran = python("import opt_tf", tmp_path, KERAS_BACKEND="jax")
    assert ran.returncode != 0
    assert "KERAS_BACKEND=tensorflow" in ran.stderr.splitlines()[-1]
    ran = python("import opt_tf, keras; print(keras.backend.backend())", tmp_path, KERAS_BACKEND="tensorflow")
    assert ran.stdout.strip() == "tensorflow", ran.stderr


def test_the_same_names_in_all_three(tmp_path):
    import opt_pt

    for framework in FRAMEWORKS.values():
        if framework.missing is None:
            package = __import__(framework.package)
            names = {name.removeprefix("TF").removeprefix("Flax") for name in package.__all__}
            assert names == set(opt_pt.__all__)
            assert all(hasattr(package, name) for name in package.__all__)
