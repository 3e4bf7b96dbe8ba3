"""Reference curvature in plain PyTorch, written without the library under test.

Enters: an ordinary module, an ordinary criterion, one batch. Leaves: dense Gauss-Newton blocks from autograd
Jacobians, layer rows gathered by index, Kronecker factors from hooks. Nothing here may import `kfac_fx`.
Vectors of a weight are row-major over [d_out, d_in (+1)], with the bias as the last column.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Factors = dict[str, dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius distance of `value` from `reference`, relative to the latter."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    assert value.dtype == reference.dtype, f"{value.dtype} is not {reference.dtype}"
    return ((value - reference).norm() / reference.norm()).item()


def flop_counter() -> FlopCounterMode:
    """Torch's own, but that it takes all channels for those of a group in the gradient of a weight."""
    backward = {torch.ops.aten.convolution_backward: _convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=backward)


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: object, **options: object
) -> int:
    """A multiply-add per entry of the kernel for every pixel that it starts from, in both gradients."""
    transposed, wanted = rest[4], rest[7]
    assert isinstance(transposed, bool) and isinstance(wanted, (list, tuple))
    return 2 * math.prod(x if transposed else gradient) * math.prod(weight[1:]) * sum(wanted[:2])


# ---------------------------------------------------------------- the loss


def loss_hessian(loss_fn: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of the whole loss with respect to the flattened outputs, [numel, numel], by double backward."""
    shape = outputs.shape
    leaf = outputs.detach().flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(leaf.view(shape), targets), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
    return torch.stack(rows)


def example_hessians(loss_fn: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Diagonal blocks [N, P, P] of `loss_hessian`, one per example of P output entries."""
    num_examples = outputs.shape[0]
    size = outputs[0].numel()
    whole = loss_hessian(loss_fn, outputs, targets).view(num_examples, size, num_examples, size)
    return torch.stack([whole[n, :, n, :] for n in range(num_examples)])


def hessian_root(loss_fn: nn.Module, outputs: Tensor) -> Tensor:
    """Root S of the Hessian of one un-reduced loss term, [N, C, C], for outputs [N, C].

    Martens & Grosse 2015; mean squared error counts as 1/2 ||f - y||^2 per term.
    """
    num_classes = outputs.shape[1]
    if isinstance(loss_fn, nn.MSELoss):
        return torch.eye(num_classes, dtype=outputs.dtype).expand(len(outputs), -1, -1)
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):
        p = outputs.sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt())
    assert isinstance(loss_fn, nn.CrossEntropyLoss)
    p = outputs.softmax(1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def reduction_factor(loss_fn: nn.Module, outputs: Tensor) -> float:
    """The constant R in loss = R * sum of terms; classes are dimension 1 of a cross-entropy's outputs."""
    scale = 2.0 if isinstance(loss_fn, nn.MSELoss) else 1.0
    if loss_fn.reduction == "sum":
        return scale
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        return scale * outputs.shape[1] / outputs.numel()
    return scale / outputs.numel()


# ---------------------------------------------------------------- dense curvature


def jacobians(outputs: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Derivative of every output entry with respect to each leaf: tensors [numel, *leaf.shape]."""
    rows = [
        torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        for entry in outputs.flatten()
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def ggn_columns(columns: Tensor, hessian: Tensor) -> Tensor:
    """J^T H J for a Jacobian [numel, D] and a loss Hessian [numel, numel]."""
    return columns.T @ hessian @ columns


def weight_ggn(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, weight: str, bias: str | None = None
) -> Tensor:
    """Exact Gauss-Newton block of one weight (rows: dimension 0) with its bias as the last column."""
    outputs = model(inputs)
    names = [weight] if bias is None else [weight, bias]
    parts = jacobians(outputs, [model.get_parameter(name) for name in names])
    joint = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=2)
    return ggn_columns(joint.flatten(1), loss_hessian(loss_fn, outputs, targets))


def parameters_ggn(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, names: Sequence[str]
) -> Tensor:
    """Exact Gauss-Newton matrix over the named parameters, flattened one after the other."""
    outputs = model(inputs)
    parts = jacobians(outputs, [model.get_parameter(name) for name in names])
    joint = torch.cat([part.flatten(1) for part in parts], dim=1)
    return ggn_columns(joint, loss_hessian(loss_fn, outputs, targets))


def kronecker_block(A: Tensor, G: Tensor) -> Tensor:
    """The curvature block that factors [groups, d, d] stand for: the direct sum over groups of G (x) A."""
    return torch.block_diag(*[torch.kron(G[group], A[group]) for group in range(len(A))])


# ---------------------------------------------------------------- rows of a layer


def axis_positions(
    size: int, *, kernel: int, stride: int, left: int, right: int, dilation: int, mode: str
) -> tuple[Tensor, Tensor]:
    """Input index read by (output position, kernel offset) along one axis, and whether it is a real entry."""
    count = (size + left + right - dilation * (kernel - 1) - 1) // stride + 1
    index = torch.arange(count)[:, None] * stride + torch.arange(kernel)[None, :] * dilation - left
    inside = (index >= 0) & (index < size)
    if mode == "zeros":
        return index.clamp(0, size - 1), inside
    if mode == "replicate":
        index = index.clamp(0, size - 1)
    elif mode == "circular":
        index = index % size
    else:
        assert mode == "reflect", mode
        index = index.abs()
        index = torch.where(index >= size, 2 * (size - 1) - index, index)
    return index, torch.ones_like(inside)


def conv_patches(module: nn.Module, x: Tensor) -> Tensor:
    """Patches [N, T, C_in, K] of a convolution, gathered by index; K is row-major in the kernel."""
    index, real = [], []
    for axis, size in enumerate(x.shape[2:]):
        dilation, kernel = module.dilation[axis], module.kernel_size[axis]
        if module.padding == "same":
            left = dilation * (kernel - 1) // 2
            right = dilation * (kernel - 1) - left
        else:
            left = right = 0 if module.padding == "valid" else module.padding[axis]
        one, inside = axis_positions(
            size,
            kernel=kernel,
            stride=module.stride[axis],
            left=left,
            right=right,
            dilation=dilation,
            mode=module.padding_mode,
        )
        index.append(one)
        real.append(inside)
    rank = len(index)
    shapes = []
    for axis, one in enumerate(index):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = one.shape
        shapes.append(shape)
    entries = [one.view(shape) for one, shape in zip(index, shapes, strict=True)]
    masks = [one.view(shape) for one, shape in zip(real, shapes, strict=True)]
    patches = x[(slice(None), slice(None), *entries)] * math.prod(masks[1:], start=masks[0])
    return patches.flatten(2 + rank).flatten(2, 1 + rank).transpose(1, 2)


def append_one(rows: Tensor) -> Tensor:
    """Rows with the constant 1 of the bias as a last entry."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as [N, groups, T, d_in (+1)]."""
    if isinstance(module, CONVOLUTIONS):
        patches = conv_patches(module, x)
        num_examples, positions, _, volume = patches.shape
        grouped = patches.view(num_examples, positions, module.groups, -1, volume)
        rows = grouped.flatten(3).transpose(1, 2)
    elif isinstance(module, nn.Embedding):
        one_hot = nn.functional.one_hot(x, module.num_embeddings).to(module.weight.dtype)
        return one_hot.view(len(x), 1, -1, module.num_embeddings)
    else:
        rows = x.reshape(len(x), 1, -1, x.shape[-1])
    return rows if module.bias is None else append_one(rows)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """A gradient at the layer's output as [N, groups, T, d_out / groups]."""
    if isinstance(module, CONVOLUTIONS):
        return g.flatten(2).view(len(g), module.groups, -1, g[0, 0].numel()).transpose(2, 3)
    return g.reshape(len(g), 1, -1, g.shape[-1])


# ---------------------------------------------------------------- factors from hooks


@dataclass(frozen=True)
class Use:
    """One call of a layer: its module, its input rows and its output, still attached to the graph."""

    module: nn.Module
    rows: Tensor
    output: Tensor


def record_uses(model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, list[Use]]]:
    """Run the model once and keep every call of its linear, convolution and embedding modules."""
    uses: dict[str, list[Use]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)):

            def hook(
                module: nn.Module, args: tuple[Tensor], output: Tensor, key: str = f"{name}.weight"
            ) -> None:
                use = Use(module, input_rows(module, args[0].detach()), output)
                uses.setdefault(key, []).append(use)

            handles.append(module.register_forward_hook(hook))
    outputs = model(inputs)
    for handle in handles:
        handle.remove()
    return outputs, uses


