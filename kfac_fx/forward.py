"""The captured forward as a program of its own, its value and its derivative along a direction.

Enters: a capture; tensors in the order of its placeholders. Leaves: the loss, and S^T J v per recorded loss
(H = S S^T its Hessian, J the derivative of its prediction; methods.md 1.2, 2.6). Runs eagerly, in forward
mode, and changes no tensor it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node

from kfac_fx import editing
from kfac_fx import graph as fxgraph
from kfac_fx.errors import CaptureError, LossError
from kfac_fx.hessian import root_products
from kfac_fx.sources import user_source
from kfac_fx.traced import Capture, LossNodes
from kfac_fx.types import Source

Vector = Mapping[str, Tensor]
_NO_FORWARD_MODE = re.compile(r"forward AD with (\w+) that does not support it")  # torch's own words


@final
@dataclass(frozen=True, kw_only=True)
class Derivative:
    """The forward and its derivative along one direction v.

    loss, slope: the loss and its derivative, 0-dim. roots: per recorded loss S^T J v (S S^T = H) at every
    position, classes last. scales: R_ times the weight of each term, to broadcast with it.
    """

    loss: Tensor
    slope: Tensor
    roots: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Forward:
    """The captured forward as a program of its own.

    module: placeholders are the capture's; outputs are the loss, then per recorded loss its prediction, 1/R_,
    and, where it has them, the weights of its terms.
    """

    module: GraphModule
    names: tuple[str, ...]
    losses: tuple[LossNodes, ...]
    num_buffers: int

    def loss(self, vector: Vector, tensors: Sequence[Tensor]) -> Tensor:
        """The loss with these parameters. tensors: in the order of the placeholders."""
        return self.module(*self._arguments(vector, tensors))[0]

    def derivative(self, direction: Vector, tensors: Sequence[Tensor]) -> Derivative:
        """The derivative at `tensors` along a direction (parameters that it lacks stay)."""
        with forward_ad.dual_level():
            at = dict(zip(self.names, tensors, strict=False))
            duals = {
                name: forward_ad.make_dual(at[name].detach(), tangent) for name, tangent in direction.items()
            }
            try:
                outputs = self.module(*self._arguments(duals, tensors))
            except RuntimeError as error:
                named = _NO_FORWARD_MODE.search(str(error))
                if named is None:
                    raise
                raise CaptureError(_no_forward_mode(named[1], self.module)) from error
            pairs = [forward_ad.unpack_dual(tensor) for tensor in outputs]
            values = iter([(pair.primal, pair.tangent) for pair in pairs])
        loss, slope = next(values)
        roots, scales = [], []
        for recorded in self.losses:
            prediction, tangent = next(values)
            tangent = torch.zeros_like(prediction) if tangent is None else tangent
            roots.append(root_products(recorded.kind, recorded.class_dim, prediction, tangent))
            inverse = next(values)[0]
            weight = None if recorded.weight is None else next(values)[0]
            scales.append(_scale(recorded, prediction, inverse, weight))
        slope = torch.zeros_like(loss) if slope is None else slope
        return Derivative(loss=loss, slope=slope, roots=tuple(roots), scales=tuple(scales))

    def _arguments(self, vector: Vector, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` with other parameters, and with copies of the buffers, which the forward may change."""
        parameters = [
            vector.get(name, tensor.detach()) for name, tensor in zip(self.names, tensors, strict=False)
        ]
        first, last = len(self.names), len(self.names) + self.num_buffers
        return [*parameters, *(buffer.clone() for buffer in tensors[first:last]), *tensors[last:]]


def forward_program(capture: Capture) -> Forward:
    """The forward of a capture.

    Raises `LossError` if the curvature of the loss is not known, `CaptureError` if the forward draws random
    numbers: then it has no fixed value to model.
    """
    if not capture.losses:
        problem = (
            "it is none of them" if capture.loss_info.kind == "unknown" else "it has other terms beside them"
        )
        raise LossError(
            "quadratic_model=True needs a loss made of cross-entropy, mean squared error or BCE-with-logits "
            f"calls alone, but {problem}. For a penalty eta/2 |theta|^2 pass l2=eta to the method; for any "
            "other loss use quadratic_model=False."
        )
    module, mapping = editing.copy_module(capture.graph)
    outputs = [capture.loss]
    for recorded in capture.losses:
        outputs += [recorded.prediction, recorded.inverse_scale]
        outputs += [] if recorded.weight is None else [recorded.weight]
    module.graph.output_node().args = (tuple(mapping[node] for node in outputs),)
    effects = set()
    for node in capture.graph.graph.nodes:
        if node is capture.passes[0].seed:
            break
        if fxgraph.is_mutation(node) and not fxgraph.is_random(node):
            effects.add(mapping[node])
    for node in list(module.graph.nodes):
        _make_differentiable(node)
    editing.eliminate_dead(module, frozenset(effects))
    random = [node for node in module.graph.nodes if fxgraph.is_random(node)]
    if random:
        raise CaptureError(_random(random))
    return Forward(
        module=module,
        names=tuple(parameter.name for parameter in capture.parameters),
        losses=capture.losses,
        num_buffers=len(capture.buffers),
    )


