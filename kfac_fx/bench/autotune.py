"""Every form of every convolution's A, measured: what the cost model chooses against what is fastest.

Enters: a model with a batch, or records of earlier measurements. Leaves: records, and plans that follow them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import kfac_fx
from kfac_fx.autocorrelation import input_moment
from kfac_fx.bench.clock import in_turns
from kfac_fx.bench.records import Tuned
from kfac_fx.editing import eliminate_dead
from kfac_fx.errors import KfacFxError
from kfac_fx.estimates import Form
from kfac_fx.forms import costs, preferred
from kfac_fx.graph import shape, value
from kfac_fx.layout import Geometry
from kfac_fx.lower import lower
from kfac_fx.splice import splice
from kfac_fx.types import LossFn, Use

ROUNDS = 7


def autotune(
    model: nn.Module,
    loss_fn: LossFn | None,
    inputs: Any,
    targets: Any,
    *,
    backend: str = "eager",
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[Tuned, ...]:
    """Times of all forms for each distinct geometry, in the order of the layers.

    backend: that runs the forms, "eager" or "inductor". options: fisher, sharing and exclude of `inspect`.
    """
    plan = kfac_fx.inspect(model, loss_fn, inputs, targets, **(options or {}))
    cases: dict[object, tuple[Use, list[str]]] = {}
    for match in plan.matched if plan.sharing == "expand" else ():
        for use in match.uses:
            if use.geometry is not None and use.a is not None:
                case = use.geometry, shape(use.a), value(use.a).dtype
                layers = cases.setdefault(case, (use, []))[1]
                layers += [match.name] if match.name not in layers else []
    found = []
    for use, layers in cases.values():
        say(f"measuring the forms of {layers[0]}" + (f" and {len(layers) - 1} more" if layers[1:] else ""))
        found.append(_tuned(use, layers, backend))
    return tuple(found)


def _tuned(use: Use, layers: list[str], backend: str) -> Tuned:
    assert use.geometry is not None and use.a is not None
    like, runs = value(use.a), programs(use, backend=backend)
    in_turns(runs, 1, like.device)
    seconds = in_turns(runs, ROUNDS, like.device)
    examples, channels, device = like.shape[0], like.shape[1], like.device.type
    estimates = costs(use.geometry, examples=examples, channels=channels, device=device)
    return Tuned(
        layers=tuple(layers),
        examples=examples,
        channels=channels,
        device=device,
        geometry=use.geometry,
        estimates={cost.form: cost.time * 1e-9 for cost in estimates},
        seconds={form: statistics.median(values) for form, values in seconds.items()},
    )


def programs(use: Use, *, backend: str) -> dict[Form, Callable[[int], Any]]:
    """A of one use on random input in every form, each as a plan would run it: traced, tables as constants.

    A function takes any number, which is that of a round.
    """
    assert use.geometry is not None and use.a is not None
    like = value(use.a)
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).normal_()
    found: dict[Form, Callable[[int], Any]] = {}
    for cost in costs(use.geometry, examples=like.shape[0], channels=like.shape[1], device=like.device.type):
        run = lower(_program(like, use.geometry, cost.form), backend)
        found[cost.form] = lambda turn, run=run: run(x)
    return found


def _program(like: Tensor, geometry: Geometry, form: Form) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = like
    output = graph.output(())
    module = GraphModule(nn.Module(), graph)

    def moment(x: Tensor) -> dict[str, Tensor]:
        return {"A": input_moment(x, geometry, form=form, ones=False).moment}

    output.args = (tuple(splice(module, moment, [x], before=output, label=f"inserted, {form}").values()),)
    eliminate_dead(module, frozenset())
    return module


def measured_forms(file: str | Path) -> AbstractContextManager[None]:
    """Plans made inside, also those of a step's first batch, take the fastest forms of a saved `--autotune`.

    They hold for the same geometry, number of examples and kind of device; elsewhere the cost model chooses.
    Raises `KfacFxError` if the file has none.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))["autotune"]
        return preferred({_case(entry): entry["best"] for entry in entries})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KfacFxError(
            f"{file} has no measured forms: write it with kfac-fx bench TARGET --autotune -o {file}."
        ) from error


def _case(entry: Mapping[str, Any]) -> tuple[Geometry, int, int, str]:
    sizes: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in entry["geometry"].items()
    }
    return Geometry(**sizes), entry["examples"], entry["channels"], entry["device"]
