"""The universal property on every model of the zoo: gradient = product of the `a` and `g` that were matched.

Each model is captured once, in float64, on one batch and one set of parameters. Everything is then evaluated
on OTHER parameters and ANOTHER batch of the same shapes, against plain autograd: a constant baked in while
tracing fails.
"""

import copy
import functools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
import kfac_fx.check
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch
from tests import zoo

TOLERANCE = 1e-10
# These models cast to float32 inside whatever the model's type is, so both sides carry float32 rounding.
FLOAT32_INSIDE = {"mamba": 1e-6}
# A gradient that is zero in theory (the key's bias under softmax) is rounding noise: its error is measured
# against this share of the norm of all gradients.
SMALL = 1e-4


@functools.cache
def example_of(name: str) -> zoo.Example:
    return zoo.to(zoo.MODELS[name](), torch.float64)


@functools.cache
def plan_of(name: str) -> Plan:
    example = example_of(name)
    return kfac_fx.inspect(example.model, example.loss_fn, example.inputs, example.targets)


def tensors_of(example: zoo.Example) -> list[Tensor]:
    """The batch's tensors in the order of the captured graph: inputs (a dict by insertion), then targets."""
    values = example.inputs
    inputs = list(values.values()) if isinstance(values, dict) else values
    flat = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return flat if example.targets is None else [*flat, example.targets]


def another(tensor: Tensor) -> Tensor:
    """Other values: floats drawn anew, tokens and labels from those present, masks from other rows."""
    if tensor.is_floating_point():
        return torch.randn_like(tensor)
    if tensor.dtype is torch.bool or tensor.max() <= 1:
        return tensor.roll(1, 0)
    return tensor.flatten()[torch.randint(tensor.numel(), (tensor.numel(),))].view_as(tensor)


def elsewhere(example: zoo.Example) -> zoo.Example:
    """The same model at other parameters with another batch of the same shapes."""
    model = copy.deepcopy(example.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = example.inputs
    if isinstance(inputs, dict):
        inputs = {key: another(value) for key, value in inputs.items()}
    else:
        inputs = another(inputs) if isinstance(inputs, Tensor) else tuple(another(value) for value in inputs)
    targets = None if example.targets is None else another(example.targets)
    return zoo.Example(model, example.loss_fn, inputs, targets)


def arguments_of(example: zoo.Example) -> list[Tensor]:
    """What the captured graph reads; buffers are copies, since running statistics are updated in place."""
    parameters = [parameter.detach() for parameter in example.model.parameters()]
    buffers = [buffer.clone() for buffer in example.model.buffers()]
    return [*parameters, *buffers, *tensors_of(example)]


def gradients_of(example: zoo.Example) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of plain PyTorch, on a copy."""
    example = zoo.Example(copy.deepcopy(example.model), example.loss_fn, example.inputs, example.targets)
    loss = zoo.loss(example)
    named = {name: p for name, p in example.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def covered(match: LayerMatch, gradients: dict[str, Tensor]) -> Tensor:
    """Sorted entries of the gradients that a match claims: canonical form may only rearrange them."""
    rows = slice(None) if match.part is None else slice(*match.part)
    names = [name for name in (match.weight, match.bias) if name is not None]
    return torch.cat([gradients[name][rows].flatten() for name in names]).sort().values


def float32_nodes(plan: Plan) -> list[torch.fx.Node]:
    """Nodes of float32 that depend on the batch."""
    values = ((node, node.meta.get("val")) for node in plan.capture.data)
    return [node for node, val in values if isinstance(val, Tensor) and val.dtype is torch.float32]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_match_reproduces_autograds_gradient_from_its_a_and_g(name: str) -> None:
    plan = plan_of(name)
    tolerance = FLOAT32_INSIDE.get(name, TOLERANCE)
    if name in FLOAT32_INSIDE:
        assert float32_nodes(plan), f"{name} computes in float64 throughout: it must meet {TOLERANCE}"
    example = elsewhere(example_of(name))
    loss, gradients = gradients_of(example)
    assert torch.isfinite(loss)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert total > 0

    def error(value: Tensor, reference: Tensor) -> float:
        assert value.shape == reference.shape
        return float((value - reference).norm() / torch.maximum(reference.norm(), SMALL * total))

    captured = plan.capture.graph(*arguments_of(example))
    assert error(captured[0], loss) <= tolerance
    assert set(plan.capture.gradients) == set(gradients)
    for key, value in zip(plan.capture.gradients, captured[1:], strict=True):
        assert error(value, gradients[key]) <= tolerance, key

    pairs = kfac_fx.check.gradient_pairs(plan)(*arguments_of(example))
    assert len(pairs) == 2 * len(plan.matched)
    for match, autograd, product in zip(plan.matched, pairs[::2], pairs[1::2], strict=True):
        assert error(product, autograd) <= tolerance, match.name
        assert error(autograd.flatten().sort().values, covered(match, gradients)) <= tolerance, match.name


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_parameter_is_accounted_for_exactly_once(name: str) -> None:
    plan, model = plan_of(name), example_of(name).model
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    roles = Counter({(match.weight, match.part): 0 for match in plan.matched})
    roles.update((match.weight, match.part) for match in plan.matched)
    roles.update((match.bias, match.part) for match in plan.matched if match.bias is not None)
    roles.update((skip.parameter, None) for skip in plan.skipped)
    assert set(roles.values()) <= {1}
    assert {parameter for parameter, _ in roles} == set(sizes)
    for parameter in sizes:
        parts = sorted(part for other, part in roles if other == parameter and part is not None)
        whole = (parameter, None) in roles
        assert whole != bool(parts), f"{parameter} is accounted for both as a whole and in parts"
        assert all(first[1] <= second[0] for first, second in zip(parts, parts[1:], strict=False))
    matched = sum(match.numel for match in plan.matched)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert plan.coverage == pytest.approx(matched / sum(sizes[key] for key in trainable))
    assert matched + sum(skip.numel for skip in plan.skipped) == sum(sizes.values())
    assert all(skip.detail and skip.advice for skip in plan.skipped)


def test_inspecting_changes_nothing_of_the_model() -> None:
    for name in ("batch_norm_network", "frozen_backbone", "gpt"):
        example = zoo.to(zoo.MODELS[name](), torch.float64)
        before = {key: value.clone() for key, value in example.model.state_dict().items()}
        modes = [module.training for module in example.model.modules()]
        kfac_fx.inspect(example.model, example.loss_fn, example.inputs, example.targets)
        after = example.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert modes == [module.training for module in example.model.modules()]
        assert all(parameter.grad is None for parameter in example.model.parameters())


def test_the_mean_share_of_matched_elements_is_at_least_97_percent() -> None:
    shares = {name: plan_of(name).coverage for name in zoo.MODELS}
    assert len(shares) >= 25
    assert sum(shares.values()) / len(shares) >= 0.97
    assert min(shares.values()) >= 0.9, min(shares, key=shares.__getitem__)


def test_a_wrong_match_would_be_noticed() -> None:
    """Negative control: the property fails when `g` belongs to another batch than `a`."""
    example, plan = example_of("mlp"), plan_of("mlp")
    assert isinstance(example.model, nn.Sequential)
    pairs = kfac_fx.check.gradient_pairs(plan)
    one, other = pairs(*arguments_of(example)), pairs(*arguments_of(elsewhere(example)))
    for autograd, product in zip(one[::2], other[1::2], strict=True):
        assert (autograd - product).norm() > 1e-3 * autograd.norm()
