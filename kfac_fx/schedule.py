"""Staggered refresh: which layers get new statistics and new inverses at which step of a period.

Enters: the layers known, the state tensors that each reads, what each costs. Leaves: names by slot. No
tensors; it follows from the plans and the method alone, so that nothing of it has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from typing import Literal, final

from kfac_fx.contracts import DampedMethod, Method
from kfac_fx.errors import KfacFxError
from kfac_fx.types import FactorSpec

Refresh = Literal["together", "staggered"]
Unit = tuple[str, ...]
MOST_PARTS = 5


@final
class Schedule:
    """The layers known so far, by what has to be refreshed in one call, and the slot of each."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._costs: dict[str, tuple[int, int]] = {}
        self._units: list[Unit] = []
        self._slots: dict[int, Unit] | None = None
        self._parts: dict[int, Unit] | None = None

    def learn(self, tensors: Mapping[str, Iterable[Hashable]], factors: Iterable[FactorSpec]) -> None:
        """Take these layers. tensors: those that each reads. factors: of a plan that has come into use.

        A layer's statistics and its refresh cost the most of all plans, in whatever order they come.
        """
        costs: dict[str, tuple[int, int]] = dict.fromkeys(tensors, (0, 0))
        for spec in factors:
            statistics, refresh = costs[spec.owner]
            costs[spec.owner] = statistics + spec.flops_statistics, refresh + spec.flops_refresh
        for key, found in costs.items():
            statistics, refresh = self._costs.get(key, (0, 0))
            costs[key] = max(found[0], statistics), max(found[1], refresh)
        self._costs, self._units = costs, units(tensors)
        self._slots = self._parts = None

    def late(self, refreshes: Mapping[str, int]) -> list[str]:
        """Layers without any of these refreshes yet, and those that share a tensor with one."""
        return [key for unit in self._units if not all(map(refreshes.get, unit)) for key in unit]

    def slot(self, step: int) -> Unit:
        """Layers to refresh at this step: each once in `inverse_every` steps."""
        period = self._method.inverse_every
        if self._slots is None:
            between = math.gcd(period, self._method.statistics_every // self._num_parts)
            costs = {unit: sum(self._costs[key][1] for key in unit) for unit in self._units}
            self._slots = dealt(costs, refresh_slots(len(costs), period=period, statistics_every=between))
        return self._slots.get(step % period, ())

    def part(self, step: int) -> Unit:
        """Layers whose statistics are due at this step: each once in `statistics_every` steps."""
        period = self._method.statistics_every
        if self._parts is None:
            between = period // self._num_parts
            costs = {unit: sum(self._costs[key][0] for key in unit) for unit in self._units}
            self._parts = dealt(costs, range(0, period, between))
        return self._parts.get(step % period, ())

    @property
    def _num_parts(self) -> int:
        """In how many parts the layers' statistics come. Each is a program of its own; every other step or
        more has none.
        """
        every = self._method.statistics_every
        most = max(1, min(MOST_PARTS, len(self._units), every // 2))
        return next(num for num in range(most, 0, -1) if every % num == 0)


def check_staggered(method: Method) -> None:
    """Raise `KfacFxError` if this method cannot refresh some of its layers alone."""
    if isinstance(method, DampedMethod) and method.quadratic is not None:
        raise KfacFxError(
            "refresh='staggered' does not go with quadratic_model=True, which compares dampings of all "
            "inverses at once: use refresh='together', or quadratic_model=False."
        )
    if method.inverse_every == 0:
        raise KfacFxError(
            f"refresh='staggered' has nothing to spread: {method.name} has inverse_every=0, it inverts "
            "nothing. Use refresh='together'."
        )


def units(tensors: Mapping[str, Iterable[Hashable]]) -> list[Unit]:
    """Layers that are refreshed in one call: those that share a state tensor, through others too.

    tensors: those that each layer reads.
    """
    member: dict[str, list[str]] = {}
    reader: dict[Hashable, str] = {}
    for key, read in tensors.items():
        member[key] = [key]
        for tensor in read:
            other = member[reader.setdefault(tensor, key)]
            if other is not member[key]:
                other.extend(member[key])
                member.update(dict.fromkeys(member[key], other))
    return [tuple(keys) for first, keys in member.items() if keys[0] == first]


def dealt(costs: Mapping[Unit, int], slots: Iterable[int]) -> dict[int, Unit]:
    """Layers by slot; slots without any are not in it.

    The costliest unit goes to the least loaded slot, equal ones by name. costs: FLOPs of each unit.
    """
    loads = dict.fromkeys(slots, 0)
    filled: dict[int, Unit] = {}
    for unit in sorted(costs, key=lambda unit: (-costs[unit], sorted(unit))):
        slot = min(loads, key=lambda slot: (loads[slot], slot))
        loads[slot] += max(costs[unit], 1)
        filled[slot] = (*filled.get(slot, ()), *unit)
    return filled


def refresh_slots(wanted: int, *, period: int, statistics_every: int) -> list[int]:
    """The first slots, no more than wanted: of those whose steps never compute statistics if there is one for
    every unit, or if they are two thirds of all; else of all.
    """
    every = math.gcd(period, statistics_every)
    free = period - period // every
    enough = free >= wanted or 3 * free >= 2 * period
    return list(islice((slot for slot in range(period) if slot % every or not enough), wanted))
