"""Rows of a layer from the inputs and outputs of its modules: nothing of them comes from this library.

Enters: calls of modules. Leaves: rows by the definition of each module of `torch.nn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fx.types import LayerMatch
from kfac_fx.verification.eager import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, Call
from kfac_fx.verification.graph_rows import block_rows_of, convolution_rows, lookup_rows, plain_rows
from kfac_fx.verification.patches import Window
from kfac_fx.verification.rows import BlockRows, UseRows

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS)


def rows_at_modules(
    match: LayerMatch, calls: list[Call], *, examples: int
) -> list[UseRows] | list[BlockRows] | None:
    """Rows of every call of the layer's modules; None where modules do not tell which rows are examples, or
    where they are not all of the layer.
    """
    fits = all(call.g and len(call.x) == examples and call.x.dim() > 1 for call in calls)
    if not calls or not fits or match.part is not None or match.tied or len(calls) != len(match.uses):
        return None
    if match.structure == "block":
        norms = all(isinstance(call.module, _NORMS) for call in calls)
        return [_norm(match, call) for call in calls] if norms else None
    if any(isinstance(call.module, _NORMS) for call in calls):
        return None
    return [_product(call, with_bias=match.bias is not None) for call in calls]


def _product(call: Call, *, with_bias: bool) -> UseRows:
    module = call.module
    ones = with_bias and module._parameters.get("bias") is not None
    if isinstance(module, nn.Linear):
        g = [_tokens(one) for one in call.g]
        return plain_rows(_tokens(call.x), g, ones=ones)
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        return lookup_rows(
            call.x.reshape(-1),
            [one.reshape(len(one), -1, one.shape[-1]) for one in call.g],
            size=module.num_embeddings,
            padding=padding,
        )
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return _convolution(module, call, ones=ones)


def _tokens(x: Tensor) -> Tensor:
    """[N, ..., d] -> [1, N, T, d]."""
    return x.reshape(1, len(x), -1, x.shape[-1])


def _convolution(module: nn.Module, call: Call, *, ones: bool) -> UseRows:
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    if isinstance(module.padding, str):
        total = [
            d * (k - 1) if module.padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        left, right = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        left = right = [int(p) for p in module.padding]  # type: ignore[arg-type]
    x = call.x
    if module.padding_mode != "zeros":
        pairs = [side for lr in reversed(list(zip(left, right, strict=True))) for side in lr]
        x, left = F.pad(x, pairs, mode=module.padding_mode), [0] * len(left)
    window = Window(
        kernel=kernel,
        stride=tuple(module.stride),
        left=tuple(left),
        dilation=dilation,
        outputs=tuple(call.output.shape[2:]),
        groups=module.groups,
        transposed=isinstance(module, TRANSPOSED),
    )
    return convolution_rows(x, call.g, window, ones=ones)


def _norm(match: LayerMatch, call: Call) -> BlockRows:
    module, x = call.module, call.x
    channels_first = isinstance(module, (nn.GroupNorm, *BATCH_NORMS))
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.RMSNorm):
        x = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.GroupNorm):
        x = F.group_norm(x, module.num_groups, eps=module.eps)
    else:
        assert isinstance(module, BATCH_NORMS)
        own = module.training or module.running_mean is None
        axes = [0, *range(2, x.dim())]
        mean = x.mean(axes) if own else module.running_mean
        variance = x.var(axes, unbiased=False) if own else module.running_var
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = (x - mean.reshape(shape)) / torch.sqrt(variance.reshape(shape) + module.eps)
    ones = match.bias is not None and module._parameters.get("bias") is not None
    rows = match.rows // len(match.uses)
    return block_rows_of(
        x, call.g, rows=rows, channels=match.groups, channels_first=channels_first, ones=ones
    )
