"""What is measured of contenders: consecutive steps, kinds of steps, parts of steps, memory.

Enters: contenders that are compiled. Leaves: a report of each.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from kfac_fx.bench.clock import in_turns, num_bytes, peak_bytes
from kfac_fx.bench.contender import Contender
from kfac_fx.bench.records import PHASES, ContenderReport, Kind, Memory, Phase

Runs: TypeAlias = dict[tuple[str, str, str], Callable[[int], Any]]  # by contender, kind or part, name
LEAST_OF_A_KIND, MOST_OF_A_KIND = 5, 10


def measured(
    contenders: Mapping[str, Contender],
    compile_seconds: Mapping[str, float],
    *,
    steps: int | None,
    warmup: int,
    device: torch.device,
    say: Callable[[str], Any],
) -> tuple[ContenderReport, ...]:
    """Warm up, time in turns, then measure memory one by one. steps: None for the longest period."""
    steps = steps or max(sum(map(len, entry.kinds.values())) for entry in contenders.values())
    rounds = min(MOST_OF_A_KIND, max(LEAST_OF_A_KIND, steps // 6))
    kinds, parts = _kinds(contenders, rounds), _parts(contenders)
    say("warming up")
    in_turns(kinds, warmup, device)
    in_turns(parts, 1, device)
    say(f"timing {steps} steps of each")
    consecutive = {label: lambda turn, e=entry: e.run(1 + turn) for label, entry in contenders.items()}
    seconds = in_turns(consecutive, steps, device)
    say(f"timing {rounds} steps of each kind, and the parts of steps")
    apart = in_turns(kinds | parts, rounds, device)
    say("measuring memory")
    return tuple(
        ContenderReport(
            label=label,
            every=entry.every,
            compile_seconds=compile_seconds[label],
            seconds=tuple(seconds[label]),
            kinds=tuple(
                Kind(name=kind, per_period=len(indices), seconds=tuple(apart[label, "kind", kind]))
                for kind, indices in entry.kinds.items()
            ),
            phases=phases_of(
                {part: statistics.median(apart[key]) for key in parts for part in key[2:] if key[0] == label},
                entry.every,
            ),
            memory=_memory(entry, device),
        )
        for label, entry in contenders.items()
    )


def _kinds(contenders: Mapping[str, Contender], rounds: int) -> Runs:
    """Every kind of step of every contender; the rounds are spread over the steps of the kind in a period."""

    def run(turn: int, entry: Contender, indices: Sequence[int]) -> None:
        entry.run(indices[turn * len(indices) // rounds % len(indices)])

    return {
        (label, "kind", kind): functools.partial(run, entry=entry, indices=indices)
        for label, entry in contenders.items()
        for kind, indices in entry.kinds.items()
    }


def _parts(contenders: Mapping[str, Contender]) -> Runs:
    """Every part of every contender."""
    return {
        (label, "part", name): lambda turn, part=part: part()
        for label, entry in contenders.items()
        for name, part in entry.parts().items()
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
    """None where the device does not say how much a step allocates, or the contender what it holds."""
    held, peaks = 0, {}
    for kind, indices in contender.kinds.items():
        contender.run(indices[0])
        known = contender.tensors()
        tensors = list(known or ())  # kept, since the profiler warns of what is freed and unknown
        peak = None if known is None else peak_bytes(functools.partial(contender.run, indices[0]), device)
        if peak is None:
            return None
        held, peaks[kind] = num_bytes(tensors), peak
    return Memory(held=held, peaks=peaks)
