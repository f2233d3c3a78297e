"""The package's floors: imports go down only, and in no circle (CONTRIBUTING.md, "Layout")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qwen_sparse

PACKAGE = Path(qwen_sparse.__file__).parent
FLOORS = ("base", "kernels", "model", "engine")  # from the bottom; what is in none of them is above all
MODULES = {
    ".".join(("qwen_sparse", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those of functions, nor those for type checkers."""
    for statement in tree.body:
        if isinstance(statement, ast.Try):
            yield from statement.body
        yield statement


def imports(name: str, path: Path, *, everywhere: bool) -> set[str]:
    """Modules of the package that a module imports; ``everywhere``: in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree) if everywhere else top_level(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            named = {f"{base}.{alias.name}" for alias in node.names if alias.name != "_C"}  # the extension module
            submodules = named & MODULES.keys()
            found |= submodules
            if len(submodules) < len(named):
                found.add(base)
    return found & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    above = {other for other in imports(name, MODULES[name], everywhere=True) if floor(other) > floor(name)}
    assert not above, f"{name} imports from a floor above it"


def test_no_circles() -> None:
    graph = {name: imports(name, path, everywhere=False) - {name} for name, path in MODULES.items()}
    for name in graph:  # a package's __init__ runs before its modules: those import it without meaning to
        graph[name] -= {name.rpartition(".")[0]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules that import each other: {' -> '.join(reversed(error.args[1]))}")


def test_the_imports_are_seen() -> None:
    seen = imports("qwen_sparse.engine.prefill", MODULES["qwen_sparse.engine.prefill"], everywhere=True)
    assert {"qwen_sparse.base.arguments", "qwen_sparse.model.decoder"} <= seen
    assert floor("qwen_sparse.base.arguments") < floor("qwen_sparse.model.decoder") < floor("qwen_sparse.cli")
