"""Imports run one way, without circles, and `import dash_train` waits for nothing big."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"dash_train.errors", "dash_train.recipe.section"}
ALLOWED = {  # by the folder that imports; nothing but the entrance `__main__` imports `launch`
    "kernels": ("dash_train.kernels",),
    "data": ("dash_train.data",),
    "model": ("dash_train.model", "dash_train.kernels"),
}


def sources() -> dict[str, Path]:
    """Every module by its name, whatever links lead to it."""
    folders = {"dash_train": ROOT / "dash_train"}
    folders |= {f"dash_train.{name}": ROOT / name for name in ("data", "kernels", "launch", "model")}
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            if folder.name == "dash_train" and path.relative_to(folder).parts[0] in (
                "data",
                "kernels",
                "launch",
                "model",
            ):
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    """Our modules that these statements import, those in functions and for type checkers left out."""
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                name = f"{statement.module}.{alias.name}"
                yield name if name in SOURCES else statement.module
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.Try):
            yield from imported(statement.body)


GRAPH = {
    module: {name for name in imported(ast.parse(path.read_text()).body) if name in SOURCES}
    for module, path in SOURCES.items()
}


def test_there_are_no_circles() -> None:
    """Python would run into some only when another module is imported first."""
    assert len(GRAPH) > 100
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_run_one_way(module: str) -> None:
    """launch -> dash_train -> model -> kernels, and data apart."""
    folder = module.split(".")[1] if "." in module else ""
    for name in GRAPH[module] - LEAVES:
        if folder in ALLOWED:
            assert name.startswith(ALLOWED[folder])
        elif folder != "__main__":
            assert not name.startswith("dash_train.launch")


def test_importing_the_package_imports_nothing_big() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import dash_train; seconds = time.perf_counter() - start; "
        "print(seconds, sorted({'torch', 'transformers', 'triton', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    seconds, _, modules = printed.strip().partition(" ")
    assert modules == "[]" and float(seconds) < 0.3
