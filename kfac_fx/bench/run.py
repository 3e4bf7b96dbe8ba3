"""`bench`: several ways to train one model on one batch, timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

import kfac_fx
from kfac_fx import guards
from kfac_fx.batch import flatten_batch
from kfac_fx.bench.autotune import autotune
from kfac_fx.bench.clock import num_threads, seconds_of
from kfac_fx.bench.contender import FIRST_ORDER, Contender, Data, FirstOrder
from kfac_fx.bench.measure import measured
from kfac_fx.bench.peers import asdfghjkl, singd
from kfac_fx.bench.records import BenchReport
from kfac_fx.bench.second_order import SecondOrder, scheduled
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError, check_choice
from kfac_fx.forms import preferred
from kfac_fx.lower import compile_mode, resolve_backend
from kfac_fx.methods import resolve
from kfac_fx.schedule import check_staggered
from kfac_fx.types import LossFn

DEFAULT_METHODS = ("kfac", "nkfac")
PEER = "peer: "  # begins the labels of other libraries, some of which are names of methods too
Make: TypeAlias = Callable[[nn.Module], Contender]


def bench(
    model: nn.Module,
    loss_fn: LossFn | None,
    inputs: Any,
    targets: Any,
    *,
    methods: Sequence[str | Method] = DEFAULT_METHODS,
    statistics_every: int | None = None,
    inverse_every: int | None = None,
    steps: int | None = 30,
    warmup: int = 3,
    threads: int | None = None,
    backend: str = "auto",
    refresh: str = "together",
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Make] | None = None,
    peers: bool = False,
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
        steps: consecutive steps per contender; None: the longest period of a schedule. Of each kind of step a
            sixth of that, between 5 and 10.
        warmup: steps of each kind that do not count (3 pass the refreshes that NKFAC inverts exactly).
        threads: torch's threads on the CPU; None: as many as it has.
        backend: of the compiled steps; with "inductor" SGD and AdamW run under `torch.compile` too.
        refresh: of `kfac_fx.compile`, "together" or "staggered".
        options: fisher, sharing and exclude of `kfac_fx.compile`.
        extra: more contenders: label to a function from a copy of the model to a `Contender`.
        peers: also time `singd` and `asdfghjkl`, where they are installed and know the model.
        tune: first measure each form of each convolution's A (`autotune`); methods use the fastest.
        say: is told what is being done.

    Raises `KfacFxError` for settings without meaning before anything is measured.
    """
    for name, value in (("steps", steps), ("warmup", warmup), ("threads", threads)):
        if value is not None and value < 1:
            raise KfacFxError(f"{name}={value}: must be at least 1.")
    chosen = _labelled(methods, statistics_every=statistics_every, inverse_every=inverse_every)
    check_choice("refresh", refresh, ("together", "staggered"))
    for method in chosen.values() if refresh == "staggered" else ():
        check_staggered(method)
    device, batch = guards.model_device(model), flatten_batch(inputs, targets)
    guards.check_batch(batch, model)
    backend, data = resolve_backend(backend, device), (loss_fn, inputs, targets)
    options = dict(options or {})
    staggered = {} if refresh == "together" else {"refresh": refresh}
    makers = {**_makers(data, chosen, backend=backend, options=options | staggered), **(extra or {})}
    if peers:
        every = {"statistics_every": statistics_every, "inverse_every": inverse_every}
        makers |= _peers(data, every)
    with num_threads(threads) as used:
        _load_torch(device, backend)
        tuned = autotune(model, *data, backend=backend, options=options, say=say) if tune else None
        with preferred({entry.case: entry.best for entry in tuned or ()}):
            contenders, compile_seconds, left_out = _made(model, makers, device, say)
        found = measured(contenders, compile_seconds, steps=steps, warmup=warmup, device=device, say=say)
    return BenchReport(
        model=type(model).__name__,
        batch=tuple(tuple(tensor.shape) for tensor in batch.tensors),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        backend=backend,
        threads=used,
        warmup=warmup,
        refresh=refresh,
        contenders=found,
        left_out=left_out,
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
        found[label] = lambda twin, o=optimizer: FirstOrder(
            twin, data, optimizer=o, mode=compile_mode(backend, guards.model_device(twin))
        )
    for label, method in methods.items():
        found[label] = lambda twin, m=method: SecondOrder(
            twin, data, method=m, backend=backend, options=options
        )
    return found


def _peers(data: Data, every: Mapping[str, Any]) -> dict[str, Make]:
    """Peers, at the schedule of this library's method of the same kind."""
    roots, factors = (scheduled(method, **every) for method in map(resolve, ("singd", "kfac")))
    return {
        f"{PEER}singd": lambda twin: singd(twin, data, roots),
        f"{PEER}asdfghjkl": lambda twin: asdfghjkl(twin, data, factors),
    }


def _load_torch(device: torch.device, backend: str) -> None:
    """What PyTorch imports at a first step is part of no contender's compilation."""
    tiny, one = nn.Linear(1, 1, device=device), torch.ones(1, 1, device=device)
    for optimizer in FIRST_ORDER.values():
        FirstOrder(tiny, (None, one, one), optimizer=optimizer, mode=compile_mode(backend, device))
    kfac_fx.compile(tiny, backend=backend)(one, one)


def _made(
    model: nn.Module, makers: Mapping[str, Make], device: torch.device, say: Callable[[str], Any]
) -> tuple[dict[str, Contender], dict[str, float], dict[str, str]]:
    """The contenders, the seconds that each took for capture, compilation and its first runs, and peers that
    fail, with the reason.
    """
    contenders: dict[str, Contender] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for label, make in makers.items():
        say(f"compiling {label}")
        twin = copy.deepcopy(model)

        def first_runs(label: str = label, make: Make = make, twin: nn.Module = twin) -> None:
            contenders[label] = make(twin)

        try:
            seconds[label] = seconds_of(first_runs, device)
        except Exception as error:
            if not label.startswith(PEER):
                raise
            left_out[label] = _reason(error)
    return contenders, seconds, left_out


def _reason(error: Exception) -> str:
    """Why a peer was not timed, in one line."""
    if isinstance(error, ImportError):
        return "not installed"
    if "NVTX" in str(error):  # torch's word where a library marks its ranges for a profiler of CUDA
        return "not available on this build of torch: it needs NVTX, which builds without CUDA lack"
    return f"{type(error).__name__}: {error}".splitlines()[0]
