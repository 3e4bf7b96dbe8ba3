"""Scale and shift of Layer, Batch, Group and RMS norms from their fused backward: one small block per
channel.

The normalised input is recomputed from the saved mean and reciprocal deviation, never from the output divided
by the scale, which fails at zero (methods.md 9.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import aten, getitem_source, is_op, shape
from kfac_fx.layers.kind import Facts, Product
from kfac_fx.layout import View
from kfac_fx.types import Use
from kfac_fx.walk import Term

_LAYER = aten.native_layer_norm_backward.default
_GROUP = aten.native_group_norm_backward.default
_BATCH = aten.native_batch_norm_backward.default
_CUDNN = aten.cudnn_batch_norm_backward.default
_RMS = aten._fused_rms_norm_backward.default


@final
@dataclass(frozen=True)
class Norm:
    """`y = scale * normalised(x) + shift`."""

    name: str = "norm"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """Output 1 (scale) of a fused norm backward."""
        selected = getitem_source(term.root)
        if (
            selected is None
            or selected[1] != 1
            or not is_op(selected[0], _LAYER, _GROUP, _BATCH, _CUDNN, _RMS)
        ):
            return None
        node = selected[0]
        kind, g, a, operands, eps = norm_parts(node)
        if facts.halves(a, g) != (a, g):
            return None
        refused = facts.check_input(a)
        if refused is not None:
            return refused
        weight = shape(term.root)
        channels = math.prod(weight)
        per_term = facts.capture.loss_info.terms > 1 and kind in ("layer-norm", "rms-norm")
        rows = math.prod(shape(a)) // channels if per_term else shape(g)[0]
        if kind in ("layer-norm", "rms-norm") and shape(g)[0] != facts.examples:
            rows = math.prod(shape(a)) // channels
        return Product(
            kind=kind,
            structure="block",
            a=a,
            g=g,
            groups=channels,
            d_in=1,
            d_out=1,
            rows=rows,
            steps=() if weight == (channels,) else (View(before=(channels,), after=weight),),
            bias_root=(node, 2),
            operands=operands,
            options={
                "rows": rows,
                "channels": channels,
                "channels_first": kind in ("batch-norm", "group-norm"),
                "eps": eps,
            },
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """The normalised input: [rows, positions, channels]."""
        mean, reciprocal = operands if len(operands) == 2 else (None, operands[0])
        if use.options["eps"] is not None:
            reciprocal = (reciprocal + use.options["eps"]).rsqrt()
        if use.options["channels_first"]:
            mean_, reciprocal_ = _spread(mean, a), _spread(reciprocal, a)  # type: ignore[arg-type]
            return _channels_last(((a - mean_.to(a.dtype)) * reciprocal_.to(a.dtype)), use)
        normalised = (a if mean is None else a - mean) * reciprocal
        return normalised.reshape(use.options["rows"], -1, use.options["channels"])

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[rows, positions, channels]."""
        if use.options["channels_first"]:
            return _channels_last(g, use)
        return g.reshape(use.options["rows"], -1, use.options["channels"])


def norm_shift(root: Node) -> tuple[Node, tuple[int, ...]] | None:
    """(g, dimensions that are summed) if the root is output 2 (shift) of a fused norm backward."""
    selected = getitem_source(root)
    if selected is None or selected[1] != 2 or not is_op(selected[0], _LAYER, _GROUP, _BATCH, _CUDNN):
        return None
    kind, g, *_ = norm_parts(selected[0])
    rank = len(shape(g))
    if kind == "layer-norm":
        return g, tuple(range(rank - len(shape(root))))
    return g, (0, *range(2, rank))


def norm_parts(node: Node) -> tuple[str, Node, Node, tuple[Node, ...], float | None]:
    """(kind, g, input, (mean, reciprocal deviation), None), or with the variance and eps for running
    statistics.
    """
    args: tuple = node.args
    if node.target is _LAYER:
        return "layer-norm", args[0], args[1], (args[3], args[4]), None
    if node.target is _GROUP:
        return "group-norm", args[0], args[1], (args[2], args[3]), None
    if node.target is _RMS:
        return "rms-norm", args[0], args[1], (args[3],), None
    if node.target is _CUDNN:
        return "batch-norm", args[1], args[0], (args[5], args[6]), None
    if not args[7]:
        return "batch-norm", args[0], args[1], (args[3], args[4]), float(args[8])
    return "batch-norm", args[0], args[1], (args[5], args[6]), None


def _spread(statistic: Tensor, a: Tensor) -> Tensor:
    """Per-channel [C] or per-group [N, G] statistics against the input [N, C, *space]."""
    space = (1,) * (a.dim() - 2)
    if statistic.dim() == 1:
        return statistic.reshape(1, -1, *space)
    return statistic.repeat_interleave(a.shape[1] // statistic.shape[1], 1).reshape(*a.shape[:2], *space)


def _channels_last(x: Tensor, use: Use) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)
