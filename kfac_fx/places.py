"""Where the state tensors of a plan's layers are kept, and whether those that exist fit.

Enters: a plan, the tensors so far, a saved state. Leaves: new tensors and the place of each. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx.canonical import state_dtype, state_owner
from kfac_fx.contracts import Method
from kfac_fx.errors import StateError
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch, State

Key = tuple[str, str]
Places = dict[str, Key]  # of the state tensors of one layer, by name


@final
@dataclass(frozen=True, kw_only=True)
class Present:
    """What exists before a plan comes into use.

    tensors: by place. layers: places of the layers known. loaded: saved tensors that no plan has shown yet.
    """

    method: Method
    tensors: Mapping[Key, Tensor]
    layers: Mapping[str, Places]
    loaded: Mapping[str, State]


def placed(plan: Plan, present: Present) -> tuple[dict[Key, Tensor], dict[str, Places]]:
    """Tensors and places of the plan's layers: those that exist, fresh ones for layers that are new.

    Loaded tensors are taken where they belong. A tensor that several layers read moves with its readers if
    the plan gives it to another owner (the first of them was frozen).

    Raises:
        StateError: a tensor that exists, or is loaded, does not fit its layer.
    """
    tensors: dict[Key, Tensor] = {}
    layers: dict[str, Places] = {}
    for match in plan.matched:
        dtype = state_dtype(plan, match)
        fresh = present.method.init(match, dtype=dtype, device=torch.device("meta"))
        places = {name: (state_owner(plan, match, name), name) for name in fresh}
        loaded = present.loaded.get(match.key)
        earlier = present.layers.get(match.key, {})
        held = {name: present.tensors.get(earlier.get(name, places[name])) for name in fresh}
        if loaded is not None or any(tensor is None for tensor in held.values()):
            device = torch.device(match.uses[0].g[0].meta["val"].device)
            fresh = present.method.init(match, dtype=dtype, device=device)
        for name, tensor in fresh.items():
            found = held[name]
            if loaded is not None:
                found = _fit(present.method, match, name, loaded, tensor)
            if found is not None and not _fits(present.method, name, found, tensor):
                raise StateError(_misfit(match, name, found, tensor))
            tensors[places[name]] = tensor if found is None else found
        layers[match.key] = places
    return tensors, layers


def _fit(method: Method, match: LayerMatch, name: str, loaded: State, fresh: Tensor) -> Tensor:
    if name not in loaded:
        raise StateError(f"the saved state of {match.key} has no {name}: it was saved by another method.")
    found = loaded[name]
    if not _fits(method, name, found, fresh):
        raise StateError(_misfit(match, name, found, fresh))
    return found.to(dtype=fresh.dtype, device=fresh.device)


def _fits(method: Method, name: str, found: Tensor, fresh: Tensor) -> bool:
    if name not in method.growing_names:
        return found.shape == fresh.shape
    return found.shape[:1] + found.shape[2:] == fresh.shape[:1] + fresh.shape[2:]


def _misfit(match: LayerMatch, name: str, found: Tensor, wanted: Tensor) -> str:
    bias = match.bias or f"the bias beside {match.weight}"
    return (
        f"{name} of {match.key} has shape {tuple(found.shape)}, but this model needs {tuple(wanted.shape)}: "
        f"{bias} was frozen or unfrozen since the state was made, or the state is of another model. Set its "
        "requires_grad back, or call kfac_fx.compile(model, ...) again, which starts with new factors."
    )
