"""`bench`: several ways to train one model on one batch, timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from kfac_fx import guards
from kfac_fx.batch import flatten_batch
from kfac_fx.bench.autotune import autotune
from kfac_fx.bench.clock import num_threads, seconds_of
from kfac_fx.bench.contender import FIRST_ORDER, Contender, FirstOrder
from kfac_fx.bench.measure import measured
from kfac_fx.bench.records import BenchReport
from kfac_fx.bench.second_order import SecondOrder, scheduled
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError
from kfac_fx.lower import resolve_backend
from kfac_fx.methods import resolve
from kfac_fx.types import LossFn

DEFAULT_METHODS = ("kfac", "nkfac")
Make: TypeAlias = Callable[[nn.Module], Contender]
Data: TypeAlias = tuple[LossFn | None, Any, Any]


def bench(
    model: nn.Module,
    loss_fn: LossFn | None,
    inputs: Any,
    targets: Any,
    *,
    methods: Sequence[str | Method] = DEFAULT_METHODS,
    statistics_every: int | None = None,
    inverse_every: int | None = None,
    steps: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Make] | None = None,
    tune: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> BenchReport:
    """Step times of SGD, AdamW and methods on this model and batch; each trains a copy of the model.

    Args:
        model: any module, on any device.
        loss_fn: as in `kfac_fx.compile`.
        inputs: of the one batch that all steps use.
        targets: of that batch.
        methods: names or instances, each at its own schedule.
        statistics_every: steps between statistics, for all methods.
        inverse_every: steps between refreshes, for all methods that have them.
        steps: consecutive steps per contender; of each kind of step a sixth of that, at least 5.
        warmup: steps of each kind that do not count (3 pass the refreshes that NKFAC inverts exactly).
        threads: torch's threads on the CPU; None: as many as it has.
        backend: of the compiled steps; with "inductor" SGD and AdamW run under `torch.compile` too.
        options: fisher, sharing and exclude of `kfac_fx.compile`.
        extra: more contenders: label to a function from a copy of the model to a `Contender`.
        tune: also measure each form of each convolution's A (`autotune`).
        say: is told what is being done.

    Raises `KfacFxError` for settings without meaning before anything is measured.
    """
    for name, value in (("steps", steps), ("warmup", warmup), ("threads", threads)):
        if value is not None and value < 1:
            raise KfacFxError(f"{name}={value}: must be at least 1.")
    chosen = _labelled(methods, statistics_every=statistics_every, inverse_every=inverse_every)
    device, batch = guards.model_device(model), flatten_batch(inputs, targets)
    guards.check_batch(batch, model)
    backend, data = resolve_backend(backend, device), (loss_fn, inputs, targets)
    makers = {**_makers(data, chosen, backend=backend, options=options or {}), **(extra or {})}
    with num_threads(threads) as used:
        contenders, compile_seconds = _made(model, makers, device, say)
        found = measured(contenders, compile_seconds, steps=steps, warmup=warmup, device=device, say=say)
        tuned = autotune(model, *data, say=say) if tune else None
    return BenchReport(
        model=type(model).__name__,
        batch=tuple(tuple(tensor.shape) for tensor in batch.tensors),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        backend=backend,
        threads=used,
        steps=steps,
        warmup=warmup,
        contenders=found,
        tuned=tuned,
    )


def _labelled(
    methods: Sequence[str | Method], *, statistics_every: int | None, inverse_every: int | None
) -> dict[str, Method]:
    """The methods at their schedules; a further one of the same name gets a number."""
    found: dict[str, Method] = {}
    for method in dict.fromkeys(methods):
        made = scheduled(resolve(method), statistics_every=statistics_every, inverse_every=inverse_every)
        label, number = made.name, 1
        while label in found:
            number += 1
            label = f"{made.name} {number}"
        found[label] = made
    return found


def _makers(
    data: Data, methods: Mapping[str, Method], *, backend: str, options: Mapping[str, Any]
) -> dict[str, Make]:
    """What makes each contender from a copy of the model, SGD first."""
    found: dict[str, Make] = {}
    for label, optimizer in FIRST_ORDER.items():
        compiled = backend == "inductor"
        found[label] = lambda twin, o=optimizer, c=compiled: FirstOrder(twin, *data, optimizer=o, compiled=c)
    for label, method in methods.items():
        found[label] = lambda twin, m=method: SecondOrder(
            twin, *data, method=m, backend=backend, options=options
        )
    return found


def _made(
    model: nn.Module, makers: Mapping[str, Make], device: torch.device, say: Callable[[str], Any]
) -> tuple[dict[str, Contender], dict[str, float]]:
    """The contenders, and the seconds that each took for capture, compilation and its first runs."""
    contenders: dict[str, Contender] = {}
    seconds: dict[str, float] = {}
    for label, make in makers.items():
        say(f"compiling {label}")
        twin = copy.deepcopy(model)

        def first_runs(label: str = label, make: Make = make, twin: nn.Module = twin) -> None:
            contenders[label] = make(twin)

        seconds[label] = seconds_of(first_runs, device)
    return contenders, seconds
