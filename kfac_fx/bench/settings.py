"""What `bench` can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import nn

from kfac_fx.bench.contender import Contender
from kfac_fx.bench.second_order import scheduled
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError, check_choice
from kfac_fx.methods import resolve
from kfac_fx.schedule import check_staggered

DEFAULT_METHODS = ("kfac", "nkfac")
Make: TypeAlias = Callable[[nn.Module], Contender]


def _nothing(text: str) -> None:
    """Say nothing."""


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of `bench`, checked.

    methods: names or instances, each at its own schedule. statistics_every, inverse_every: steps between
    statistics, for all methods, and between refreshes, for all that have them. steps: consecutive steps per
    contender; None: the longest period of a schedule. Of each kind of step a sixth of that, between 5 and 10.
    warmup: steps of each kind that do not count (3 pass the refreshes that NKFAC inverts exactly). threads:
    torch's threads on the CPU; None: as many as it has. backend: of the compiled steps; with "inductor" SGD
    and AdamW run under `torch.compile` too. refresh: of `kfac_fx.compile`, "together" or "staggered".
    options: fisher, sharing and exclude of `kfac_fx.compile`. extra: more contenders, label to a function
    from a copy of the model to a `Contender`. peers: also time `singd` and `asdfghjkl`, where they are
    installed and know the model. tune: first measure each form of each convolution's A (`autotune`); methods
    use the fastest. say: is told what is being done.

    Raises `KfacFxError` for settings without meaning.
    """

    methods: Sequence[str | Method] = DEFAULT_METHODS
    statistics_every: int | None = None
    inverse_every: int | None = None
    steps: int | None = 30
    warmup: int = 3
    threads: int | None = None
    backend: str = "auto"
    refresh: str = "together"
    options: Mapping[str, Any] | None = None
    extra: Mapping[str, Make] | None = None
    peers: bool = False
    tune: bool = False
    say: Callable[[str], Any] = _nothing

    def __post_init__(self) -> None:
        """Refuse what has no meaning, by name."""
        for name, value in (("steps", self.steps), ("warmup", self.warmup), ("threads", self.threads)):
            if value is not None and value < 1:
                raise KfacFxError(f"{name}={value}: must be at least 1.")
        methods = self.labelled
        check_choice("refresh", self.refresh, ("together", "staggered"))
        for method in methods.values() if self.refresh == "staggered" else ():
            check_staggered(method)

    @property
    def every(self) -> dict[str, int | None]:
        """The schedule of all methods, where it is not their own."""
        return {"statistics_every": self.statistics_every, "inverse_every": self.inverse_every}

    @property
    def labelled(self) -> dict[str, Method]:
        """The methods at their schedules; a further one of the same name gets a number."""
        found: dict[str, Method] = {}
        for method in dict.fromkeys(self.methods):
            made = scheduled(resolve(method), **self.every)
            label, number = made.name, 1
            while label in found:
                number += 1
                label = f"{made.name} {number}"
            found[label] = made
        return found

    @property
    def compile_options(self) -> dict[str, Any]:
        """For `kfac_fx.compile`."""
        staggered = {} if self.refresh == "together" else {"refresh": self.refresh}
        return {**(self.options or {}), **staggered}
