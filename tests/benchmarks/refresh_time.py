"""Time of damping and refresh on ResNet-50's factors: `python tests/benchmarks/refresh_time.py`.

What NKFAC's table 9 counts: the damping of all factors (for NKFAC with its power iteration) and their
inverses, without statistics and without the step. The factors are those of the 54 layers of a ResNet-50,
every layer with an A of its own; each is the second moment of as many random rows as it has columns. Rows of
SKFAC are those of a batch of 32, one per image. Contenders:

    kfac             Cholesky inverses with factored Tikhonov damping; the base of all ratios
    kfac by block    the same damping of the whole block instead: eigenvectors, no inverses
    foof             the inverse of A alone
    ekfac            eigenvectors
    nkfac exact      power iteration, then inverses by LU, as at the first three refreshes
    nkfac Newton     power iteration, then one guarded Newton step from the last inverse, as later on
    nkfac spectral   the same with the guard in the spectral norm
    skfac            Woodbury from thin rows
    skfac dense      SKFAC's fallback for factors with as many rows as columns: a dense inverse
    ikfac, singd     nothing to refresh: the update of their roots from one batch's A and G

Batched: all layers in one call of the method, which stacks factors of one size. One by one: a call for each
layer. Repeats go round through contenders and modes; figures are medians of processor time on one thread.
The first round warms up and does not count. No method branches on values, so that random factors take as long
as real ones, but for eigenvectors.

`--scale 4` (default) has widths divided by 4 and factors up to 1152; `--scale 1` is ResNet-50 itself, with
factors up to 4608, and takes 64 times as long. Saves build/benchmarks/refresh_time.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from networks import resnet50
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import kfac_fx
from kfac_fx.methods import METHODS
from kfac_fx.types import LayerMatch, State

BATCH = 32
BASE = "kfac"
Factors = dict[str, Tensor]
Refresh = Callable[[], Any]


@final
@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its settings. exact: NKFAC's first refreshes instead of its later ones."""

    method: str
    settings: Mapping[str, Any]
    exact: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """Median seconds of one contender; one_by_one is None where layers are always apart."""

    contender: str
    batched: float
    one_by_one: float | None
    ratio: float


CONTENDERS = {
    BASE: Contender(method="kfac", settings={}),
    "kfac by block": Contender(method="kfac", settings={"damping_rule": "tikhonov"}),
    "foof": Contender(method="foof", settings={}),
    "ekfac": Contender(method="ekfac", settings={}),
    "nkfac exact": Contender(method="nkfac", settings={}, exact=True),
    "nkfac Newton": Contender(method="nkfac", settings={}),
    "nkfac spectral": Contender(method="nkfac", settings={"guard": "spectral"}),
    "skfac": Contender(method="skfac", settings={}),
    "skfac dense": Contender(method="skfac", settings={"window": 10**6}),
    "ikfac": Contender(method="ikfac", settings={}),
    "singd": Contender(method="singd", settings={}),
}


