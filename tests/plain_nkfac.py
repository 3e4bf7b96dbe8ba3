"""NKFAC and AdaNKFAC in plain PyTorch, one layer and one matrix at a time, written from the formulas alone.

Enters: a model of `nn.Conv2d` and `nn.Linear` modules, a loss, batches. Leaves: trained weights and, after
each step, what it computed. Module hooks, `F.unfold`, Python branches, `torch.inverse`; nothing here may
import `kfac_fx`. Sun, Yong & Zhang 2023; methods.md sections 5 and 19.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class LayerRecord:
    """Moving averages (m_A, m_G), approximate inverses (D_A, D_G) and the last direction of one layer."""

    m_A: Tensor
    m_G: Tensor
    D_A: Tensor | None = None
    D_G: Tensor | None = None
    direction: Tensor | None = None
    residuals: list[float] = field(default_factory=list)


@dataclass
class PlainNKFAC:
    """The training loop. safeguard, recovery, robust_start: False for the negative controls."""

    model: nn.Module
    loss_fn: Loss
    statistics_every: int
    inverse_every: int
    exact_every: int = 500
    newton_steps: int = 1
    decay: float = 0.95
    adam: bool = False
    lr: float = 0.05
    weight_decay: float = 1e-3
    safeguard: bool = True
    recovery: bool = True
    robust_start: bool = True

    def __post_init__(self) -> None:
        self.t = 0
        self.inputs: dict[str, Tensor] = {}
        self.cotangents: dict[str, Tensor] = {}
        self.records: dict[str, LayerRecord] = {}
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        for name, module in self.layers.items():
            d_out, d_in = _weights(module).shape
            dtype = module.weight.dtype
            self.records[name] = LayerRecord(
                m_A=torch.zeros(d_in, d_in, dtype=dtype), m_G=torch.zeros(d_out, d_out, dtype=dtype)
            )
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            output.register_hook(lambda gradient: self.cotangents.__setitem__(name, gradient.detach()))

        return forward

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss before it."""
        self.model.zero_grad()
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        with torch.no_grad():
            for name, module in self.layers.items():
                record = self.records[name]
                if self.t % self.statistics_every == 0:
                    self._statistics(record, module, self.inputs[name], self.cotangents[name])
                if self.t % self.inverse_every == 0:
                    record.D_A = self._inverse(record, record.m_A, record.D_A)
                    record.D_G = self._inverse(record, record.m_G, record.D_G)
                record.direction = self._direction(record, _gradient(module))
                self._update(name, module, record.direction)
        self.t += 1
        return loss.detach()

    def _statistics(self, record: LayerRecord, module: nn.Module, x: Tensor, g: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            patches = F.unfold(
                x,
                module.kernel_size,
                dilation=module.dilation,
                padding=module.padding,
                stride=module.stride,
            )
            rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
            outputs = g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
        else:
            rows, outputs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        if module.bias is not None:
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
        xx = rows.T @ rows / len(rows)
        gg = outputs.T @ outputs
        record.m_A = record.m_A + (1 - self.decay) * (xx / (xx.norm() + 1e-12) - record.m_A)
        record.m_G = record.m_G + (1 - self.decay) * (gg / (gg.norm() + 1e-12) - record.m_G)

    def _inverse(self, record: LayerRecord, m: Tensor, B: Tensor | None) -> Tensor:
        identity = torch.eye(len(m), dtype=m.dtype)
        M = m + max(1e-4, 0.01 * power(m, robust_start=self.robust_start)) * identity
        if (
            B is None
            or self.t <= 2 * self.inverse_every
            or self.t % (self.exact_every * self.inverse_every) == 0
        ):
            return torch.inverse(M)
        for _ in range(self.newton_steps):
            error = M @ B - identity
            r = error.norm().item()
            record.residuals.append(r)
            length = 1.0 if r < 1 or not self.safeguard else 1 / (M @ B).norm().item()
            B = B - length * B @ error
        return B

    def _direction(self, record: LayerRecord, gradient: Tensor) -> Tensor:
        direction = record.D_G @ gradient @ record.D_A
        if not self.recovery:
            return direction
        return direction * (gradient.norm() / (direction.norm() + 1e-12))

    def _update(self, name: str, module: nn.Module, direction: Tensor) -> None:
        theta = _weights(module)
        memory = self.memory.setdefault(
            name, {"first": torch.zeros_like(theta), "second": torch.zeros_like(theta)}
        )
        if self.adam:
            count = self.t + 1
            memory["first"] = 0.9 * memory["first"] + 0.1 * direction
            memory["second"] = 0.999 * memory["second"] + 0.001 * direction * direction
            mean = memory["first"] / (1 - 0.9**count)
            spread = (memory["second"] / (1 - 0.999**count)).sqrt() + 1e-8
            change = mean / spread
        else:
            memory["first"] = 0.9 * memory["first"] + direction + self.weight_decay * theta
            change = memory["first"]
        theta = theta - self.lr * change
        if module.bias is not None:
            module.bias.copy_(theta[:, -1])
            theta = theta[:, :-1]
        module.weight.copy_(theta.reshape(module.weight.shape))


def power(m: Tensor, *, robust_start: bool = True) -> float:
    """Largest eigenvalue of [d, d] by ten iterations."""
    v = torch.ones(len(m), dtype=m.dtype)
    if robust_start and (v @ m).norm() < 1e-3 * m.norm() * v.norm():
        v = m[:, m.diag().argmax()]
    for _ in range(10):
        u = v @ m
        u = u / u.norm()
        v = m @ u
    return v.norm().item()


def _weights(module: nn.Module) -> Tensor:
    """[W b] as a matrix."""
    weight = module.weight.detach().flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], dim=1)


def _gradient(module: nn.Module) -> Tensor:
    """Gradient of [W b] as a matrix."""
    gradient = module.weight.grad.flatten(1)
    return gradient if module.bias is None else torch.cat([gradient, module.bias.grad[:, None]], dim=1)
