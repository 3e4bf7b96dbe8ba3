"""K-FAC as libraries with module hooks compute it: the stand-in for today's practice in `step_time.py`.

Plain PyTorch, without `kfac_fx`. A forward hook sees what a Linear or Conv2d reads, a hook on its output what
comes back; factors are products of rows, those of a convolution made by `unfold` (im2col). Every refresh
inverts A and G of every layer by Cholesky with factored Tikhonov damping (Martens & Grosse 2015,
arXiv:1503.05671, section 6.3). Losses are means over the examples of a batch.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows [n, d_in (+1)] of a layer's input, with a column of ones for the bias."""
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1 and isinstance(module.padding, tuple)
        patches = F.unfold(
            x, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
        )
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        rows = x.flatten(0, -2)
    return rows if module.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """Rows [n, d_out] of the gradient at a layer's output."""
    return g.permute(0, 2, 3, 1).flatten(0, 2) if isinstance(module, nn.Conv2d) else g.flatten(0, -2)


def damped_inverse(factor: Tensor, damping: float) -> Tensor:
    """(factor + damping I)^-1 by Cholesky."""
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(factor + damping * eye))


@final
class HookedKFAC:
    """Factors A and G of every Linear and Conv2d, and their inverses.

    decay: weight of the old average. kl_clip: bound on lr^2 <V, grad>. collects: whether the next forward and
    backward give statistics.
    """

    def __init__(
        self, model: nn.Module, *, damping: float = 0.03, decay: float = 0.95, kl_clip: float = 1e-3
    ) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.damping, self.decay, self.kl_clip = damping, decay, kl_clip
        self.collects = True
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.inverses: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in self.layers.items():
            module.register_forward_hook(
                lambda module, args, output, name=name: self._see_input(name, args[0], output)
            )

    @torch.no_grad()
    def _see_input(self, name: str, x: Tensor, output: Tensor) -> None:
        if self.collects:
            rows = input_rows(self.layers[name], x)
            self._average(self.A, name, rows.T @ rows / len(rows))
            output.register_hook(lambda g: self._see_output(name, g))

    @torch.no_grad()
    def _see_output(self, name: str, g: Tensor) -> None:
        """A mean loss divides each example's gradient by their number, once too often in the product."""
        rows = output_rows(self.layers[name], g)
        self._average(self.G, name, rows.T @ rows * len(g))

    def _average(self, factors: dict[str, Tensor], name: str, new: Tensor) -> None:
        old = factors.get(name)
        factors[name] = new if old is None else old.mul_(self.decay).add_(new, alpha=1 - self.decay)

    @torch.no_grad()
    def refresh(self) -> None:
        """New inverses of all factors, one by one."""
        for name in self.layers:
            a, g = self.A[name], self.G[name]
            pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
            root = math.sqrt(self.damping)
            self.inverses[name] = damped_inverse(a, pi * root), damped_inverse(g, root / pi)

    @torch.no_grad()
    def precondition(self, lr: float) -> None:
        """Replace the gradients of all layers by G^-1 grad A^-1, shortened by the KL clip."""
        directions: dict[str, Tensor] = {}
        length = 0.0
        for name, module in self.layers.items():
            gradient = _matrix(module)
            a, g = self.inverses[name]
            directions[name] = g @ gradient @ a
            length += lr**2 * float((directions[name] * gradient).sum())
        share = min(1.0, math.sqrt(self.kl_clip / length)) if length > 0 else 1.0
        for name, module in self.layers.items():
            _write(module, directions[name] * share)


def _matrix(module: Any) -> Tensor:
    """Gradients of weight and bias as [d_out, d_in (+1)]."""
    weight = module.weight.grad.flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.grad[:, None]], 1)


def _write(module: Any, direction: Tensor) -> None:
    if module.bias is not None:
        module.bias.grad = direction[:, -1].contiguous()
        direction = direction[:, :-1]
    module.weight.grad = direction.reshape(module.weight.shape)
