"""A model is left as it was found, whatever its forward stores on it while it is traced.

Enters: a model. Leaves: the same, or an error that names what its forward would have to make anew each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from kfac_fx.errors import CaptureError

Saved = dict[str, tuple[object, object]]
_REGISTERED = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "module"}


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Undo what forward stores on modules (activations, counters): tracing must not change the model.

    Raises `CaptureError` if it registers parameters, buffers or modules: they would be new at every step.
    """
    before = [(path, vars(m), _attributes(m)) for path, m in model.named_modules()]
    registered: list[str] = []
    try:
        yield
    finally:
        for path, attributes, saved in before:
            for kind, name in _restore(attributes, saved):
                registered.append(f"the {kind} {f'{path}.{name}' if path else name}")
    if registered:
        raise CaptureError(
            f"{type(model).__name__} registers {', '.join(registered[:5])} when it runs. Register them in "
            "__init__, or run the model once on a batch before it is compiled."
        )


def _attributes(module: nn.Module) -> Saved:
    """Attributes of a module, with copies of plain containers, one level deep."""
    return {name: (value, _contents(value)) for name, value in vars(module).items()}


def _restore(attributes: dict[str, object], saved: Saved) -> Iterator[tuple[str, str]]:
    """Put attributes back. Gives what was registered: its kind and name."""
    for name in [n for n in attributes if n not in saved]:
        del attributes[name]
    for name, (value, contents) in saved.items():
        attributes[name] = value
        if name in _REGISTERED and isinstance(value, dict) and isinstance(contents, dict):
            for new in [n for n in value if n not in contents]:
                del value[new]
                yield _REGISTERED[name], new
        elif isinstance(value, list) and isinstance(contents, list):
            value[:] = contents
        elif isinstance(value, (dict, set)) and isinstance(contents, (dict, set)):
            value.clear()
            value.update(contents)  # type: ignore[arg-type]


def _contents(value: object) -> object:
    """A copy of a plain container; None for anything else."""
    return value.copy() if type(value) in (list, dict, set) else None  # type: ignore[attr-defined]