def layers(scale: int) -> list[LayerMatch]:
    """The convolutions and the head of a ResNet-50 whose widths are divided by `scale`."""
    plan = kfac_fx.inspect(
        resnet50(width=64 // scale, num_classes=1000 // scale),
        nn.CrossEntropyLoss(),
        torch.zeros(BATCH, 3, 64, 64),
        torch.zeros(BATCH, dtype=torch.int64),
        method="kfac",
    )
    return [match for match in plan.matched if match.structure == "kronecker"]


def second_moment(groups: int, d: int) -> Tensor:
    """Second moment of d random rows: [groups, d, d], symmetric and positive definite."""
    rows = torch.randn(groups, d, d)
    return rows.mT @ rows / d


def state_of(method: Any, match: LayerMatch, factors: Factors) -> tuple[State, State]:
    """The layer's state after one batch, and that batch's statistics."""
    state = method.init(match, dtype=torch.float32, device=torch.device("cpu"))
    batch = {}
    for name in method.statistics_names(match):
        known = factors.get(name)
        batch[name] = torch.rand_like(state[name]) if known is None else known
    return {**state, **folded(method, state, batch)}, batch


def folded(method: Any, state: State, batch: State) -> State:
    """What the batch's statistics change."""
    return method.fold(state, batch, weight=torch.tensor(1.0), inverse_scale=torch.tensor(1.0))


def refreshes(
    contender: Contender, matches: list[LayerMatch], factors: list[Factors]
) -> tuple[Refresh, Refresh | None]:
    """Calls that refresh all layers at once, and one by one."""
    method = METHODS[contender.method](**contender.settings)
    pairs = [state_of(method, match, own) for match, own in zip(matches, factors, strict=True)]
    if not method.inverse_every:
        return lambda: [folded(method, state, batch) for state, batch in pairs], None
    states = {match.key: state for match, (state, _) in zip(matches, pairs, strict=True)}
    count = 0
    if contender.method == "nkfac" and not contender.exact:
        count = 3
        for key, new in method.refresh(states, counts=dict.fromkeys(states, 0))[0].items():
            states[key].update(new)
    counts = dict.fromkeys(states, count)

    def one_by_one() -> None:
        for key, state in states.items():
            method.refresh({key: state}, counts={key: count})

    return lambda: method.refresh(states, counts=counts), one_by_one


def seconds_of(call: Refresh) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def measure(names: list[str], *, scale: int, repeats: int, console: Console) -> list[Row]:
    """Medians of alternating repeats."""
    matches = layers(scale)
    factors = [{"A": second_moment(m.groups, m.d_in), "G": second_moment(m.groups, m.d_out)} for m in matches]
    calls = {name: refreshes(CONTENDERS[name], matches, factors) for name in names}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in track(range(repeats + 1), "rounds", console=console):
        for name, modes in calls.items():
            for mode, call in enumerate(modes):
                if call is not None:
                    seconds = seconds_of(call)
                    times.setdefault((name, mode), []).extend([seconds] if turn else [])
    median = {place: statistics.median(own) for place, own in times.items()}
    return [
        Row(
            contender=name,
            batched=median[name, 0],
            one_by_one=median.get((name, 1)),
            ratio=median[name, 0] / median[BASE, 0],
        )
        for name in names
    ]


def print_rows(rows: list[Row], *, scale: int, console: Console) -> None:
    """Seconds, and ratios to K-FAC and between the two ways to call."""
    figures = table(
        f"Damping and refresh, 54 layers of ResNet-50, widths / {scale}, one thread",
        left=("contender",),
        right=("batched, s", f"/ {BASE}", "one by one, s", "one by one / batched"),
    )
    for row in rows:
        apart = row.one_by_one
        figures.add_row(
            row.contender,
            f"{row.batched:.3f}",
            f"{row.ratio:.3f}",
            "" if apart is None else f"{apart:.3f}",
            "" if apart is None else f"{apart / row.batched:.2f}",
        )
    console.print(figures)


def main() -> None:
    """Measure on one thread, print the table, save the record."""
    parser = argparse.ArgumentParser(description="Time of damping and refresh on ResNet-50's factors.")
    parser.add_argument(
        "--scale", type=int, default=4, choices=(1, 2, 4, 8), help="divide widths (default 4)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated names")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder to write to (default {OUTPUT})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = list(dict.fromkeys([BASE, *arguments.contenders.split(",")]))
    console = Console()
    rows = measure(names, scale=arguments.scale, repeats=arguments.repeats, console=console)
    print_rows(rows, scale=arguments.scale, console=console)
    protocol = {"scale": arguments.scale, "repeats": arguments.repeats, "batch": BATCH, "base": BASE}
    record = {"protocol": protocol, "table": [asdict(row) for row in rows]}
    save(record, arguments.output / "refresh_time.json")
    console.print(f"saved {arguments.output}/refresh_time.json")


if __name__ == "__main__":
    main()
