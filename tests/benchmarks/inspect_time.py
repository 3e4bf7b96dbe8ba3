"""How long `inspect` takes beyond the capture: match, plan, text and JSON of a model with thousands of nodes.

    python tests/benchmarks/inspect_time.py [--layers 12] [--experts 6] [--repeats 5] [--method kfac]

The model is a transformer-like stack whose blocks hold experts as separate modules, so that the graph has
several thousand nodes and several hundred layers. Prints CPU seconds, of each phase the least of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

import kfac_fx
from kfac_fx import report
from kfac_fx.batch import flatten_batch
from kfac_fx.capture import capture
from kfac_fx.match import match
from kfac_fx.methods import METHODS
from kfac_fx.plan import make_plan

WIDTH, VOCABULARY, CONTEXT, EXAMPLES = 16, 32, 8, 2


@final
class Block(nn.Module):
    """A norm, a gate and experts that every token passes."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, num_experts)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(num_experts))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, WIDTH] of [N, T, WIDTH]."""
        normed = self.norm(x)
        weights = self.gate(normed).softmax(-1)
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + weights[..., index : index + 1] * down(functional.gelu(up(normed)))
        return x


def stack(num_layers: int, num_experts: int) -> nn.Module:
    """Embedding, blocks, head."""
    blocks = [Block(num_experts) for _ in range(num_layers)]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def timed(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least CPU seconds, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = action()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def main() -> None:
    """Print the phases, one a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--experts", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", default="kfac", choices=kfac_fx.methods())
    options = parser.parse_args()
    torch.manual_seed(0)
    model, method = stack(options.layers, options.experts), METHODS[options.method]()
    tokens = torch.randint(VOCABULARY, (EXAMPLES, CONTEXT + 1))
    batch = flatten_batch(tokens[:, :-1], tokens[:, 1:])
    capturing, captured = timed(lambda: capture(model, loss_fn, batch, fisher="empirical"), 1)
    phases: dict[str, float] = {}
    phases["match"], matches = timed(lambda: match(captured), options.repeats)
    phases["plan"], plan = timed(
        lambda: make_plan(
            captured, matches, method, fisher="empirical", sharing="expand", render=report.render, rows={}
        ),
        options.repeats,
    )
    phases["text"], _ = timed(lambda: report.render(plan), options.repeats)
    phases["JSON"], _ = timed(lambda: report.to_json(plan), options.repeats)
    print(f"{len(captured.graph.graph.nodes):,} nodes, {len(plan.matched):,} layers, method {options.method}")
    print(f"capture   {capturing:7.3f} s")
    for name, seconds in phases.items():
        print(f"{name:<8}  {seconds:7.3f} s")
    for last in ("text", "JSON"):
        added = phases["match"] + phases["plan"] + phases[last]
        print(f"inspect with {last} adds {added:.3f} s of CPU time to the capture")


if __name__ == "__main__":
    main()
