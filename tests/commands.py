"""`opt-zoo` in a process of its own, as a user runs it, and in this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings

import pytest

from opt_common import cli


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opt_common.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def opt_zoo(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same without the seconds that a process takes to import a framework."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(action="default"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["opt-zoo", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess(sys.argv, code or 0, out.getvalue(), err.getvalue())
