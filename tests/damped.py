"""What the damping rules of methods.md 1.6 add to dense factors, written out for the oracles."""

import math

import torch
from torch import Tensor


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def added(rule: str, damping: float, a: Tensor, g: Tensor) -> tuple[float, float]:
    """What each rule adds to dense A and G."""
    if rule == "full":
        return damping, damping
    if rule == "relative":
        largest = [float(torch.linalg.eigvalsh(factor)[-1]) for factor in (a, g)]
        return max(1e-4, damping * largest[0]), max(1e-4, damping * largest[1])
    pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))) if rule == "factored" else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi
