"""The quadratic model M(d) = 1/2 d^T (F + (lambda + eta) I) d + grad h . d of a captured objective h.

Martens & Grosse 2015, sections 6.4 and 7 (arXiv:1503.05671); methods.md 2.6. F is the generalised
Gauss-Newton matrix of the recorded losses (their Fisher), as it acts on directions: one forward-mode
derivative of the captured forward per direction, no matrix. Enters: a capture, tensors by parameter name.
Leaves: losses, products and the coefficients that minimise M. Runs eagerly; changes no tensor it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.errors import CaptureError, LossError
from kfac_fx.loss import root_products
from kfac_fx.types import Capture, LossNodes

Vector = Mapping[str, Tensor]

_ATTENTION = (
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
)


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
            except NotImplementedError as error:
                raise CaptureError(_unsupported(error)) from error
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
    module, mapping = fxgraph.copy_module(capture.graph)
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
    fxgraph.eliminate_dead(module, frozenset(effects))
    random = [node for node in module.graph.nodes if fxgraph.is_random(node)]
    if random:
        raise CaptureError(_random(random))
    return Forward(
        module=module,
        names=tuple(parameter.name for parameter in capture.parameters),
        losses=capture.losses,
        num_buffers=len(capture.buffers),
    )


def gram(derivatives: Sequence[Derivative], directions: Sequence[Vector], *, damping: float) -> Tensor:
    """D^T (F + damping I) D of K directions: [K, K] in float64 on the CPU.

    damping: lambda + eta, in units of the Hessian of the loss.
    """
    rows = []
    for i, one in enumerate(derivatives):
        row = []
        for j, other in enumerate(derivatives[: i + 1]):
            curvature = [
                (a * b * scale).sum(dtype=torch.float64)
                for a, b, scale in zip(one.roots, other.roots, one.scales, strict=True)
            ]
            row.append(torch.stack(curvature).sum() + damping * dot(directions[i], directions[j]))
        rows.append(torch.stack([*row, *[torch.zeros_like(row[0])] * (len(derivatives) - i - 1)]))
    lower = torch.stack(rows).cpu()
    return lower + lower.tril(-1).mT


def minimiser(curvature: Tensor, slopes: Tensor, *, precision: float) -> Tensor:
    """Coefficients c that minimise 1/2 c^T curvature c + slopes . c: [K].

    curvature: [K, K], symmetric, positive semi-definite. Directions without curvature, and what remains of
    several after all but `precision` of them is parallel, get none: the solution is the shortest one after
    scaling each direction to unit curvature. precision: relative error of the entries.
    """
    diagonal = curvature.diagonal()
    usable = diagonal > 0
    unit = torch.where(usable, 1 / torch.where(usable, diagonal, 1.0).sqrt(), 0.0)
    values, vectors = torch.linalg.eigh(unit[:, None] * curvature * unit)
    kept = values > 16 * precision * len(values)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return -unit * (vectors @ (inverse * (vectors.mT @ (unit * slopes))))


def dot(left: Vector, right: Vector) -> Tensor:
    """Sum of products over the parameters that both have: 0-dim, float64."""
    names = [name for name in left if name in right]
    products = [(_real(left[name]) * _real(right[name])).sum(dtype=torch.float64) for name in names]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def combination(coefficients: Sequence[float], directions: Sequence[Vector]) -> dict[str, Tensor]:
    """Sum of coefficient times direction, for the parameters that any direction has."""
    total: dict[str, Tensor] = {}
    for coefficient, direction in zip(coefficients, directions, strict=True):
        for name, tensor in direction.items():
            term = coefficient * tensor
            total[name] = total[name] + term if name in total else term
    return total


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _scale(recorded: LossNodes, prediction: Tensor, inverse: Tensor, weight: Tensor | None) -> Tensor:
    """R_ times the weight of each term, to broadcast with classes last."""
    if weight is None:
        return 1 / inverse
    by_class = weight.dim() == prediction.dim()
    weight = weight.movedim(recorded.class_dim, -1) if by_class else weight.unsqueeze(-1)
    return torch.where(torch.isfinite(inverse), weight / inverse, 0.0)


def _make_differentiable(node: Node) -> None:
    """Write fused attention, which has no forward-mode derivative, as the products it stands for."""
    if node.op != "call_function" or str(node.target) not in _ATTENTION:
        return
    arguments = fxgraph.named_arguments(node)
    if arguments.get("dropout_p", 0.0):
        return
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    node.target = _attention
    node.args = (arguments["query"], arguments["key"], arguments["value"], mask)
    node.kwargs = {"causal": arguments.get("is_causal", False), "scale": arguments.get("scale")}


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
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


def _random(nodes: Sequence[Node]) -> str:
    places = []
    for node in nodes:
        source = fxgraph.user_source(node.meta.get("stack_trace"))
        places.append(f"{source} ({source.code})" if source else f"{node.target}")
    return (
        f"quadratic_model=True needs a forward without random numbers, but they are drawn at "
        f"{', '.join(dict.fromkeys(places))}. Set dropout to 0, put those modules in eval mode, or use "
        "quadratic_model=False."
    )


def _unsupported(error: NotImplementedError) -> str:
    first = (str(error).strip() or "an operator has no forward-mode derivative").splitlines()[0]
    return f"quadratic_model=True needs the forward-mode derivative of the model, but: {first}"
