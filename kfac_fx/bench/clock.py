"""How things are timed: in turns, so that noise hits all alike; and the most memory that a step takes.

Enters: functions. Leaves: seconds and bytes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

Key = TypeVar("Key")
_MEASURED = "kfac_fx: the step that is measured"


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, with all the work that it puts on the device."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[Key, Callable[[int], Any]], rounds: int, device: torch.device
) -> dict[Key, list[float]]:
    """Seconds of each function, once a round; every other round goes backwards.

    A function gets the number of the round.
    """
    found: dict[Key, list[float]] = {key: [] for key in runs}
    with _without_collections():
        for turn in range(rounds):
            for key in list(runs)[:: -1 if turn % 2 else 1]:
                found[key].append(seconds_of(lambda key=key, turn=turn: runs[key](turn), device))
    return found


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """What exists now is left out of Python's garbage collections, which would else count as a slow step.

    Where the user has done so, or we around this, it stays as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def num_threads(threads: int | None) -> Iterator[int]:
    """Torch with this many threads on the CPU, None for as many as it has; afterwards as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most that one call allocates for tensors beside what was held before it; None if unknown.

    Of the second of two calls. CUDA: by the allocator's own count. CPU: by the profiler's record of torch's
    allocator, which knows only what was allocated while it watches.
    """
    if device.type == "cuda":
        run()
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    held = _alive()  # for the profiler warns of what is freed and was allocated before it watched
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
        with record_function(_MEASURED):
            run()
    del held
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(file))
        return _peak(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def _alive() -> list[torch.UntypedStorage]:
    """The memory of all tensors that exist on the CPU now."""
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout is torch.strided]


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without the profiler's lines on stderr, unless the user has set their level."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


def _peak(events: list[dict[str, Any]]) -> int | None:
    """Largest sum of allocations less frees since the measured call began."""
    start = next((event["ts"] for event in events if event.get("name") == _MEASURED), None)
    changes = [event for event in events if event.get("name") == "[memory]"]
    if start is None or not changes:
        return None
    now = most = 0
    for event in sorted((e for e in changes if e["ts"] >= start), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
