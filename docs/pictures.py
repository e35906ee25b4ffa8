"""Draws the pictures of docs/architecture.md from the code itself.

python docs/pictures.py    # writes docs/assets/folders.svg and docs/assets/call.svg; tests/test_docs.py compares them
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ["opt_pt", "opt_tf", "opt_flax"]
# the classes that a call runs through, outermost first, and what each calls the next
WAY = {"OPTForCausalLM": "model", "OPTDecoder": "layers", "OPTDecoderLayer": "self_attn", "OPTAttention": ""}
HELPERS = ("inputs.py", "attention.py", "cache.py")  # whose functions are steps too
WHAT = {
    "model.py": "OPT and nothing else: attention, layer, decoder, OPTModel, OPTForCausalLM",
    "attention.py": "the formulas and kernels to attend with, and what each token may see",
    "cache.py": "KVCache: keys and values of past tokens",
    "framework.py": "how opt_common sees this framework",
    "generation/": "generate and stream: choosing tokens, the loop, beams, drafts",
    "heads.py": "sequence classification, question answering",
    "inputs.py": "a call's arguments, checked; positions and documents",
    "layers.py": "what model.py needs besides the framework's own layers",
    "modeling_opt.py": "the classes by transformers' module name (modeling_tf_opt, modeling_flax_opt)",
    "outputs.py": "outputs, registered with the framework's nested structures",
    "pretrained.py": "the base class: from_pretrained, save_pretrained, settings",
    "quantized.py": "Linears of 8 and 4 bits",
    "calibration.py": "GPTQ's update of the weights",
    "devices.py": "device_map",
    "fast/": "engines and kernels, used only where they compute what the modules would",
    "functional.py": "params in and out, as transformers' Flax classes",
    "launch.py": "a command as several processes",
    "parallel.py": "tensor parallelism",
    "products.py": "the fastest matrix products",
    "sharding.py": "where weights lie on a mesh of devices",
    "training.py": "what fit and evaluate are given",
}
INK, PALE, LINE, MARK = "#1f2430", "#f4f5fb", "#8c94b8", "#dfe3fb"
STYLE = "font-family:system-ui,sans-serif;font-size:13px"


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{INK}" {more}>{escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, fill: str = PALE) -> str:
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{LINE}"/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}" role="img"><title>{escape(title)}</title>'
    return "\n".join([head, *parts, "</svg>", ""])


# === The folders ===


def folders() -> str:
    """A row a file or folder, a column a framework; what they share is below."""
    names = {
        f"{path.name}/" if path.is_dir() else path.name.replace("_tf_", "_").replace("_flax_", "_")
        for package in PACKAGES
        for path in (ROOT / package).iterdir()
        if (path / "__init__.py").exists() or path.suffix == ".py" and path.stem != "__init__"
    }
    # what all have comes first, the model before all
    rows = sorted(names, key=lambda name: (-sum(has(p, name) for p in PACKAGES), name != "model.py", name))
    parts, y = [], 44
    for i, package in enumerate(PACKAGES):
        parts += [box(10 + i * 85, 8, 78, 26, MARK), text(49 + i * 85, 25, package, 'text-anchor="middle"')]
    for name in rows:
        for i, package in enumerate(PACKAGES):
            if has(package, name):
                parts += [box(10 + i * 85, y, 78, 20, MARK)]
        parts += [
            box(270, y, 690, 20),
            text(278, y + 14.5, name, 'font-weight="600"'),
            text(410, y + 14.5, WHAT.get(name, "")),
        ]
        y += 24
    y += 16
    shared = sorted((ROOT / "common" / "opt_common").rglob("*.py"), key=lambda path: (str(path.parent), path.name))
    groups: dict[str, list[str]] = {}
    for path in shared:
        if path.stem != "__init__":
            groups.setdefault(str(path.parent.relative_to(ROOT / "common")) + "/", []).append(path.stem)
    for group, stems in groups.items():
        lines = wrapped("  ".join(stems), 96)
        height = 12 + 17 * len(lines)
        parts += [box(10, y, 950, height), text(18, y + 18, group, 'font-weight="600"')]
        parts += [text(300, y + 18 + 17 * i, line) for i, line in enumerate(lines)]
        y += height + 4
    return svg(970, y + 6, "The files of the three packages, and what they share", parts)


def has(package: str, name: str) -> bool:
    own = name.replace("modeling_opt", f"modeling_{package.removeprefix('opt_')}_opt".replace("_pt", ""))
    return (ROOT / package / own).exists()


def wrapped(words: str, width: int) -> list[str]:
    lines = [""]
    for word in words.split("  "):
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return lines


# === A call ===


def steps(package: str, name: str) -> Iterator[tuple[str, str]]:
    """What the `forward` of a class calls, in order, and where that is: a module of its own, or a file beside it."""
    tree = ast.parse((ROOT / package / "model.py").read_text())
    files = {
        alias.name: f"{node.module}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    modules = {
        node.targets[0].attr
        for node in ast.walk(methods["__init__"])
        if isinstance(node, ast.Assign)
        if isinstance(node.targets[0], ast.Attribute) and isinstance(node.value, ast.Call | ast.IfExp)
    }
    seen = set()
    for node in in_order(methods["forward"]):
        found = None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found = (node.attr, "module") if node.attr in modules else None
        elif isinstance(node, ast.Name) and node.id in files and files[node.id] in HELPERS:
            found = node.id, files[node.id]
        if found and found not in seen:
            seen.add(found)
            yield found


def in_order(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a body as they are evaluated, nearly: a call's arguments before the call."""

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            children = [*node.args, *node.keywords, node.func]
        elif isinstance(node, ast.For):
            children = [node.iter, *node.body]
        elif isinstance(node, ast.Assign):
            children = [node.value]
        for child in children:
            yield from visit(child)
        yield node

    for statement in function.body:
        yield from visit(statement)


def call() -> str:
    """A column a class, in it what its `forward` calls, from top to bottom."""
    parts, tops, heights = [], {}, {}
    for i, name in enumerate(WAY):
        x, found = 10 + i * 245, list(steps("opt_pt", name))
        height = 44 + 25 * len(found)
        parts += [box(x, 10, 215, height), text(x + 10, 31, name, 'font-weight="600"')]
        for j, (step, where) in enumerate(found):
            y = 44 + 25 * j
            parts += [box(x + 8, y, 199, 21, MARK if where == "module" else "#ffffff"), text(x + 15, y + 15, step)]
            if where != "module":
                parts += [text(x + 201, y + 15, where, 'text-anchor="end" fill-opacity=".65"')]
            tops[name, step] = y + 10
        heights[name] = height
    for i, (name, step) in enumerate([*WAY.items()][:-1]):
        x, y = 217 + i * 245, tops[name, step]
        way = f"M{x} {y}H{x + 19}V27H{x + 36}"
        parts += [f'<path d="{way}" fill="none" stroke="{LINE}" stroke-width="2"/>']
        parts += [f'<path d="M{x + 38} 27l-8 -5v10z" fill="{LINE}"/>']
    return svg(970, max(heights.values()) + 20, "A call's way through opt_pt/model.py", parts)


def written() -> dict[Path, str]:
    """What this script writes, by file."""
    assets = ROOT / "docs" / "assets"
    return {assets / "folders.svg": folders(), assets / "call.svg": call()}


if __name__ == "__main__":
    for path, picture in written().items():
        path.write_text(picture, encoding="utf-8")
