"""K-FAC with exact rescaling, momentum and both adaptations of the damping, in plain PyTorch.

After Martens & Grosse 2015, sections 6 and 7 (arXiv:1503.05671), with dense matrices: Gauss-Newton matrix
from reverse-mode Jacobians, factors from recorded rows, one solve for the coefficients. And the compiled step
that is compared with it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from tests.oracles import jacobians, loss_hessian
from tests.training import Batch

DECAY = 0.9
RATE = 19 / 20
Inverses = list[tuple[Tensor, Tensor]]


class PlainKFAC:
    """For two Linear layers and tanh. gamma_every: 0 for gamma = sqrt(lambda + eta) throughout."""

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float,
        l2: float,
        rate: float = RATE,
        inverse_every: int = 3,
        adapt_every: int = 2,
        gamma_every: int = 0,
    ) -> None:
        self.model, self.lam, self.eta, self.rate = model, damping, l2, rate
        self.inverse_every, self.adapt_every, self.gamma_every = inverse_every, adapt_every, gamma_every
        self.layers = [m for m in model if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
        self.weight, self.steps = 0.0, 0
        self.gamma = math.sqrt(damping + l2)
        self.factors: list[list[Tensor]] = []
        self.inverses: Inverses = []
        self.last: Tensor | None = None
        self.lams: list[float] = []
        self.ratios: list[float] = []
        self.gammas: list[float] = []

    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y) + 0.5 * self.eta * self.theta().square().sum()

    def statistics(self, x: Tensor, y: Tensor) -> None:
        """Moving averages with weights that sum to one; G from every column of the loss's Hessian."""
        first, second = self.layers
        hidden = torch.tanh(first(x))
        outputs = second(hidden)
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        inputs = [torch.cat([x, ones], 1), torch.cat([hidden, ones], 1).detach()]
        p = outputs.softmax(1).detach()
        H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
        back = second.weight.detach() * (1 - hidden.detach() ** 2)[:, None, :]
        G = [torch.einsum("nci,ncd,ndj->ij", back, H, back), H.sum(0)]
        new = [[a.T @ a / len(x), g] for a, g in zip(inputs, G, strict=True)]
        self.weight = DECAY * self.weight + 1
        share = 1 / self.weight
        self.factors = (
            new
            if not self.factors
            else [
                [(1 - share) * o + share * n for o, n in zip(old, now, strict=True)]
                for old, now in zip(self.factors, new, strict=True)
            ]
        )

    def damped_inverses(self, gamma: float) -> Inverses:
        inverses = []
        for a, g in self.factors:
            pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
            damped = a + pi * gamma * torch.eye(len(a)), g + gamma / pi * torch.eye(len(g))
            inverses.append((damped[0].inverse(), damped[1].inverse()))
        return inverses

    def candidates(self) -> list[float]:
        """The present gamma first."""
        if not self.gamma_every:
            return [math.sqrt(self.lam + self.eta)]
        if self.steps == 0 or self.steps % self.gamma_every:
            return [self.gamma]
        w = math.sqrt(self.rate) ** self.gamma_every
        return [self.gamma, w * self.gamma, self.gamma / w]

    def choice(self, gammas: list[float], falls: list[float]) -> int:
        """Which candidate is taken: the one with the least model."""
        return falls.index(min(falls))

    def step(self, x: Tensor, y: Tensor) -> None:
        outputs = self.model(x)
        parameters = list(self.model.parameters())
        J = torch.cat([j.flatten(1) for j in jacobians(outputs, parameters)], 1)
        curvature = J.T @ loss_hessian(F.cross_entropy, outputs, y) @ J
        grads = torch.autograd.grad(F.cross_entropy(self.model(x), y), parameters)
        theta, before = self.theta(), self.objective(x, y).detach()
        gradient = torch.cat([g.reshape(-1) for g in grads]) + self.eta * theta
        self.statistics(x, y)
        refreshes = self.steps % self.inverse_every == 0
        gammas = self.candidates()
        inverses = [self.damped_inverses(gamma) if refreshes else self.inverses for gamma in gammas]
        updates = [self.update(gradient, curvature, each) for each in inverses]
        best = self.choice(gammas, [float(fall) for _, fall in updates])
        self.gamma, self.inverses, (delta, fall) = gammas[best], inverses[best], updates[best]
        torch.nn.utils.vector_to_parameters(theta + delta, parameters)
        self.steps += 1
        if self.steps % self.adapt_every == 0:
            self.ratios.append(float(self.objective(x, y).detach() - before) / float(fall))
            factor = self.rate**self.adapt_every
            self.lam *= factor if self.ratios[-1] > 0.75 else 1.0
            self.lam /= factor if self.ratios[-1] < 0.25 else 1.0
        self.lams.append(self.lam)
        self.gammas.append(self.gamma)
        self.last = delta

    def update(self, gradient: Tensor, curvature: Tensor, inverses: Inverses) -> tuple[Tensor, Tensor]:
        pieces, position = [], 0
        for layer, (a, g) in zip(self.layers, inverses, strict=True):
            size = layer.weight.numel()
            weight = gradient[position : position + size].view_as(layer.weight)
            bias = gradient[position + size : position + size + len(layer.bias)]
            direction = -g @ torch.cat([weight, bias[:, None]], 1) @ a
            pieces += [direction[:, :-1].reshape(-1), direction[:, -1]]
            position += size + len(layer.bias)
        D = torch.stack([torch.cat(pieces), *([] if self.last is None else [self.last])])
        M = curvature + (self.lam + self.eta) * torch.eye(len(gradient))
        coefficients = torch.linalg.solve(D @ M @ D.T, -D @ gradient)
        delta = coefficients @ D
        fall = 0.5 * delta @ M @ delta + gradient @ delta
        assert float(fall) == pytest.approx(0.5 * float(gradient @ delta), rel=1e-9)
        return delta, fall


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(count: int) -> list[Batch]:
    torch.manual_seed(1)
    rule = torch.randn(5, 3)
    inputs = [torch.randn(16, 5) for _ in range(count)]
    return [(x, (x @ rule + torch.randn(16, 3)).argmax(1)) for x in inputs]


def compiled(model: nn.Module, **settings: object) -> kfac_fx.TrainStep:
    """The step that `PlainKFAC` transcribes."""
    options = {
        "decay": DECAY,
        "inverse_every": 3,
        "adapt_every": 2,
        "quadratic_model": True,
        "adaptive_damping": True,
    }
    method = kfac_fx.KFAC(**{**options, **settings})  # type: ignore[arg-type]
    return kfac_fx.compile(model, F.cross_entropy, method=method, fisher="type2", backend="eager")
