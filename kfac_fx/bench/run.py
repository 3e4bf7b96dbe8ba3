"""`bench`: several ways to train one model on one batch, timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
from kfac_fx.bench.records import BenchReport, Tuned
from kfac_fx.bench.second_order import SecondOrder, scheduled
from kfac_fx.bench.settings import Make, Settings
from kfac_fx.contracts import Method
from kfac_fx.forms import preferred
from kfac_fx.lower import compile_mode, resolve_backend
from kfac_fx.methods import resolve
from kfac_fx.types import LossFn

PEER = "peer: "  # begins the labels of other libraries, some of which are names of methods too


def bench(
    model: nn.Module, loss_fn: LossFn | None, inputs: Any, targets: Any, **settings: Any
) -> BenchReport:
    """Step times of SGD, AdamW and methods on this model and batch; each trains a copy of the model.

    Args:
        model: any module, on any device.
        loss_fn: as in `kfac_fx.compile`.
        inputs: of the one batch that all steps use.
        targets: of that batch.
        settings: those of `Settings`, by name.

    Raises `KfacFxError` for settings without meaning before anything is measured.
    """
    asked = Settings(**settings)
    device, batch = guards.model_device(model), flatten_batch(inputs, targets)
    guards.check_batch(batch, model)
    backend, data = resolve_backend(asked.backend, device), (loss_fn, inputs, targets)
    with num_threads(asked.threads) as used:
        _load_torch(device, backend)
        tuned = _tuned(model, data, asked, backend)
        with preferred({entry.case: entry.best for entry in tuned or ()}):
            contenders, seconds, left_out = _made(model, _all_makers(data, asked, backend), device, asked.say)
        steps, warmup = asked.steps, asked.warmup
        found = measured(contenders, seconds, steps=steps, warmup=warmup, device=device, say=asked.say)
    return BenchReport(
        model=type(model).__name__,
        batch=tuple(tuple(tensor.shape) for tensor in batch.tensors),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        backend=backend,
        threads=used,
        warmup=asked.warmup,
        refresh=asked.refresh,
        contenders=found,
        left_out=left_out,
        tuned=tuned,
    )


def _tuned(model: nn.Module, data: Data, asked: Settings, backend: str) -> tuple[Tuned, ...] | None:
    """The fastest form of each convolution's A, if it is asked for."""
    if not asked.tune:
        return None
    return autotune(model, *data, backend=backend, options=dict(asked.options or {}), say=asked.say)


def _all_makers(data: Data, asked: Settings, backend: str) -> dict[str, Make]:
    """What makes each contender, SGD first, peers last."""
    makers = _makers(data, asked.labelled, backend=backend, options=asked.compile_options)
    return makers | dict(asked.extra or {}) | (_peers(data, asked.every) if asked.peers else {})


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
        twin = guards.copied(model, "bench")

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
