"""Between parameter shapes and the canonical gradients `[groups, d_out, d_in(+1)]` that methods read; names
of state tensors.

Tensors and records only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.layout import lies_transposed
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch, State


def gradient_names(plan: Plan) -> list[str]:
    """Parameters whose gradients are preconditioned, each once."""
    names = [name for match in plan.matched for name in (match.weight, match.bias) if name is not None]
    return list(dict.fromkeys(names))


def initial_state(plan: Plan, match: LayerMatch) -> State:
    """State tensors of one layer of the plan as meta tensors: names, shapes, dtypes."""
    if match.key not in plan.states:
        meta = torch.device("meta")
        plan.states[match.key] = plan.method.init(match, dtype=state_dtype(plan, match), device=meta)
    return plan.states[match.key]


def state_dtype(plan: Plan, match: LayerMatch) -> torch.dtype:
    """Factors are float32, or float64 for float64 parameters."""
    return torch.promote_types(plan.capture.parameter(match.weight).dtype, torch.float32)


def batch_names(plan: Plan, match: LayerMatch) -> list[str]:
    """Names of the statistics that one batch contributes to this layer."""
    return list(plan.method.statistics_names(match))


def state_owner(plan: Plan, match: LayerMatch, name: str) -> str:
    """Key under which a state tensor of this layer is kept.

    What depends on the input alone belongs to its first reader.
    """
    return match.shared_a if name in plan.method.shared_names else match.key


def to_matrix(match: LayerMatch, gradients: Mapping[str, Tensor]) -> Tensor:
    """Canonical gradient [groups, d_out, d_in(+1)]; of a block structure [channels, k]."""
    weight = match.layout.to_matrix(_part(match, gradients[match.weight]))
    if match.structure == "block":
        columns = [weight]
        if match.bias is not None and match.bias_layout is not None:
            columns.append(match.bias_layout.to_matrix(_part(match, gradients[match.bias])))
        return torch.stack(columns, -1)
    if match.bias is None or match.bias_layout is None:
        return weight
    bias = match.bias_layout.to_matrix(_part(match, gradients[match.bias]))
    if lies_transposed(weight):
        return torch.cat([weight.mT, bias.unsqueeze(-2)], -2).mT
    return torch.cat([weight, bias.unsqueeze(-1)], -1)


def from_matrices(
    plan: Plan, directions: Sequence[Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Canonical directions of all layers back to parameter shapes.

    Rows that no part covers keep their gradient.
    """
    pieces: dict[str, list[tuple[LayerMatch, Tensor]]] = {}
    for match, matrix in zip(plan.matched, directions, strict=True):
        if match.bias is not None and match.bias_layout is not None:
            inner = matrix[..., 0] if match.structure == "block" else matrix[..., :-1]
            pieces.setdefault(match.bias, []).append((match, match.bias_layout.to_parameter(matrix[..., -1])))
        else:
            inner = matrix[..., 0] if match.structure == "block" else matrix
        pieces.setdefault(match.weight, []).append((match, match.layout.to_parameter(inner)))
    return {name: _assembled(gradients[name], pieces[name]) for name in gradients}


def _assembled(gradient: Tensor, pieces: list[tuple[LayerMatch, Tensor]]) -> Tensor:
    if pieces[0][0].part is None:
        return pieces[0][1].to(gradient.dtype)
    rows, position = [], 0
    for match, piece in sorted(pieces, key=lambda pair: pair[0].part or (0, 0)):
        assert match.part is not None
        rows += [gradient[position : match.part[0]], piece.to(gradient.dtype)]
        position = match.part[1]
    rows.append(gradient[position:])
    return torch.cat(rows, 0)


def _part(match: LayerMatch, gradient: Tensor) -> Tensor:
    return gradient if match.part is None else gradient[match.part[0] : match.part[1]]
