"""Every reason code for leaving a parameter to the optimizer, one small model each."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kfac_fx
from kfac_fx import Reason


class Extra(nn.Module):
    """A linear layer and one more parameter that `use` brings into the forward pass."""

    def __init__(self, extra: Tensor, use: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.layer, self.extra, self.use = nn.Linear(4, 3), nn.Parameter(extra), use

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.use(x, self.extra))


def reason_of(model: nn.Module, name: str, *, x: Tensor | None = None, **options: object) -> Reason:
    x = torch.randn(5, 4) if x is None else x
    loss_fn = options.pop("loss_fn", F.cross_entropy)
    plan = kfac_fx.inspect(model, loss_fn, x, torch.randint(3, (5,)), **options)  # type: ignore[arg-type]
    assert not any(name in (match.weight, match.bias) for match in plan.matched)
    (skip,) = [skip for skip in plan.skipped if skip.parameter == name]
    assert skip.advice and skip.detail
    return skip.reason


def test_frozen_unused_and_excluded() -> None:
    model = Extra(torch.ones(4), lambda x, extra: x)
    model.layer.bias.requires_grad_(False)
    assert reason_of(model, "layer.bias") is Reason.FROZEN
    assert reason_of(model, "extra") is Reason.UNUSED
    assert reason_of(model, "layer.weight", exclude=["layer.w*"]) is Reason.EXCLUDED


def test_reparametrised_by_a_mask_a_norm_or_another_parameter() -> None:
    masked = Extra(torch.ones(4, 4), lambda x, w: F.linear(x, w * torch.ones(4, 4).tril()))
    assert reason_of(masked, "extra") is Reason.REPARAMETRISED
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    assert reason_of(normed, "0.parametrizations.weight.original1") is Reason.REPARAMETRISED
    product = Extra(torch.ones(4, 4), lambda x, w: F.linear(x, w @ w))
    assert reason_of(product, "extra") is Reason.REPARAMETRISED


class Read(nn.Module):
    """A weight that another parameter scales or shifts before the layer reads it."""

    def __init__(self, rows: int, combine: Callable[[Tensor, Tensor], Tensor], *, lookup: bool) -> None:
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.randn(rows, 4)), nn.Parameter(torch.randn(4))
        self.combine, self.lookup = combine, lookup
        self.head = nn.Linear(8 if lookup else rows, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.combine(self.weight, self.extra)
        return self.head(F.embedding(x, weight).flatten(1) if self.lookup else F.linear(x, weight))


@pytest.mark.parametrize("rows", [7, 10])  # 10: as many rows as two batches have examples
@pytest.mark.parametrize("combine", [torch.mul, torch.add])
@pytest.mark.parametrize("lookup", [True, False])
def test_reparametrised_when_it_is_broadcast_over_another_parameter(
    rows: int, combine: Callable[[Tensor, Tensor], Tensor], lookup: bool
) -> None:
    """The sum in its gradient runs over rows of a table, not over examples."""
    model = Read(rows, combine, lookup=lookup)
    x = torch.randint(rows, (5, 2)) if lookup else torch.randn(5, 4)
    assert reason_of(model, "extra", x=x) is Reason.REPARAMETRISED
    plan = kfac_fx.inspect(model, F.cross_entropy, x, torch.randint(3, (5,)))
    (detail,) = [skip.detail for skip in plan.skipped if skip.parameter == "extra"]
    assert f"aten.{combine.__name__}.Tensor at test_reasons.py:{line_of(Read, 'self.combine(')}" in detail


def line_of(kind: type, code: str) -> int:
    """Number of the line of the class that holds the code."""
    lines, first = inspect.getsourcelines(kind)
    return first + next(i for i, line in enumerate(lines) if code in line)


def test_shifts_that_are_added_to_each_other_before_the_batch_are_matched() -> None:
    model = Extra(torch.randn(4), lambda x, extra: x + (extra + model.other))
    model.other = nn.Parameter(torch.randn(4))
    plan = kfac_fx.inspect(model, F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)))
    assert {"extra", "other"} <= {match.weight for match in plan.matched}


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm((2, 4)), (5, 3, 2, 4)),
        (nn.BatchNorm2d(3), (5, 3, 2, 4)),
        (nn.GroupNorm(1, 3), (5, 3, 2, 4)),
    ],
)
def test_the_shift_of_a_norm_whose_scale_is_frozen_has_its_own_blocks(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    norm.weight.requires_grad_(False)
    model, x, y = nn.Sequential(norm, nn.Flatten(), nn.Tanh(), nn.Linear(24, 3)), torch.randn(shape), Y
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y)
    assert [(match.weight, match.kind) for match in plan.matched] == [
        ("0.bias", "shift"),
        ("3.weight", "linear"),
    ]
    method = kfac_fx.KFAC(decay=0.0)
    step = kfac_fx.compile(
        model, F.cross_entropy, method=method, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
    )
    step(x, y)
    found = step.state_dict()["curvature"]["0.bias"]["F"]
    bias = norm.get_parameter("bias").detach()
    copies = bias.expand(5, *bias.shape).clone().requires_grad_()  # one per example
    with torch.no_grad():
        normal = norm(x) - spread(bias, norm)
    loss = F.cross_entropy(model[1:](normal + torch.stack([spread(b, norm) for b in copies])), y)
    (g,) = torch.autograd.grad(loss, copies)
    torch.testing.assert_close(found.flatten(), (g.flatten(1) ** 2).sum(0) * 5)


Y = torch.tensor([0, 1, 2, 1, 0])


def spread(bias: Tensor, norm: nn.Module) -> Tensor:
    """As it is added to one example."""
    return bias.unsqueeze(0) if isinstance(norm, nn.LayerNorm) else bias.reshape(-1, 1, 1)


def test_batch_free_when_the_input_is_the_same_for_all_examples() -> None:
    table = torch.randn(7, 4)
    model = Extra(torch.ones(4, 4), lambda x, w: x + F.linear(table, w).tanh().sum(0))
    assert reason_of(model, "extra") is Reason.BATCH_FREE


def test_mixed_use_of_a_product_and_something_else() -> None:
    model = Extra(torch.ones(4, 4), lambda x, w: F.linear(x, w) * w.sum().sin())
    assert reason_of(model, "extra") is Reason.MIXED_USE
    plan = kfac_fx.inspect(model, F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)))
    (detail,) = [skip.detail for skip in plan.skipped if skip.parameter == "extra"]
    line = line_of(Extra, "self.layer(self.use(")
    assert detail == f"1 of 2 uses match, another does not: aten.sum.default at test_reasons.py:{line}"


def test_tied_uses_that_do_not_add_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Conv1d(2, 4, 2, bias=False)
            self.first.weight = nn.Parameter(torch.randn(4, 2, 2))
            self.second.weight = self.first.weight
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.first.weight.permute(0, 2, 1).reshape(4, 4))
            return self.head(self.second(torch.stack([h, x], 1)).flatten(1))

    assert reason_of(Tied(), "first.weight") is Reason.TIED


def test_outside_the_fisher_when_the_target_depends_on_it_and_the_prediction_does_not() -> None:
    model = Extra(torch.ones(3), lambda x, extra: x)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, model.extra.expand(5, 3))

    assert reason_of(model, "extra", loss_fn=loss_fn, fisher="mc") is Reason.OUTSIDE_FISHER


def test_embedding_scaled_by_frequency() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3))
    assert reason_of(model, "0.weight", x=torch.randint(6, (5, 2))) is Reason.EMBEDDING


def test_too_large_for_the_methods_limit() -> None:
    model = nn.Linear(4, 3)
    assert reason_of(model, "weight", method=kfac_fx.KFAC(max_factor_dim=3)) is Reason.TOO_LARGE


def test_complex_parameters() -> None:
    model = Extra(torch.ones(4, dtype=torch.complex64), lambda x, extra: (x * extra).abs())
    assert reason_of(model, "extra") is Reason.COMPLEX_DTYPE


def test_no_pattern_names_the_operation() -> None:
    model = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 3))
    assert reason_of(model, "0.weight", x=torch.randint(6, (5, 2))) is Reason.NO_PATTERN


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_advice(reason: Reason) -> None:
    assert len(reason.advice) > 20
