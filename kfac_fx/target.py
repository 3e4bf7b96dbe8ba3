"""The command line's TARGET: from `file.py[:factory]` or `package.module[:factory]` to a model and a batch.

Enters: the text that the user typed. Leaves: a `Target`, or a `TargetError` that names the user's line. The
user's code runs with its folder first on `sys.path`, and only while it is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, final

from torch import nn

from kfac_fx.errors import TargetError, did_you_mean
from kfac_fx.types import LossFn
from kfac_fx.wording import with_article

DEFAULT_FACTORY = "build"
_FORMS = "TARGET is file.py[:factory] or package.module:factory."
_CONTRACT = "(model, loss_fn, inputs, targets)"


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """A model with an example batch. loss_fn None: the model's own loss, or one chosen by the targets."""

    model: nn.Module
    loss_fn: LossFn | None
    inputs: Any
    targets: Any
    label: str


def load_target(text: str) -> Target:
    """Load `file.py`, `file.py:factory`, `package.module` or `package.module:factory`.

    The factory (default `build`) takes no argument and returns `(model, loss_fn, inputs, targets)`. Without
    one, the module-level names `model` and `inputs`, and if they exist `loss_fn` and `targets`, are used.
    """
    place, _, factory = text.partition(":")
    is_file = place.endswith(".py") or os.sep in place or Path(place).exists()
    folder = Path(place).resolve().parent if is_file else Path.cwd()
    with _on_path(folder):
        module = _import_file(Path(place)) if is_file else _import_module(place)
        names = vars(module)
        if not factory and DEFAULT_FACTORY not in names:
            values = _module_level(names, place)
        else:
            values = _call(names, factory or DEFAULT_FACTORY, place)
    model, loss_fn, inputs, targets = values
    _check_model(model, place)
    return Target(model=model, loss_fn=loss_fn, inputs=inputs, targets=targets, label=text)


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The user's folder first on `sys.path`; the list is as before afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.py")], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        what = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise TargetError(f"{path} {what}.{hint} {_FORMS}")
    name = f"kfac_fx_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file. {_FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    try:
        _run(lambda: loader.exec_module(module), place=str(path), doing="import")
    except TargetError:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    def load() -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise TargetError(f"no module named {error.name!r}.{_near(error.name, name)} {_FORMS}") from error

    return _run(load, place=name, doing="import")


def _near(missing: str, wanted: str) -> str:
    """A file that the user may have meant, or a module with nearly the missing one's name beside it."""
    if Path(f"{wanted}.py").is_file():
        return f" Did you mean {wanted + '.py'!r}?"
    parent, _, last = missing.rpartition(".")
    folders = [str(Path.cwd())]
    if parent:
        spec = importlib.util.find_spec(parent)
        folders = list(spec.submodule_search_locations or ()) if spec else []
    siblings = [module.name for module in pkgutil.iter_modules(folders)]
    close = difflib.get_close_matches(last, siblings, n=1)
    if not close:
        return ""
    proposal = ".".join(filter(None, (parent, close[0])))
    return f" Did you mean {proposal + wanted[len(missing) :]!r}?"


def _call(names: dict[str, Any], factory: str, place: str) -> tuple[Any, Any, Any, Any]:
    if factory not in names:
        own = [n for n, v in names.items() if inspect.isfunction(v) and v.__module__ == names["__name__"]]
        hint = did_you_mean(factory, own) if own else ""
        raise TargetError(f"{place} has no factory {factory!r}.{hint} A factory returns {_CONTRACT}.")
    if not callable(names[factory]):
        raise TargetError(
            f"{place}: {factory} is not a function. A factory takes no argument and returns {_CONTRACT}."
        )
    values = _run(names[factory], place=f"{place}:{factory}", doing="call")
    if not isinstance(values, (tuple, list)) or len(values) != 4:
        got = f"{len(values)} values" if isinstance(values, (tuple, list)) else f"one {type(values).__name__}"
        raise TargetError(f"{place}:{factory} returns {got}; it must return the four {_CONTRACT}.")
    return values[0], values[1], values[2], values[3]


def _module_level(names: dict[str, Any], place: str) -> tuple[Any, Any, Any, Any]:
    missing = [name for name in ("model", "inputs") if name not in names]
    if "model" in missing:
        raise TargetError(
            f"{place} has no factory {DEFAULT_FACTORY!r} and no `model`. Define {DEFAULT_FACTORY}() that"
            f" returns {_CONTRACT}, name another factory as {place}:factory, or define `model` and `inputs`."
        )
    if missing:
        raise TargetError(
            f"{place} defines `model` but no `inputs`. Add `inputs`, one example batch for the model."
        )
    return names["model"], names.get("loss_fn"), names["inputs"], names.get("targets")


def _check_model(model: Any, place: str) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise TargetError(
            f"{place}: the model is the class {model.__name__}; make an instance: {model.__name__}()."
        )
    raise TargetError(
        f"{place}: the model is {with_article(type(model).__name__)}; it must be a torch.nn.Module."
    )


def _run(action: Callable[[], Any], *, place: str, doing: str) -> Any:
    """Run the user's code; what it raises, `sys.exit` included, becomes one message with the user's line."""
    try:
        return action()
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        where = _user_line(error)
        said = " ".join(str(error).split()) or "no message"
        message = said if where else said.rstrip(".")
        raise TargetError(
            f"cannot {doing} {place}: {type(error).__name__}: {message}{where}. The error is in the target's"
            " own code: make it run by itself in Python first."
        ) from error


def _user_line(error: BaseException) -> str:
    """The innermost line that is the user's: not of Python, of an installed package or of this library."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()})"
    foreign = (os.path.dirname(os.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(foreign) and "site-packages" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
