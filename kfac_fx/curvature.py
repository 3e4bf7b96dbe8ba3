"""The curvature state between steps: factors and inverses by weight name, moving averages, refresh,
accumulation.

Enters: plans (which layers exist) and new statistics. Leaves: state tensors for the programs. Knows no graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from kfac_fx import host
from kfac_fx.canonical import gradient_names, state_owner
from kfac_fx.contracts import Method
from kfac_fx.errors import StateError
from kfac_fx.functions import precondition_function, state_keys
from kfac_fx.outcomes import Outcomes
from kfac_fx.places import Key, Places, Present, placed
from kfac_fx.planned import Plan
from kfac_fx.precision import full_float32
from kfac_fx.schedule import Schedule
from kfac_fx.stages import runs
from kfac_fx.types import State

Rates = Callable[[Plan], Tensor]  # learning rates of its layers: [layers]
Snapshot = tuple[dict[Key, Tensor], dict[str, int], dict[str, int], Outcomes]


@final
class Curvature:
    """Tensors of all layers seen so far; captures of other batch shapes share them."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._tensors: dict[Key, Tensor] = {}
        self._layers: dict[str, Places] = {}
        self._counts: dict[str, int] = {}
        self._refreshes: dict[str, int] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        self._loaded: dict[str, State] = {}
        self._schedule = Schedule(method)
        self.outcomes = Outcomes()

    @property
    def empty(self) -> bool:
        """Whether some layer has no statistics yet."""
        return not all(self._counts.get(key) for key in self._layers)

    @property
    def _device(self) -> torch.device:
        """Where the state is."""
        return next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))

    @property
    def kept_last(self) -> int | Tensor:
        """How often factors kept their last inverse."""
        return self.outcomes.kept_last

    @property
    def late(self) -> list[str]:
        """Layers that were never refreshed, and those that share a tensor with one."""
        return self._schedule.late(self._refreshes)

    def slot(self, step: int) -> list[str]:
        """Layers that a staggered refresh renews before the program of this step; none that is `late`."""
        late = self.late
        return [key for key in self._schedule.slot(step) if key not in late]

    def part(self, step: int) -> frozenset[str]:
        """Layers whose statistics are due at this step where those are staggered too."""
        return frozenset(self._schedule.part(step))

    @property
    def rows(self) -> Mapping[str, tuple[int, int]]:
        """(rows, examples) of the batch that laid out a layer's state, where its sizes depend on them."""
        return self._rows

    def sizes(self) -> dict[Key, tuple[int, ...]]:
        """Shapes of the state tensors that may grow."""
        growing = self._method.growing_names
        return {key: tuple(t.shape) for key, t in self._tensors.items() if key[1] in growing}

    def tensor(self, key: str, name: str) -> Tensor:
        """One state tensor."""
        return self._tensors[key, name]

    def state(self, key: str) -> State:
        """State tensors of one layer, by name."""
        return {name: self._tensors[place] for name, place in self._layers[key].items()}

    @property
    def statistics(self) -> Mapping[str, int]:
        """How often each layer has taken statistics."""
        return self._counts

    @property
    def refreshes(self) -> Mapping[str, int]:
        """How often each layer was refreshed."""
        return self._refreshes

    def snapshot(self) -> Snapshot:
        """What `restore` needs to undo later changes; tensors are never changed in place."""
        return dict(self._tensors), dict(self._counts), dict(self._refreshes), self.outcomes

    def restore(self, snapshot: Snapshot) -> None:
        """Back to the state of `snapshot`; layers that were adopted since stay."""
        tensors, counts, refreshes, self.outcomes = snapshot
        self._tensors, self._counts, self._refreshes = self._tensors | tensors, dict(counts), dict(refreshes)

    def replace(self, plan: Plan, new: Mapping[Key, Tensor]) -> None:
        """Take the state that a program has computed; layers of which it computed none do not count."""
        self._tensors.update(new)
        for match in plan.matched:
            if not new.keys().isdisjoint(self._layers[match.key].values()):
                self._counts[match.key] = self._counts.get(match.key, 0) + 1

    def next_weights(self, plan: Plan) -> Tensor:
        """Share of the next batch in the moving averages of each layer of the plan: [layers].

        Layers count for themselves, since a layer may appear late (unfrozen, another mode).
        """
        scale = plan.capture.inverse_scale.meta["val"]
        weights = [self._method.new_weight(self._counts.get(match.key, 0)) for match in plan.matched]
        return host.to_device(weights, dtype=scale.dtype, device=scale.device)

    def adopt(self, plan: Plan) -> None:
        """Make state for layers that are new; check that known ones fit (see `placed`). Loaded tensors are
        taken once. Called when another plan is used.
        """
        present = Present(
            method=self._method, tensors=self._tensors, layers=self._layers, loaded=self._loaded
        )
        new, layers = placed(plan, present)
        self._tensors.update(new)
        self._layers.update(layers)
        if self._method.growing_names:
            for match in plan.matched:
                self._rows.setdefault(match.key, match.laid_out)
        read = {key: places.values() for key, places in self._layers.items()}
        self._schedule.learn(read, plan.factors)
        for key in layers:
            self._loaded.pop(key, None)

    def fold(
        self, plan: Plan, batch: Mapping[Key, Tensor], inverse_scale: Tensor, *, finite: Tensor | None = None
    ) -> None:
        """Fold accumulated batch statistics into the state. inverse_scale: 1/R_ of all of them, 0-dim.

        finite: 0-dim bool; where it is False the state stays as it is. It is read where a thin factor grows.
        """
        if not runs("averages", plan.without):
            return
        weights = self.next_weights(plan)
        for index, match in enumerate(plan.matched):
            statistics = self._method.statistics_names(match)
            if not any((state_owner(plan, match, name), name) in batch for name in statistics):
                continue
            owned = [n for n in statistics if (match.key, n) in batch]
            names = [name for name in owned if state_owner(plan, match, name) == match.key]
            tensors = {name: batch[match.key, name] for name in names}
            places, state = self._layers[match.key], self.state(match.key)
            with full_float32(inverse_scale.device):
                changed = self._method.fold(
                    state, tensors, weight=weights[index], inverse_scale=inverse_scale
                )
            if finite is not None:
                changed = {n: host.kept_unless(finite, tensor, state[n]) for n, tensor in changed.items()}
            self._tensors.update({places[name]: tensor for name, tensor in changed.items()})
            self._counts[match.key] = self._counts.get(match.key, 0) + 1

    def refresh(self, method: Method, keys: Collection[str] | None = None) -> None:
        """New inverses of these layers, or of all, where they have statistics.

        method: the one of this state, as it is damped now. keys: where some layers share a tensor, all of
        them.

        Warns where a factor cannot be inverted and has no earlier inverse to keep: the identity stands in.
        """
        states = {
            key: self.state(key)
            for key in self._layers
            if self._counts.get(key) and (keys is None or key in keys)
        }
        counts = {key: self._refreshes.get(key, 0) for key in states}
        first = not all(counts.values())
        reads = first or self.outcomes.troubled(counts)
        with host.reading(reads), full_float32(self._device):
            new, refreshed = method.refresh(states, counts=counts)
        if first and int(refreshed.kept_last):
            warnings.warn(
                f"{method.name} could not invert {int(refreshed.kept_last)} of its factors at the first "
                "refresh: the identity stands in until a refresh succeeds. Raise the damping.",
                stacklevel=2,
            )
        self._refreshes.update({key: count + 1 for key, count in counts.items()})
        for key, tensors in new.items():
            for name, tensor in tensors.items():
                self._tensors[self._layers[key][name]] = tensor
        self.outcomes = self.outcomes.after(counts, refreshed)

    def preconditioned(
        self, plan: Plan, gradients: Mapping[str, Tensor], *, rates: Rates
    ) -> dict[str, Tensor]:
        """Gradients of the matched parameters, preconditioned by the plan's method."""
        names, keys = gradient_names(plan), state_keys(plan)
        if not names or not runs("precondition", plan.without):
            return {name: gradients[name] for name in names}
        tensors = [gradients[name] for name in names] + [self._tensors[key] for key in keys]
        with full_float32(self._device):
            directions = precondition_function(plan, keys)(*tensors, rates(plan))
        return dict(zip(names, directions, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain numbers.

        Layers that share A list the same tensor (saved once).
        """
        layers = {key: self.state(key) for key in self._layers}
        counts = {
            "statistics": dict(self._counts),
            "refreshes": dict(self._refreshes),
            "rows": {key: list(rows) for key, rows in self._rows.items()},
            **self.outcomes.state_dict(),
        }
        return {"curvature": {**self._loaded, **layers}, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any], plans: Sequence[Plan]) -> None:
        """Take a saved state; layers that no plan has shown yet keep their tensors until one does.

        plans: captures that exist. Raises `StateError` before anything is changed.
        """
        probe = Curvature(self._method)
        probe._loaded = {key: dict(tensors) for key, tensors in state["curvature"].items()}
        missing = [match.key for plan in plans for match in plan.matched if match.key not in probe._loaded]
        if missing:
            raise StateError(f"the saved state has no curvature for: {', '.join(sorted(set(missing)))}.")
        counts = state["counts"]
        probe._counts = {key: int(count) for key, count in counts["statistics"].items()}
        probe._refreshes = {key: int(count) for key, count in counts.get("refreshes", {}).items()}
        probe._rows = {key: (rows[0], rows[1]) for key, rows in counts.get("rows", {}).items()}
        for plan in plans:
            probe.adopt(plan)
        self._tensors, self._layers = probe._tensors, probe._layers
        self._counts, self._loaded = probe._counts, probe._loaded
        self._refreshes, self._rows = probe._refreshes, probe._rows
        self._schedule = probe._schedule
        self.outcomes = Outcomes.loaded(counts)