def _scale(recorded: LossNodes, prediction: Tensor, inverse: Tensor, weight: Tensor | None) -> Tensor:
    """R_ times the weight of each term, to broadcast with classes last."""
    if weight is None:
        return 1 / inverse
    by_class = weight.dim() == prediction.dim()
    weight = weight.movedim(recorded.class_dim, -1) if by_class else weight.unsqueeze(-1)
    return torch.where(torch.isfinite(inverse), weight / inverse, 0.0)


def _make_differentiable(node: Node) -> None:
    """Write an operator whose forward mode torch lacks, or which stops a gradient, as what it stands for."""
    if node.op != "call_function" or str(node.target) not in _REPLACED:
        return
    replacement, names = _REPLACED[str(node.target)]
    given = fxgraph.named_arguments(node)
    if not given.get("dropout_p", 0.0):
        node.target = replacement
        node.args = ()
        node.kwargs = {own: given[name] for own, name in names.items() if name in given}


def _attention(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor]:
    """softmax(q k^T scale + mask) v; rows that see nothing give zero. Groups of heads may share keys."""
    repeats = query.shape[-3] // key.shape[-3]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    return (torch.where(blind, 0.0, torch.softmax(scores, -1)) @ value,)


def _embedding(*, table: Tensor, tokens: Tensor, padding: int = -1) -> Tensor:
    """Rows of the table; that of the padding token has no gradient, so no tangent either."""
    rows = torch.nn.functional.embedding(tokens, table)
    padded = (tokens == padding).unsqueeze(-1)
    return torch.where(padded, forward_ad.unpack_dual(rows).primal, rows)


def _weight_norm(*, direction: Tensor, length: Tensor, dim: int = 0) -> tuple[Tensor]:
    """Length times direction / |direction|, norms over all axes but one."""
    others = [axis for axis in range(direction.dim()) if axis != dim % direction.dim()]
    norm = (direction * direction).sum(others, keepdim=True).sqrt()
    return (direction * (length / norm),)


_ATTENDS = {"query": "query", "key": "key", "value": "value", "causal": "is_causal", "scale": "scale"}
_MASKED, _BIASED = _ATTENDS | {"mask": "attn_mask"}, _ATTENDS | {"mask": "attn_bias"}
# Operator -> (what it stands for, its arguments by the names of the operator's schema).
_REPLACED: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "aten._scaled_dot_product_flash_attention.default": (_attention, _ATTENDS),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (_attention, _MASKED),
    "aten._scaled_dot_product_efficient_attention.default": (_attention, _BIASED),
    "aten._scaled_dot_product_cudnn_attention.default": (_attention, _BIASED),
    "aten._scaled_dot_product_fused_attention_overrideable.default": (_attention, _BIASED),
    "aten.embedding.default": (
        _embedding,
        {"table": "weight", "tokens": "indices", "padding": "padding_idx"},
    ),
    "aten._weight_norm_interface.default": (_weight_norm, {"direction": "v", "length": "g", "dim": "dim"}),
}


def _random(nodes: Sequence[Node]) -> str:
    places = []
    for node in nodes:
        source = _line_of(node)
        places.append(f"{source} ({source.code})" if source else f"{node.target}")
    return (
        f"quadratic_model=True needs a forward without random numbers, but they are drawn at "
        f"{', '.join(dict.fromkeys(places))}. Set dropout to 0, put those modules in eval mode, or use "
        "quadratic_model=False."
    )


def _no_forward_mode(operator: str, module: GraphModule) -> str:
    """operator: as torch names it, without its namespace."""
    nodes = [node for node in module.graph.nodes if str(node.target).startswith(f"aten.{operator}.")]
    places = [f" at {source} ({source.code})" for node in nodes if (source := _line_of(node))]
    return (
        f"quadratic_model=True needs the forward-mode derivative of the model, but torch has none for "
        f"{operator}{','.join(dict.fromkeys(places))}. Write it with other operators, or use "
        "quadratic_model=False."
    )


def _line_of(node: Node) -> Source | None:
    """The user's line."""
    return user_source(node.meta.get("stack_trace"))
