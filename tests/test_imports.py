"""Who may import whom: no circles, and the layers of the packages. Imports inside functions and under TYPE_CHECKING
count too: a circle that Python does not notice is one to the reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from opt_common.frameworks import registered

ROOT = Path(__file__).parents[1]
FRAMEWORKS = [f.package for f in registered().values() if (ROOT / f.package).is_dir()]
PACKAGES = {"opt_common": ROOT / "common"} | dict.fromkeys(FRAMEWORKS, ROOT)
Graph = dict[str, set[str]]


def import_graph(root: Path, package: str) -> Graph:
    """For each module of a package, every module that it names in an import, of this package or not."""
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in (root / package).rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}

    def imported(name: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + (paths[name].name == "__init__.py")] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            # `from . import a` names the module a where there is one, and else what the package itself defines
            yield from whole & paths.keys() or {base}

    return {
        name: {to for node in ast.walk(ast.parse(path.read_text())) for to in imported(name, node)} - {name}
        for name, path in paths.items()
    }


def circle(graph: Graph) -> list[str]:
    """The modules of one circle, each importing the next, or nothing."""
    try:
        TopologicalSorter({name: imports & graph.keys() for name, imports in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def importers(graph: Graph, *targets: str) -> set[str]:
    """The modules outside `targets` that import one of them, or a module of theirs."""
    return {name for name in graph if not within(name, *targets) and any(within(to, *targets) for to in graph[name])}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package):
    assert " imports ".join(circle(import_graph(PACKAGES[package], package))) == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_opt_common_alone(package):
    """No framework knows another, and opt_common knows none of them."""
    others = set(PACKAGES) - {package, "opt_common"}
    assert importers(import_graph(PACKAGES[package], package), *others) == set()


def test_layers_of_opt_common():
    """What OPT is < checkpoints: containers (bytes) < layouts (names) < what works on whole checkpoints < commands."""
    graph = import_graph(PACKAGES["opt_common"], "opt_common")
    wing = "opt_common.checkpoints"
    assert importers(graph, wing) <= {"opt_common", "opt_common.bench", "opt_common.cli", "opt_common.parity"}
    below = {name for name in graph if within(name, f"{wing}.containers")}
    assert below and importers(graph, f"{wing}.layouts").isdisjoint(below)


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_layers_of_a_framework(package):
    """The package < heads < model < everything else, `pretrained` and `fast` among it."""
    graph = import_graph(PACKAGES[package], package)
    assert {f"{package}.model", f"{package}.pretrained"} <= graph.keys()
    modeling = {"opt_pt": "modeling_opt", "opt_tf": "modeling_tf_opt", "opt_flax": "modeling_flax_opt"}
    doors = {package, f"{package}.{modeling[package]}"}  # which only name what lies below
    assert importers(graph, f"{package}.heads") <= doors
    assert importers(graph, f"{package}.model") <= {*doors, f"{package}.heads"}


MADE_UP = {
    "a": "from . import b",
    "b": "def late():\n    from .c.d import x",
    "c/__init__": "",
    "c/d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..e import y",
    "e": "import {package}.a",
}


@pytest.mark.parametrize("broken", [None, *MADE_UP])
def test_the_checker_sees_a_circle(broken, tmp_path):
    """One of every kind of import; without any one of them there is no circle."""
    for name, text in MADE_UP.items():
        path = tmp_path / "made_up" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == broken else text.format(package="made_up"))
    (tmp_path / "made_up" / "__init__.py").write_text("from .a import b\n")
    found = circle(import_graph(tmp_path, "made_up"))
    if broken in (None, "c/__init__"):
        assert sorted(set(found)) == [f"made_up.{name}" for name in ("a", "b", "c.d", "e")]
    else:
        assert found == []
