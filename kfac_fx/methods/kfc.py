"""KFC: K-FAC with Kronecker factors for convolutions, and its variant for spatially uncorrelated activations.

Grosse & Martens 2016 (arXiv:1602.01407). The paper's factors of a convolution with |T| output positions are
Omega = |T| A and Gamma = G / |T| of this library: their product is the same block, and the factored damping
with the traces of Omega and Gamma is the same step. Formulas: methods.md section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kfac_fx.contracts import Statistics
from kfac_fx.methods.base import identity, zeros
from kfac_fx.methods.costs import inverse_flops
from kfac_fx.methods.damping import scale
from kfac_fx.methods.kfac import KFAC
from kfac_fx.spectrum import largest_eigenvalue
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class KFC(KFAC):
    """Kronecker factors for convolution: Omega of patches, Gamma of output gradients; K-FAC elsewhere.

    Settings of `KFAC`, and spatially_uncorrelated_activations: for convolutions replace the patches' second
    moment Omega / |T| by Sigma (x) I_K + m m^T, with mean mu and covariance Sigma of the C input channels, K
    kernel positions and m = mu at each of them, then 1 for the bias. Sigma alone is kept and inverted (C^2
    instead of (C K + 1)^2). Needs `sharing="expand"` and a `damping_rule` other than "tikhonov".
    """

    spatially_uncorrelated_activations: bool = False

    name: ClassVar[str] = "kfc"
    paper: ClassVar[str] = "Grosse & Martens 2016 (arXiv:1602.01407)"
    shared_names: ClassVar[frozenset[str]] = KFAC.shared_names | {"A_channels", "A_mean"}

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        fits = not self.spatially_uncorrelated_activations or self.damping_rule != "tikhonov"
        self._check("damping_rule", fits, "spatially uncorrelated activations need damping of each factor")

    def refuses(self, match: LayerMatch) -> str | None:
        """Convolutions whose positions are averaged, if activations are to be spatially uncorrelated."""
        if self._by_channel(match) and match.sharing == "reduce":
            return 'spatially uncorrelated activations describe single positions; use sharing="expand"'
        return None

    def _by_channel(self, match: LayerMatch) -> bool:
        """Whether the layer keeps channel moments. Not if some of its uses alone have the bias."""
        whole = all(use.bias == (match.bias is not None) for use in match.uses) and not match.tied
        return self.spatially_uncorrelated_activations and match.uses[0].geometry is not None and whole

    def mean_over(self, match: LayerMatch, name: str) -> int:
        """Channel moments are means over pixels."""
        if name not in ("A_channels", "A_mean"):
            return super().mean_over(match, name)
        return match.examples * _pixels(match) * len(match.uses)

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """As K-FAC. By channel: zero moments; of the last refresh Sigma^-1, m without its last entry, the
        damping gamma and, for a bias, 1 + gamma.
        """
        state = super().init(match, dtype=dtype, device=device)
        if not self._by_channel(match):
            return state
        g, c = match.groups, match.channels
        shapes = {"A_channels": (g, c, c), "A_mean": (g, c), "A_center": (g, c, match.kernel_volume)}
        shapes["A_damping"] = (g,)
        inner = zeros(shapes, dtype=dtype, device=device)
        inner["A_inverse"] = identity((g, c, c), dtype=dtype, device=device)
        if match.bias is not None:
            inner["A_corner"] = torch.ones(g, dtype=dtype, device=device)
        return inner | {name: tensor for name, tensor in state.items() if not name.startswith("A")}

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """As K-FAC; by channel the raw moments of the input's channels."""
        return ("A_channels", "A_mean", "G") if self._by_channel(match) else super().statistics_names(match)

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """As K-FAC; raw moments, since those are linear in the batch."""
        by_channel = {"A_channels", "A_mean"}
        batch = super().batch_statistics(statistics, [n for n in names if n not in by_channel], state)
        if by_channel & set(names):
            mean, second = statistics.channel_moments()
            batch |= {"A_mean": mean, "A_channels": second}
        return {name: batch[name] for name in names}

    def refreshed(
        self, states: Mapping[str, State], *, damping: float | Tensor
    ) -> tuple[dict[str, State], Refreshed]:
        """As K-FAC; by channel (Sigma + gamma I)^-1 and the mean it belongs to."""
        new, result = super().refreshed(states, damping=damping)
        for key, state in states.items():
            if "A_channels" not in state:
                continue
            gamma = self.dampings(state, damping)[0].to(state["A_damping"].dtype)
            new[key]["A_damping"] = gamma
            new[key]["A_center"] = state["A_mean"].unsqueeze(-1).expand_as(state["A_center"]).contiguous()
            if "A_corner" in state:
                new[key]["A_corner"] = 1 + gamma
        return new, result

    def sides(self, state: State) -> tuple[Tensor, Tensor]:
        """(A, G), or (Sigma, G) with the covariance Sigma of the channels."""
        if "A_channels" not in state:
            return super().sides(state)
        mean = state["A_mean"].double().unsqueeze(-1)
        covariance = state["A_channels"].double() - mean @ mean.mT
        return covariance.to(state["A_channels"].dtype), state["G"]

    def scales(self, state: State) -> tuple[Tensor, Tensor]:
        """As K-FAC; by channel those of the whole Sigma (x) I_K + m m^T."""
        if "A_channels" not in state:
            return super().scales(state)
        relative = self.damping_rule == "relative"
        return (_largest if relative else _mean)(state), scale(self.damping_rule, state["G"])

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = Gamma^-1 grad Omega^-1."""
        if "A_channels" not in state:
            return super().precondition(state, gradient)
        return solved_by_channel(state, state["G_inverse"] @ gradient.to(state["G_inverse"].dtype))

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """Costs as K-FAC; by channel statistics 2 pixels C^2, Cholesky C^3, apply 2 C^2 K d_out."""
        specs = super().factors(match, dtype=dtype)
        if match.uses[0].geometry is None:
            return specs
        names = {"A": "Omega / |T|", "G": "|T| Gamma"}
        specs = tuple(replace(s, form=f"{names[s.side]}: {s.form}") for s in specs)
        if not self._by_channel(match):
            return specs
        c, g = match.channels, match.groups
        return (
            replace(
                specs[0],
                dim=c,
                flops_statistics=0
                if specs[0].shared_with
                else 2 * g * match.examples * _pixels(match) * c * c,
                flops_refresh=inverse_flops((g, c, c)),
                flops_apply=2 * g * match.d_out * match.kernel_volume * c * (c + 2),
                form="Omega / |T| by channel: pixels^T pixels",
            ),
            *specs[1:],
        )


def solved_by_channel(state: State, x: Tensor) -> Tensor:
    """X M^-1 with M = Sigma (x) I_K + m m^T + gamma I, by Sherman-Morrison; M is never built.

    x: [groups, d_out, C * K (+1)]. With a bias its coordinate (1 in m, corner 1 + gamma of M) is eliminated
    first, so that gamma = 0 is allowed; the rest is S (x) I_K + c m m^T with S = Sigma + gamma I and c =
    gamma / (1 + gamma), or c = 1 without a bias. methods.md 3.3.
    """
    inverse, m, gamma = state["A_inverse"], state["A_center"], state["A_damping"][:, None, None]
    corner = state["A_corner"][:, None, None] if "A_corner" in state else None
    bias = None if corner is None else x[..., -1:] / corner
    y = (x if bias is None else x[..., :-1]).unflatten(-1, m.shape[1:])
    if bias is not None:
        y = y - bias.unsqueeze(-1) * m.unsqueeze(1)
    y = torch.einsum("gij,gojk->goik", inverse, y)
    u = inverse @ m
    c = 1.0 if corner is None else gamma / corner
    along = _inner(y, m) * c / (1 + c * (u * m).sum((1, 2))[:, None, None])
    v = y - along.unsqueeze(-1) * u.unsqueeze(1)
    if bias is None or corner is None:
        return v.flatten(2)
    return torch.cat([v.flatten(2), bias - _inner(v, m) / corner], -1)


def _inner(y: Tensor, m: Tensor) -> Tensor:
    """<y, m> over channels and kernel: [groups, d_out, 1]."""
    return (y * m.unsqueeze(1)).sum((2, 3)).unsqueeze(-1)


def _mean(state: State) -> Tensor:
    """Mean eigenvalue of Sigma (x) I_K + m m^T from its trace."""
    second, volume, ones = state["A_channels"], state["A_center"].shape[-1], int("A_corner" in state)
    trace = second.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (volume * trace + ones) / (volume * second.shape[-1] + ones)


def _largest(state: State) -> Tensor:
    """Its largest eigenvalue: that of its part which is constant over the kernel, of size C (+1)."""
    volume, mean = state["A_center"].shape[-1], state["A_mean"].unsqueeze(-1)
    inner = state["A_channels"] + (volume - 1) * mean @ mean.mT
    if "A_corner" not in state:
        return largest_eigenvalue(inner)
    column = volume**0.5 * mean
    corner = torch.ones_like(column[:, :1])
    return largest_eigenvalue(
        torch.cat([torch.cat([inner, column], 2), torch.cat([column.mT, corner], 2)], 1)
    )


def _pixels(match: LayerMatch) -> int:
    """Pixels of one example that the channel moments are means over, zeros at the edges included."""
    geometry = match.uses[0].geometry
    assert geometry is not None
    return math.prod(size + 2 * p for size, p in zip(geometry.space, geometry.padding, strict=True))
