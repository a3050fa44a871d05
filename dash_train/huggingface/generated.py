"""The modelling file of an exported Dash model: all its classes, in one file that needs torch and transformers alone.

It is put together from the modules that define them here, with all that they need of others: what a folder does without
dash-train is what it does with it. Only what needs kernels is replaced: plain.py stands for the blocks and the cache.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "dash_train"
ROOTS = ("DashConfig", "DashModel", "DashForCausalLM")
MODELING, STAND_INS = "dash_train.huggingface.modeling", "dash_train.huggingface.plain"
BEGINNING = '''"""A language model with DashAttention (arXiv 2605.18753): what `trust_remote_code=True` loads.

Made by dash-train from its own modules. Where dash-train is installed, its classes are used, with their kernels; where
it is not, those below, which compute the same in plain torch.
"""

from __future__ import annotations
'''
END = """


try:
    from dash_train.huggingface import DashConfig, DashForCausalLM, DashModel
except ImportError:
    pass
"""


@cache
def modeling_code() -> str:
    """The text of the modelling file."""
    made = _Collection()
    for name in ROOTS:
        made.add(MODELING, name)
    imports = [
        f"from {origin} import {', '.join(sorted(names))}" if any(names) else f"import {origin}"
        for (origin, _), names in sorted(made.imports.items())
    ]
    return "\n".join([BEGINNING, *imports]) + "\n\n\n" + "\n\n\n".join(made.definitions.values()) + END


class _Collection:
    """Definitions, each after those that it needs, and the imports of all."""

    def __init__(self) -> None:
        self.definitions: dict[str, str] = {}
        self.imports: dict[tuple[str, bool], set[str]] = {}  # names by module, and whether they are taken from it
        self.origins: dict[str, str] = {}

    def add(self, module: str, name: str) -> None:
        """Add what a module means by a name: what it defines, or what it imports."""
        source = _Source.of(module)
        if name in _Source.of(STAND_INS).definitions:
            module, source = STAND_INS, _Source.of(STAND_INS)
        elif name in source.imports:
            origin, original = source.imports[name]
            if origin.partition(".")[0] == PACKAGE:
                self.add(origin, original)
            else:
                self.imports.setdefault((origin, bool(original)), set()).add(original)
            return
        if name in self.origins or name not in source.definitions:  # or a builtin
            if self.origins.get(name, module) != module and name in source.definitions:
                raise ValueError(f"{name} is defined in {self.origins[name]} and in {module}; rename one of them")
            return
        self.origins[name] = module
        for needed in _names_in(source.definitions[name], annotations=False):
            self.add(module, needed)
        for needed in _names_in(source.definitions[name], annotations=True):
            if source.imports.get(needed, (PACKAGE, ""))[0].partition(".")[0] != PACKAGE:
                self.add(module, needed)
        self.definitions[name] = source.text_of(name)


class _Source:
    """The text of a module, its definitions and what it imports, by name."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        self.lines = Path(spec.origin).read_text().splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        for node in ast.parse("\n".join(self.lines)).body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
                self.imports |= {
                    a.asname: (node.module or "", f"{a.name} as {a.asname}") for a in node.names if a.asname
                }
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node

    @classmethod
    @cache
    def of(cls, module: str) -> "_Source":
        return cls(module)

    def text_of(self, name: str) -> str:
        """A definition as it is written, with its decorators and the comment above it."""
        node = self.definitions[name]
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1
        while start and self.lines[start - 1].startswith("#"):
            start -= 1
        return "\n".join(self.lines[start : node.end_lineno])


def _names_in(node: ast.AST, *, annotations: bool) -> Iterator[str]:
    """The names in a definition, with or without those in annotations of functions, which nobody evaluates."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        annotates = field == "returns" or (field == "annotation" and isinstance(node, ast.arg))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and (annotations or not annotates):
                yield from _names_in(child, annotations=annotations)
