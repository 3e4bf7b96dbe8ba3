"""Which global names a piece of Python reads, and where they stand.

Enters: a syntax tree. Leaves: references with their positions. Knows nothing of this library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@final
@dataclass(frozen=True, kw_only=True)
class Reference:
    """A global name that is read. attribute: what is taken of it, `b` of `a.b`; None for the name alone.

    node: the name. whole: the name with its attribute, or the name.
    """

    name: str
    attribute: str | None
    node: ast.Name
    whole: ast.Name | ast.Attribute


def global_references(tree: ast.AST) -> list[Reference]:
    """Names that are read and not bound in an enclosing function, comprehension or the class body itself."""
    return list(_visit(tree, frozenset()))


def local_names(tree: ast.AST) -> set[str]:
    """Every name that is bound somewhere inside functions and comprehensions of this tree."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and _stores(node)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def own_attributes(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """`x` of `self.x` (False) and of `super().x` (True)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr, False
        elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            if node.value.func.id == "super":
                yield node.attr, True


def _visit(node: ast.AST, bound: frozenset[str]) -> Iterator[Reference]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id not in bound and isinstance(node.value.ctx, ast.Load):
            yield Reference(name=node.value.id, attribute=node.attr, node=node.value, whole=node)
    elif isinstance(node, ast.Name):
        if node.id not in bound and not _stores(node):
            yield Reference(name=node.id, attribute=None, node=node, whole=node)
    elif isinstance(node, Function):
        yield from _visit_function(node, bound)
    elif isinstance(node, ast.ClassDef):
        outside: list[ast.AST] = [*node.decorator_list, *node.bases, *node.keywords]
        yield from _visit_all(outside, bound)
        for statement in node.body:
            inner = bound if isinstance(statement, Function) else bound | _bound_by(node.body)
            yield from _visit(statement, inner)
    elif isinstance(node, _COMPREHENSIONS):
        targets = [generator.target for generator in node.generators]
        yield from _visit_all(list(ast.iter_child_nodes(node)), bound | _bound_by(targets))
    else:
        yield from _visit_all(list(ast.iter_child_nodes(node)), bound)


def _visit_all(nodes: Sequence[ast.AST], bound: frozenset[str]) -> Iterator[Reference]:
    for node in nodes:
        yield from _visit(node, bound)


def _visit_function(node: Function, bound: frozenset[str]) -> Iterator[Reference]:
    """Decorators, defaults and annotations belong to the scope around it."""
    spec = node.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
    around: list[ast.AST] = [*spec.defaults, *(d for d in spec.kw_defaults if d is not None)]
    around += [argument.annotation for argument in arguments if argument.annotation is not None]
    body: list[ast.AST]
    if isinstance(node, ast.Lambda):
        body = [node.body]
    else:
        around += [*node.decorator_list, *([] if node.returns is None else [node.returns])]
        body = list(node.body)
    yield from _visit_all(around, bound)
    yield from _visit_all(body, bound | {argument.arg for argument in arguments} | _bound_by(body))


def _bound_by(nodes: Sequence[ast.AST]) -> frozenset[str]:
    """Names that these statements bind in their own scope."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names |= {node.id} if _stores(node) else set()
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            names |= {node.name} | _bound_by(list(ast.iter_child_nodes(node)))
        elif not isinstance(node, (*_COMPREHENSIONS, ast.Lambda)):
            names |= _bound_by(list(ast.iter_child_nodes(node)))
    return frozenset(names)


def _stores(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)