def cotangent_rows(outputs: Tensor, uses: dict[str, list[Use]], seed: Tensor) -> dict[str, Tensor]:
    """Gradients of <outputs, seed> at every layer's output, several calls joined as extra positions."""
    flat = [use for calls in uses.values() for use in calls]
    found = torch.autograd.grad(
        outputs, [use.output for use in flat], seed, retain_graph=True, materialize_grads=True
    )
    rows = iter([output_rows(use.module, g) for use, g in zip(flat, found, strict=True)])
    return {name: torch.cat([next(rows) for _ in calls], dim=2) for name, calls in uses.items()}


def pooled(rows: Tensor, sharing: str, how: Callable[..., Tensor]) -> Tensor:
    """Rows as they are for expand; one row per example, pooled over the positions by `how`, for reduce."""
    return rows if sharing == "expand" else how(rows, dim=2, keepdim=True)


def input_factors(uses: dict[str, list[Use]], sharing: str) -> dict[str, Tensor]:
    """A [groups, d_A, d_A] of every layer: the mean second moment of its input rows."""
    factors = {}
    for name, calls in uses.items():
        rows = pooled(torch.cat([use.rows for use in calls], dim=2), sharing, torch.mean)
        factors[name] = torch.einsum("ngti,ngtj->gij", rows, rows) / (rows.shape[0] * rows.shape[2])
    return factors


def reference_factors(
    model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor, *, fisher: str, sharing: str
) -> Factors:
    """A and G of every layer; type-2 needs no root and no reduction factor: G = sum of J^T H J."""
    outputs, uses = record_uses(model, inputs)
    A = input_factors(uses, sharing)
    if fisher == "empirical":
        (seed,) = torch.autograd.grad(loss_fn(outputs, targets), outputs, retain_graph=True)
        rows = {
            name: pooled(g, sharing, torch.sum) for name, g in cotangent_rows(outputs, uses, seed).items()
        }
        scale = reduction_factor(loss_fn, outputs)
        G = {name: torch.einsum("ngti,ngtj->gij", g, g) / scale for name, g in rows.items()}
        return {name: {"A": A[name], "G": G[name]} for name in uses}
    hessians = example_hessians(loss_fn, outputs, targets)
    unit = torch.eye(math.prod(outputs.shape[1:]), dtype=outputs.dtype)
    passes = [cotangent_rows(outputs, uses, seed.view(outputs[:1].shape).expand_as(outputs)) for seed in unit]
    factors: Factors = {}
    for name in uses:
        J = torch.stack([pooled(one[name], sharing, torch.sum) for one in passes])
        weighted = torch.einsum("npq,qngtj->pngtj", hessians, J)
        factors[name] = {"A": A[name], "G": torch.einsum("pngti,pngtj->gij", J, weighted)}
    return factors
