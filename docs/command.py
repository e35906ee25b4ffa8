"""Writes docs/reference/command.md from the command itself.

python docs/command.py    # tests/test_docs.py compares
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from opt_common.cli import app


def written() -> dict[Path, str]:
    """What this script writes, by file."""
    parts = ["# The command opt-zoo", "Every command prints its options with `--help`."]
    command: Any = typer.main.get_command(app)
    for name, sub in command.commands.items():
        arguments = [p for p in sub.params if p.param_type_name == "argument"]
        usage = [f"{p.name.upper()}{' …' if p.nargs < 0 else ''}" for p in arguments]
        parts += [f"## opt-zoo {name}", f"`{' '.join(['opt-zoo', name, *usage, '[OPTIONS]'])}`", sub.help]
        rows = [row(p) for p in sub.params]
        parts.append("\n".join(["| | | default |", "|---|---|---|", *rows]))
    return {Path(__file__).parent / "reference" / "command.md": "\n\n".join(parts) + "\n"}


def row(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in param.opts) if param.param_type_name == "option" else f"`{param.name}`"
    plain = param.default is None or param.default is False or param.required or callable(param.default)
    default = "" if plain else f"`{param.default}`"
    return f"| {names} | {(param.help or '').replace('|', ' ')} | {default} |"


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
