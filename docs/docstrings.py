"""Docstrings as Markdown: their lines `argument: …`, and what is indented below one, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"[a-z]\w*(, [a-z]\w*)*: ")


def markdown(docstring: str) -> str:
    """A docstring with a list in place of each run of lines that explain arguments."""
    lines, listed = [], False
    for line in docstring.splitlines():
        if found := ARGUMENT.match(line):
            names = ", ".join(f"`{name}`" for name in found[0].removesuffix(": ").split(", "))
            lines += ([] if listed else [""]) + [f"- {names}: {line[found.end() :]}"]
            listed = True
        elif listed and line.startswith("    "):
            lines.append("  " + line)
        else:
            lines += [""] if listed and line else []
            lines.append(line)
            listed = False
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Gives mkdocstrings the docstrings of the reference as `markdown` makes them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
