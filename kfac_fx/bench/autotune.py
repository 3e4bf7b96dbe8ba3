"""Every form of every convolution's A, measured: what the plan chooses by estimate against what is fastest.

Enters: a model with a batch. Leaves: records; the plan is not changed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kfac_fx
from kfac_fx import guards
from kfac_fx.autocorrelation import patch_moment
from kfac_fx.bench.clock import in_turns
from kfac_fx.bench.records import Tuned
from kfac_fx.contracts import Plan
from kfac_fx.forms import Form, costs
from kfac_fx.graph import shape
from kfac_fx.layout import Geometry
from kfac_fx.types import LossFn

ROUNDS = 7
Case = tuple[Geometry, tuple[int, ...], torch.dtype]


def autotune(
    model: nn.Module,
    loss_fn: LossFn | None,
    inputs: Any,
    targets: Any,
    *,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[Tuned, ...]:
    """Times of all forms for each distinct geometry, in the order of the layers."""
    plan = kfac_fx.inspect(model, loss_fn, inputs, targets)
    device = guards.model_device(model)
    found = []
    for case, layers in _cases(plan).items():
        say(f"measuring the forms of {layers[0]}" + (f" and {len(layers) - 1} more" if layers[1:] else ""))
        found.append(_tuned(case, layers, device))
    return tuple(found)


def _cases(plan: Plan) -> dict[Case, list[str]]:
    """Layers by what decides the time: geometry, shape and type of the input."""
    found: dict[Case, list[str]] = {}
    for match in plan.matched:
        for use in match.uses:
            if use.geometry is not None and use.a is not None:
                case = use.geometry, shape(use.a), use.a.meta["val"].dtype
                if match.name not in found.setdefault(case, []):
                    found[case].append(match.name)
    return found


def _tuned(case: Case, layers: list[str], device: torch.device) -> Tuned:
    geometry, sizes, dtype = case
    candidates = costs(geometry, examples=sizes[0], channels=sizes[1])
    x = torch.randn(sizes, dtype=dtype, device=device)
    runs: dict[Form, Callable[[int], Any]] = {
        cost.form: lambda turn, form=cost.form: patch_moment(x, geometry, form) for cost in candidates
    }
    with torch.no_grad():
        in_turns(runs, 1, device)
        seconds = in_turns(runs, ROUNDS, device)
    return Tuned(
        layers=tuple(layers),
        examples=sizes[0],
        channels=sizes[1],
        geometry=geometry,
        estimates={cost.form: cost.time * 1e-9 for cost in candidates},
        seconds={form: statistics.median(values) for form, values in seconds.items()},
    )
