"""Layer kinds, tried in this order at the root of each gradient term.

A new kind is one file and one entry here.
"""

from __future__ import annotations

from kfac_fx.layers.convolution import Convolution
from kfac_fx.layers.elementwise import Scale, Shift
from kfac_fx.layers.embedding import Embedding
from kfac_fx.layers.experts import GatheredExperts
from kfac_fx.layers.kind import Facts, LayerKind, Product
from kfac_fx.layers.linear import Linear
from kfac_fx.layers.norm import Norm

KINDS: tuple[LayerKind, ...] = (
    Linear(),
    Convolution(),
    Embedding(),
    GatheredExperts(),
    Norm(),
    Scale(),
    Shift(),
)

__all__ = ["KINDS", "Facts", "LayerKind", "Product"]
