"""Modules of this library as text: their definitions, what they import, and where a name comes from.

Enters: names of modules. Leaves: `SourceModule`s and, for a name in one of them, where it is defined.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import final

PACKAGE = "kfac_fx"
Place = tuple[str, str]  # module, and the name of a definition in it


@final
@dataclass(frozen=True, kw_only=True)
class External:
    """An import of another package. module None: `import name`."""

    module: str | None
    name: str
    alias: str

    def __str__(self) -> str:
        """The import statement."""
        what = self.name if self.alias == self.name else f"{self.name} as {self.alias}"
        return f"import {what}" if self.module is None else f"from {self.module} import {what}"


Origin = External | Place | str  # a str is a module of this library


@final
@dataclass(frozen=True, kw_only=True)
class SourceModule:
    """One module as text. definitions: top-level statements by the name they bind, in order."""

    name: str
    lines: tuple[str, ...]
    summary: str
    definitions: dict[str, ast.stmt]
    imports: dict[str, Origin]

    def first_line(self, node: ast.stmt) -> int:
        """Of a statement, from 1: with decorators and the comment right above."""
        first = node.lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.decorator_list:
            first = node.decorator_list[0].lineno
        while first > 1 and self.lines[first - 2].strip().startswith("#"):
            first -= 1
        return first


@functools.cache
def source_module(name: str) -> SourceModule:
    """The text of a module of this library."""
    text = inspect.getsource(importlib.import_module(name))
    tree = ast.parse(text)
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, Origin] = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if statement.value is not None:
                definitions[statement.target.id] = statement
        elif isinstance(statement, ast.Assign):
            definitions |= {t.id: statement for t in statement.targets if isinstance(t, ast.Name)}
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                bound = alias.asname or alias.name
                imports[bound] = External(module=None, name=alias.name, alias=bound)
        elif isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
            assert statement.module is not None, f"{name} imports relatively"
            for alias in statement.names:
                bound = alias.asname or alias.name
                imports[bound] = _imported(statement.module, alias.name, bound)
    summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return SourceModule(
        name=name,
        lines=tuple(text.splitlines()),
        summary=summary,
        definitions=definitions,
        imports=imports,
    )


def origin(module: str, name: str) -> Origin | None:
    """Where a global name of this module comes from; None for a builtin."""
    found = source_module(module)
    if name in found.definitions:
        return module, name
    imported = found.imports.get(name)
    return origin(*imported) if isinstance(imported, tuple) else imported


def import_order(modules: set[str]) -> list[str]:
    """These modules, each after those that it imports."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        for imported in source_module(name).imports.values():
            if not isinstance(imported, External):
                visit(imported if isinstance(imported, str) else imported[0])
        order.append(name)

    for name in sorted(modules):
        visit(name)
    return [name for name in order if name in modules]


def _imported(module: str, name: str, alias: str) -> Origin:
    if module.split(".")[0] != PACKAGE:
        return External(module=module, name=name, alias=alias)
    whole = f"{module}.{name}"
    return whole if _is_package(module) and importlib.util.find_spec(whole) is not None else (module, name)


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None
