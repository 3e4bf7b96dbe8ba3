"""What is measured of contenders: consecutive steps, kinds of steps, parts of steps, memory.

Enters: contenders that are compiled. Leaves: a report of each.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kfac_fx.bench.clock import in_turns, num_bytes, peak_bytes
from kfac_fx.bench.contender import Contender
from kfac_fx.bench.records import PHASES, ContenderReport, Kind, Memory, Phase

LEAST_OF_A_KIND = 5


def measured(
    contenders: Mapping[str, Contender],
    compile_seconds: Mapping[str, float],
    *,
    steps: int,
    warmup: int,
    device: torch.device,
    say: Callable[[str], Any],
) -> tuple[ContenderReport, ...]:
    """Warm up, time in turns, then measure memory one by one."""
    rounds = max(LEAST_OF_A_KIND, steps // 6)
    say("warming up")
    _kinds(contenders, warmup, device)
    say(f"timing {steps} steps of each")
    consecutive = {label: lambda turn, e=entry: e.run(1 + turn) for label, entry in contenders.items()}
    seconds = in_turns(consecutive, steps, device)
    say(f"timing {rounds} steps of each kind")
    kinds = _kinds(contenders, rounds, device)
    say("timing the parts of steps")
    phases = _phases(contenders, rounds, device)
    say("measuring memory")
    return tuple(
        ContenderReport(
            label=label,
            every=entry.every,
            compile_seconds=compile_seconds[label],
            seconds=tuple(seconds[label]),
            kinds=kinds[label],
            phases=phases[label],
            memory=_memory(entry, device),
        )
        for label, entry in contenders.items()
    )


def _kinds(
    contenders: Mapping[str, Contender], rounds: int, device: torch.device
) -> dict[str, tuple[Kind, ...]]:
    """Every kind of step of every contender, once a round."""
    runs = {
        (label, kind): functools.partial(_run_one_of, entry, kind, rounds)
        for label, entry in contenders.items()
        for kind in entry.kinds
    }
    seconds = in_turns(runs, rounds, device)
    return {
        label: tuple(
            Kind(name=kind, per_period=len(indices), seconds=tuple(seconds[label, kind]))
            for kind, indices in entry.kinds.items()
        )
        for label, entry in contenders.items()
    }


def _run_one_of(contender: Contender, kind: str, rounds: int, turn: int) -> None:
    """A step of this kind; the turns are spread over those that one period has."""
    indices = contender.kinds[kind]
    contender.run(indices[turn * len(indices) // rounds])


def _phases(
    contenders: Mapping[str, Contender], rounds: int, device: torch.device
) -> dict[str, tuple[Phase, ...]]:
    """Every part of every contender, once a round after one that does not count."""
    parts = {label: entry.parts() for label, entry in contenders.items()}
    runs = {
        (label, name): lambda turn, part=part: part()
        for label in parts
        for name, part in parts[label].items()
    }
    in_turns(runs, 1, device)
    seconds = {key: statistics.median(found) for key, found in in_turns(runs, rounds, device).items()}
    return {
        label: phases_of({name: seconds[label, name] for name in parts[label]}, entry.every)
        for label, entry in contenders.items()
    }


def phases_of(parts: Mapping[str, float], every: tuple[int, int] | None) -> tuple[Phase, ...]:
    """From the seconds of a contender's parts to its phases.

    forward+backward is the program "gradients". precondition: the program "plain" less that. statistics, with
    the moving averages: the program "statistics" less "plain". refresh and update run by themselves.
    """
    if not parts:
        return ()
    shares = dict.fromkeys(PHASES, 1.0)
    if every is not None:
        shares["statistics"], shares["refresh"] = (1 / each if each else 0.0 for each in every)
    found = {"forward+backward": parts["gradients"]}
    if "plain" in parts:
        found["precondition"] = max(0.0, parts["plain"] - parts["gradients"])
        found["statistics"] = max(0.0, parts["statistics"] - parts["plain"])
    found |= {name: parts[name] for name in ("refresh", "update") if name in parts}
    return tuple(
        Phase(name=name, seconds=found[name], share=shares[name]) for name in PHASES if name in found
    )


def _memory(contender: Contender, device: torch.device) -> Memory | None:
    """None where the device does not say how much a step allocates."""
    peaks: dict[str, int] = {}
    for kind, indices in contender.kinds.items():
        contender.run(indices[0])
        before = list(contender.tensors())  # kept, since the profiler warns of what is freed and unknown
        peak = peak_bytes(functools.partial(contender.run, indices[0]), device)
        del before
        if peak is None:
            return None
        peaks[kind] = peak
    return Memory(held=num_bytes(contender.tensors()), peaks=peaks)
