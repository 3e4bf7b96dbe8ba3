"""What a layer kind is: how it recognises a product, and how it turns its tensors into rows.

A kind knows fx nodes and `gram`, no method. Its file is found through `layers/__init__.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import descendants
from kfac_fx.layout import Geometry, Permute, View
from kfac_fx.traced import Capture
from kfac_fx.types import Use
from kfac_fx.walk import Term, base


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the graph says about its nodes; never decided by comparing shapes."""

    capture: Capture
    examples: int

    @functools.cached_property
    def learned(self) -> frozenset[Node]:
        """Nodes that depend on a trainable parameter."""
        return descendants(p.node for p in self.capture.parameters if p.trainable)

    def halves(self, left: Node, right: Node) -> tuple[Node, Node] | None:
        """(forward, backward) if exactly one of the two belongs to the backward half."""
        left_backward, right_backward = left in self.capture.backward, right in self.capture.backward
        if left_backward == right_backward:
            return None
        return (right, left) if left_backward else (left, right)

    def check_input(self, a: Node) -> Reason | None:
        """A reason to refuse `a` as a layer's input: rows must be examples of the batch."""
        if a in self.capture.data:
            return None
        return Reason.REPARAMETRISED if a in self.learned else Reason.BATCH_FREE


@final
@dataclass(frozen=True, kw_only=True)
class Product:
    """One recognised term of a gradient. steps: canonical gradient -> the term's root. bias_root: where a
    bias' gradient
    must start to belong to this product: the node of `g` behind views, or (node, output) of a fused backward.
    constant_input: `a` does not depend on the batch; such a term counts only beside others of the same weight
    (first state of a recurrence).
    """

    kind: str
    structure: Literal["kronecker", "diagonal", "block"]
    a: Node | None
    g: Node
    groups: int
    d_in: int
    d_out: int
    rows: int
    steps: tuple[Permute | View, ...]
    bias_root: object
    operands: tuple[Node, ...] = ()
    geometry: Geometry | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    constant_input: bool = False


class LayerKind(Protocol):
    """One kind of layer."""

    @property
    def name(self) -> str:
        """The kind's name in reports."""
        ...

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """The product at the term's root; a reason if it is this kind but cannot be used.

        None if it is another kind.
        """
        ...

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """Rows of the layer's input.

        [groups, N, T, d_in] without the bias column (indices for embeddings).
        """
        ...

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """Rows of the output gradient: [groups, N, T, d_out]."""
        ...


def bias_key(g: Node) -> Node:
    """The node that a bias' gradient and a weight's gradient have in common."""
    return base(g)
