"""Bytes of curvature state for ResNet-50 and GPT-2 small: `python tests/benchmarks/state_bytes.py`.

ResNet-50 on 32 images of 224 x 224, GPT-2 small on 4 sequences of 128 tokens (`--tokens`: SKFAC keeps a row
per token, or dense factors where those are more than columns). For each method with its default settings, in
float32: the bytes that the plan announces; those of all storages that are then really allocated for it (the
command fails if they differ); both as a multiple of the parameters; the state of the method's base optimizer;
and the share of parameters that the method leaves to that optimizer, with the reasons in the JSON. The states
of the optimizers are measured after one step. Nothing is trained: models are captured from their shapes.

Saves build/benchmarks/state_bytes.json; `--json` prints it and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from networks import gpt2_small, next_token_loss, resnet50
from records import OUTPUT, save
from rich import box
from rich.table import Table
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature import Curvature
from kfac_fx.methods import resolve
from kfac_fx.planned import Plan
from kfac_fx.report.table import make_console

MIB = 2**20
Batch = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its loss and a batch whose shapes decide the sizes of the state."""

    name: str
    batch: str
    build: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[], Batch]


def images() -> Batch:
    """32 images and their classes; the values do not matter."""
    return torch.zeros(32, 3, 224, 224), torch.zeros(32, dtype=torch.long)


def sequences(length: int) -> Batch:
    """4 sequences and what follows their tokens."""
    tokens = torch.zeros(4, length, dtype=torch.long)
    return tokens, tokens.clone()


def workloads(tokens: int) -> dict[str, Workload]:
    """The two models, by name on the command line."""
    return {
        "resnet50": Workload(
            name="ResNet-50",
            batch="32 images of 224 x 224",
            build=resnet50,
            loss_fn=F.cross_entropy,
            draw=images,
        ),
        "gpt2": Workload(
            name="GPT-2 small",
            batch=f"4 sequences of {tokens} tokens",
            build=gpt2_small,
            loss_fn=next_token_loss,
            draw=partial(sequences, tokens),
        ),
    }


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@final
@dataclass(frozen=True, kw_only=True)
class Held:
    """What one contender keeps between steps, in bytes.

    announced: curvature by the plan. allocated: curvature in memory. optimizer: state of the optimizer. left:
    parameters that are not preconditioned, by reason.
    """

    contender: str
    announced: int
    allocated: int
    optimizer: int
    layers: int
    left: dict[str, int]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=workloads(0), action="append", help="repeatable; default: all")
    parser.add_argument(
        "--method", choices=kfac_fx.methods(), action="append", help="repeatable; default: all"
    )
    parser.add_argument("--tokens", type=int, default=128, help="length of a sequence of GPT-2; default: 128")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--output", type=Path, default=OUTPUT / "state_bytes.json")
    options = parser.parse_args()
    console = make_console()
    console.quiet = options.json
    record: dict[str, Any] = {}
    known = workloads(options.tokens)
    for key in options.model or known:
        workload = known[key]
        rows, parameters = measured(workload, options.method or kfac_fx.methods())
        record[key] = {
            "batch": workload.batch,
            "parameter_bytes": parameters,
            "held": [asdict(row) for row in rows],
        }
        console.print(table_of(workload, rows, parameters))
        console.print()
    save({"state_bytes": record}, options.output)
    if options.json:
        print(json.dumps(record, indent=1))
    wrong = [r["contender"] for m in record.values() for r in m["held"] if r["announced"] != r["allocated"]]
    if wrong:
        sys.exit(f"the plan announces other bytes than are allocated: {', '.join(wrong)}")


def measured(workload: Workload, methods: Iterable[str]) -> tuple[list[Held], int]:
    """A row for each plain optimizer and each method; the bytes of the parameters."""
    model = workload.build()
    parameters = list(model.parameters())
    rows = [
        Held(
            contender=name,
            announced=0,
            allocated=0,
            optimizer=optimizer_bytes(make, parameters),
            layers=0,
            left={},
        )
        for name, make in OPTIMIZERS.items()
    ]
    for name in methods:
        print(f"{workload.name}: {name}", file=sys.stderr)
        method = resolve(name)
        plan = kfac_fx.inspect(model, workload.loss_fn, *workload.draw(), method=method)
        left: Counter[str] = Counter()
        for skip in plan.skipped:
            left[f"{skip.reason.value}: {skip.detail}"] += skip.numel
        rows.append(
            Held(
                contender=name,
                announced=sum(factor.bytes for factor in plan.factors),
                allocated=allocated_bytes(plan),
                optimizer=optimizer_bytes(method.base_optimizer, parameters),
                layers=len(plan.matched),
                left=dict(left),
            )
        )
        gc.collect()
    return rows, storage_bytes(parameters)


def allocated_bytes(plan: Plan) -> int:
    """Bytes of the state that a step of this plan makes; freed before returning."""
    curvature = Curvature(plan.method)
    curvature.adopt(plan)
    states = curvature.state_dict()["curvature"]
    return storage_bytes(tensor for state in states.values() for tensor in state.values())


def optimizer_bytes(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], parameters: list[nn.Parameter]
) -> int:
    """Bytes of an optimizer's state after one step with zero gradients, which changes no parameter."""
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return storage_bytes(
        t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def table_of(workload: Workload, rows: list[Held], parameters: int) -> Table:
    """Sizes in MiB and as multiples of the parameters."""
    size = f"{parameters / MIB:,.1f} MiB of parameters"
    title = f"{workload.name}, {workload.batch}, {size}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for column in ("layers", "left out", "announced MiB", "allocated MiB", "ratio", "optimizer MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        optimizer = f"{row.optimizer / MIB:,.1f}"
        if not row.layers:
            table.add_row(row.contender, "-", "-", "-", "-", "-", optimizer)
            continue
        left = 4 * sum(row.left.values()) / parameters
        sizes = (f"{number / MIB:,.1f}" for number in (row.announced, row.allocated))
        ratio = f"{row.announced / parameters:.2f}"
        table.add_row(row.contender, str(row.layers), f"{left:.1%}", *sizes, ratio, optimizer)
    return table


if __name__ == "__main__":
    main()
