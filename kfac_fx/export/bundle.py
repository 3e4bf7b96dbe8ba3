"""The part of this library's source that some functions and one class need, as one text without its imports.

Enters: where to start. Leaves: definitions in order, copied with their comments, and the imports of other
packages. Of the class only what is reached through `self` and `super()` is kept, from its bases too.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from kfac_fx.export.references import Reference, global_references, local_names, own_attributes
from kfac_fx.export.sources import External, Place, SourceModule, import_order, origin, source_module


@final
@dataclass(frozen=True, kw_only=True)
class Bundle:
    """text: by module, in an order that runs. imports: of other packages. names: what each place is called.

    members: names that the class has kept.
    """

    text: Mapping[str, str]
    imports: frozenset[External]
    names: Mapping[Place, str]
    members: frozenset[str]


def bundle(roots: Sequence[Place], cls: type, members: Iterable[str], *, reserved: Iterable[str]) -> Bundle:
    """What `roots` and these `members` of a class of this library need.

    reserved: names that other text of the same file defines.
    """
    found = _Reached(cls)
    for place in roots:
        found.add(place)
    for member in members:
        found.add_member(member)
    names = _named(found, frozenset(reserved))
    text: dict[str, list[str]] = {}
    for module in import_order({module for module, _ in found.statements}):
        source = source_module(module)
        for statement in _in_order(source, found):
            text.setdefault(module, []).append(_written(source, statement, found, names))
    return Bundle(
        text={module: _joined(pieces) for module, pieces in text.items()},
        imports=frozenset(found.imports),
        names=names,
        members=frozenset(name for _, name in found.members),
    )


@final
@dataclass
class _Reached:
    """What is needed so far. members: (class, name) of `cls` and its bases."""

    cls: type
    statements: dict[Place, ast.stmt] = field(default_factory=dict)
    members: dict[Place, ast.stmt] = field(default_factory=dict)
    imports: set[External] = field(default_factory=set)
    references: dict[Place, list[Reference]] = field(default_factory=dict)

    @property
    def bases(self) -> list[type]:
        """The class and those it derives from, in the order of look-up."""
        return [base for base in self.cls.__mro__ if base is not object]

    def add(self, place: Place) -> None:
        """A top-level definition and all that it needs."""
        if place in self.statements:
            return
        module, name = place
        statement = source_module(module).definitions[name]
        self.statements[place] = statement
        if isinstance(statement, ast.ClassDef) and self._is_base(place):
            outside = [*statement.decorator_list, *statement.bases, *statement.keywords]
            self._add_references(place, outside)
            return
        self._add_references(place, [statement])

    def add_member(self, name: str, *, after: type | None = None) -> None:
        """What `self.name` is, or `super().name` in class `after`, with all that it needs."""
        order = self.bases if after is None else self.bases[self.bases.index(after) + 1 :]
        owner = next((base for base in order if name in _body(base)), None)
        if owner is None or (owner.__qualname__, name) in self.members:
            return
        statement = _body(owner)[name]
        self.add(_place(owner))
        self.members[owner.__qualname__, name] = statement
        self._add_references(_place(owner), [statement])
        for attribute, above in own_attributes(statement):
            self.add_member(attribute, after=owner if above else None)

    def _is_base(self, place: Place) -> bool:
        return any(_place(base) == place for base in self.bases)

    def _add_references(self, place: Place, trees: Sequence[ast.AST]) -> None:
        for reference in (found for tree in trees for found in global_references(tree)):
            self.references.setdefault(place, []).append(reference)
            target = target_of(place[0], reference)
            if isinstance(target, External):
                self.imports.add(target)
            elif target is not None:
                self.add(target)
                if self._is_base(target) and reference.attribute is not None:
                    self.add_member(reference.attribute)


def target_of(module: str, reference: Reference) -> Place | External | None:
    """What a reference in this module means: a definition of this library, an import, None for a builtin."""
    found = origin(module, reference.name)
    if isinstance(found, str):
        assert reference.attribute is not None, f"{module} passes the module {found} around"
        inner = origin(found, reference.attribute)
        assert not isinstance(inner, str), f"{found}.{reference.attribute} is a module"
        return inner
    return found


def _place(cls: type) -> Place:
    return cls.__module__, cls.__qualname__


def _body(cls: type) -> dict[str, ast.stmt]:
    """Members of a class by name."""
    statement = source_module(cls.__module__).definitions[cls.__qualname__]
    assert isinstance(statement, ast.ClassDef)
    found: dict[str, ast.stmt] = {}
    for part in statement.body:
        if isinstance(part, ast.FunctionDef):
            found[part.name] = part
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = part
    return found


def _named(found: _Reached, reserved: frozenset[str]) -> dict[Place, str]:
    """A name for each definition that no other has, and that is not bound where it is read."""
    taken = set(reserved) | {item.alias for item in found.imports} | set(dir(builtins))
    locals_of = {place: local_names(statement) for place, statement in found.statements.items()}
    avoid: dict[Place, set[str]] = {}
    for place, references in found.references.items():
        for reference in references:
            target = target_of(place[0], reference)
            if isinstance(target, tuple):
                avoid.setdefault(target, set()).update(locals_of[place])
    names: dict[Place, str] = {}
    for place in found.statements:
        module, name = place
        qualified = f"{module.rsplit('.', 1)[-1]}_{name.lstrip('_')}"
        free = [n for n in (name, qualified) if n not in taken and n not in avoid.get(place, ())]
        assert free, f"{name} of {module} has no free name"
        names[place] = free[0]
        taken.add(free[0])
    return names


def _in_order(source: SourceModule, found: _Reached) -> list[ast.stmt]:
    """The statements of this module that are needed, as they stand in it."""
    own = {id(s): s for (module, _), s in found.statements.items() if module == source.name}
    return sorted(own.values(), key=lambda statement: statement.lineno)


def _written(source: SourceModule, statement: ast.stmt, found: _Reached, names: Mapping[Place, str]) -> str:
    """A definition with its names; of the class and its bases the members that are kept."""
    place = next(p for p, s in found.statements.items() if s is statement and p[0] == source.name)
    lines = _renamed(source, place, found, names)
    kept = [s for (owner, _), s in found.members.items() if owner == place[1]]
    if not isinstance(statement, ast.ClassDef) or not any(_place(b) == place for b in found.bases):
        return "\n".join(lines[source.first_line(statement) - 1 : statement.end_lineno])
    return "\n".join(_pruned(source, statement, lines, kept))


def _pruned(
    source: SourceModule, statement: ast.ClassDef, lines: Sequence[str], kept: Sequence[ast.stmt]
) -> Iterator[str]:
    body = statement.body
    documented = isinstance(body[0], ast.Expr)
    head = body[0].end_lineno if documented else source.first_line(body[0]) - 1
    yield from lines[source.first_line(statement) - 1 : head]
    last: ast.stmt | None = body[0] if documented else None
    for part in sorted(kept, key=lambda part: part.lineno):
        function = isinstance(part, ast.FunctionDef)
        if last is not None and (function or not isinstance(last, ast.AnnAssign)):
            yield ""
        yield from lines[source.first_line(part) - 1 : part.end_lineno]
        last = part
    if last is None:
        yield "    pass"


def _renamed(source: SourceModule, place: Place, found: _Reached, names: Mapping[Place, str]) -> list[str]:
    """The module's lines with the names that this definition uses."""
    edits: dict[tuple[int, int], tuple[int, str]] = {}
    for reference in found.references.get(place, ()):
        target = target_of(source.name, reference)
        imported = isinstance(origin(source.name, reference.name), str)
        spot = reference.whole if imported else reference.node
        if isinstance(target, tuple):
            assert spot.end_col_offset is not None and spot.lineno == spot.end_lineno
            edits[spot.lineno, spot.col_offset] = (spot.end_col_offset, names[target])
    lines = list(source.lines)
    for (line, start), (stop, name) in sorted(edits.items(), reverse=True):
        lines[line - 1] = lines[line - 1][:start] + name + lines[line - 1][stop:]
    own = names[place]
    if own != place[1]:
        first = found.statements[place].lineno - 1
        lines[first] = lines[first].replace(place[1], own, 1)
    return lines


def _joined(pieces: Sequence[str]) -> str:
    """Two empty lines around functions and classes, none between constants."""
    text = pieces[0]
    for before, piece in zip(pieces, pieces[1:], strict=False):
        block = any(part.lstrip("#").startswith(("def ", "class ", "@")) for part in (before, piece))
        text += ("\n\n\n" if block else "\n") + piece
    return text
