"""Staggered refresh: which layers get new inverses at which step of a period.

Enters: the layers known, the state tensors that each reads, what its refresh costs. Leaves: names by slot. No
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


@final
class Schedule:
    """The layers known so far, by what has to be refreshed in one call, and the slot of each."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._costs: dict[str, int] = {}
        self._units: list[Unit] = []
        self._slots: dict[int, Unit] | None = None

    def learn(self, tensors: Mapping[str, Iterable[Hashable]], factors: Iterable[FactorSpec]) -> None:
        """Take these layers. tensors: those that each reads. factors: of a plan that has come into use.

        A refresh of a layer costs the most of all plans, in whatever order they come.
        """
        costs = dict.fromkeys(tensors, 0)
        for spec in factors:
            costs[spec.owner] += spec.flops_refresh
        self._costs = {key: max(cost, self._costs.get(key, 0)) for key, cost in costs.items()}
        self._units, self._slots = units(tensors), None

    def late(self, refreshes: Mapping[str, int]) -> list[str]:
        """Layers without any of these refreshes yet, and those that share a tensor with one."""
        return [key for unit in self._units if not all(map(refreshes.get, unit)) for key in unit]

    def slot(self, step: int) -> Unit:
        """Layers to refresh at this step: each once in `inverse_every` steps."""
        every = self._method.inverse_every
        if self._slots is None:
            costs = {unit: sum(map(self._costs.__getitem__, unit)) for unit in self._units}
            self._slots = dealt(costs, period=every, statistics_every=self._method.statistics_every)
        return self._slots.get(step % every, ())


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


def dealt(costs: Mapping[Unit, int], *, period: int, statistics_every: int) -> dict[int, Unit]:
    """Layers to refresh at the steps t with t % period = slot, by slot; slots without any are not in it.

    The costliest unit goes to the least loaded slot, equal ones by name. costs: FLOPs of each unit's refresh.
    """
    slots = _slots(len(costs), period=period, statistics_every=statistics_every)
    loads = dict.fromkeys(slots, 0)
    filled: dict[int, Unit] = {}
    for unit in sorted(costs, key=lambda unit: (-costs[unit], sorted(unit))):
        slot = min(loads, key=lambda slot: (loads[slot], slot))
        loads[slot] += max(costs[unit], 1)
        filled[slot] = (*filled.get(slot, ()), *unit)
    return filled


def _slots(wanted: int, *, period: int, statistics_every: int) -> list[int]:
    """The first slots, no more than wanted: of those whose steps never compute statistics if there is one for
    every unit, or if they are two thirds of all; else of all.
    """
    every = math.gcd(period, statistics_every)
    free = period - period // every
    enough = free >= wanted or 3 * free >= 2 * period
    return list(islice((slot for slot in range(period) if slot % every or not enough), wanted))
