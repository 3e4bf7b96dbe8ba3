"""Losses that are a sum of several calls: every layer is matched, with the curvature of the sum.

The reference knows neither losses nor passes: G = sum of J^T H J over the joined outputs of all heads, with H
the Hessian of the WHOLE loss by double backward. Draws are repeated by hand from the same seed.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import report
from kfac_fx.canonical import initial_state
from kfac_fx.errors import Reason
from kfac_fx.functions import statistics_function, use_nodes
from kfac_fx.planned import Plan
from kfac_fx.report.document import SCHEMA_FILE
from kfac_fx.types import Fisher, Sharing
from tests.helpers import batch_factors
from tests.oracles import record_uses, reference_factors, relative_error, weight_ggn

N = 6
LABELS, OTHERS = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([1, 0, 0, 1, 1, 0])
VALUES = torch.arange(2.0 * N).reshape(N, 2).double().sin()
TOLERANCE = 1e-9
SCHEMA = json.loads(SCHEMA_FILE.read_text())


class Trunk(nn.Module):
    """Two heads, of 3 classes and of 2 values, behind one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.left(hidden), self.right(hidden)


class Towers(nn.Module):
    """Two networks that share nothing but the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.right = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


class Siamese(nn.Module):
    """One weight in both branches: each use is reached from one head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        return self.left(torch.tanh(self.shared(first))), self.right(torch.sigmoid(self.shared(second)))


class SameInput(nn.Module):
    """One weight applied twice to one tensor, once for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(torch.tanh(self.shared(x))), self.right(torch.sigmoid(self.shared(x)))


class Joined(nn.Module):
    """All heads as one output, for the reference; names of layers stay those of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self._modules = model._modules

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.__dict__["model"](x), 1)


Outputs, Targets = tuple[Tensor, Tensor], tuple[Tensor, ...]


def weighted(outputs: Outputs, targets: Targets) -> Tensor:
    return F.cross_entropy(outputs[0], targets[0]) + 0.3 * F.mse_loss(outputs[1], targets[2])


def reversed_order(outputs: Outputs, targets: Targets) -> Tensor:
    return 0.3 * F.mse_loss(outputs[1], targets[2]) + F.cross_entropy(outputs[0], targets[0])


def both_classes(outputs: Outputs, targets: Targets) -> Tensor:
    return F.cross_entropy(outputs[0], targets[0]) + F.cross_entropy(outputs[1], targets[1])


def sums(outputs: Outputs, targets: Targets) -> Tensor:
    left = F.cross_entropy(outputs[0], targets[0], reduction="sum")
    return 2 * left + F.mse_loss(outputs[1], targets[2], reduction="sum")


def one_prediction_twice(outputs: Outputs, targets: Targets) -> Tensor:
    """The Hessians of losses of one prediction add."""
    left = F.cross_entropy(outputs[0], targets[0]) + 0.2 * F.mse_loss(outputs[0], outputs[0].detach().cos())
    return left + F.binary_cross_entropy_with_logits(
        outputs[1], targets[1].unsqueeze(1).expand(-1, 2).double()
    )


def without_the_second(outputs: Outputs, targets: Targets) -> Tensor:
    return F.cross_entropy(outputs[0], targets[0]) + 0.0 * F.mse_loss(outputs[1], targets[2])


Loss = Callable[[Outputs, Targets], Tensor]
LOSSES: dict[str, tuple[Loss, str]] = {
    "weighted": (weighted, "cross_entropy (mean) + mse (mean)"),
    "reversed order": (reversed_order, "mse (mean) + cross_entropy (mean)"),
    "two cross-entropies": (both_classes, "2 x cross_entropy (mean)"),
    "sums": (sums, "cross_entropy (sum) + mse (sum)"),
    "one prediction twice": (one_prediction_twice, "cross_entropy (mean) + mse (mean) + bce (mean)"),
    "weight zero": (without_the_second, "cross_entropy (mean) + mse (mean)"),
}
MODELS: dict[str, type[nn.Module]] = {
    "trunk": Trunk,
    "towers": Towers,
    "siamese": Siamese,
    "same input": SameInput,
}


def data(copies: int = 1) -> tuple[Tensor, Targets]:
    x = torch.linspace(-1, 1, 4 * N, dtype=torch.float64).reshape(N, 4).mul(7).sin()
    return x.repeat(copies, 1), (LABELS.repeat(copies), OTHERS.repeat(copies), VALUES.repeat(copies, 1))


def on_joined(loss_fn: Loss) -> Callable[[Tensor, Any], Tensor]:
    return lambda outputs, targets: loss_fn((outputs[:, :3], outputs[:, 3:]), targets)


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


@functools.cache
def planned(name: str, loss: str, fisher: Fisher, sharing: Sharing = "expand", copies: int = 1) -> Plan:
    return kfac_fx.inspect(model_of(name), LOSSES[loss][0], *data(copies), fisher=fisher, sharing=sharing)


@functools.cache
def exact(name: str, loss: str, sharing: str = "expand") -> dict[str, dict[str, Tensor]]:
    x, targets = data()
    model, loss_fn = Joined(model_of(name)), on_joined(LOSSES[loss][0])
    return reference_factors(model, loss_fn, x, targets, fisher="type2", sharing=sharing)  # type: ignore[arg-type]


def statistics(plan: Plan, model: nn.Module, *, copies: int = 1) -> dict[str, dict[str, Tensor]]:
    """The batch's statistics of every layer, from the captured graph run node by node."""
    x, targets = data(copies)
    interpreter = torch.fx.Interpreter(plan.capture.graph, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*model.parameters(), x, *targets)
        results = {}
        for match in plan.matched:
            names = plan.method.statistics_names(match)
            nodes = [*use_nodes(match), plan.capture.inverse_scale]
            state = initial_state(plan, match).values()
            values = [interpreter.env[node] for node in nodes]
            results[match.key] = statistics_function(plan, match, names)(*values, *state)
    return results


@pytest.mark.parametrize(
    ("name", "loss", "sharing"),
    [
        *(("trunk", loss, "expand") for loss in LOSSES if loss != "weight zero"),
        *((name, "weighted", "expand") for name in ("towers", "siamese", "same input")),
        ("siamese", "weighted", "reduce"),
    ],
)
def test_type_2_factors_are_those_of_the_whole_loss_at_all_heads(name: str, loss: str, sharing: str) -> None:
    expected = exact(name, loss, sharing)
    factors = statistics(planned(name, loss, "type2", sharing), model_of(name))
    for key, reference in expected.items():
        for side in ("A", "G"):
            assert relative_error(factors[key][side], reference[side]) < TOLERANCE, (key, side)


@pytest.mark.parametrize("name", ["trunk", "siamese"])
def test_type_2_squares_are_the_diagonal_of_the_exact_gauss_newton_matrix(name: str) -> None:
    """Gradients of an example are added over its uses within a pass: not reached there means zero."""
    model, (x, targets) = model_of(name), data()
    plan = dataclasses.replace(planned(name, "weighted", "type2"), method=kfac_fx.Diagonal())
    after = statistics(plan, model)
    names = dict(model.named_parameters())
    for key, state in after.items():
        bias = key.replace("weight", "bias")
        exact_block = weight_ggn(Joined(model), on_joined(weighted), x, targets, key, bias)  # type: ignore[arg-type]
        size = names[key].shape
        diagonal = exact_block.diagonal().reshape(size[0], size[1] + 1)
        assert relative_error(state["S"][0], diagonal) < TOLERANCE, key


@pytest.mark.parametrize("name", ["trunk", "towers"])
def test_one_drawn_pass_has_samples_for_every_prediction(name: str) -> None:
    """The same draws by hand: labels for the first head, then values for the second; terms weigh R_."""
    model, (x, _) = model_of(name), data()
    torch.manual_seed(7)
    factors = statistics(planned(name, "weighted", "mc"), model)
    outputs, uses = record_uses(Joined(model), x)
    left, right = outputs[:, :3], outputs[:, 3:]
    torch.manual_seed(7)
    labels = torch.multinomial(left.softmax(1).detach(), 1)[:, 0]
    values = right.detach() - torch.randn_like(right)
    ours, other = 1 / N, 0.3 * 2 / (2 * N)
    drawn = ours**0.5 * F.cross_entropy(left, labels, reduction="sum")
    drawn = drawn + other**0.5 * 0.5 * (right - values).square().sum()
    for key, calls in uses.items():
        rows = torch.cat(torch.autograd.grad(drawn, [use.output for use in calls], retain_graph=True))
        assert relative_error(factors[key]["G"][0], rows.T @ rows) < TOLERANCE, key


def test_draws_average_to_the_exact_factors_of_body_and_heads() -> None:
    """Each example 3000 times in one batch, so that it holds as many draws."""
    plan = planned("trunk", "one prediction twice", "mc", copies=3000)
    factors = statistics(plan, model_of("trunk"), copies=3000)
    for key, reference in exact("trunk", "one prediction twice").items():
        assert 1e-6 < relative_error(factors[key]["G"], reference["G"]) < 0.05, key


def test_a_compiled_step_has_these_factors() -> None:
    x, targets = data()
    model, expected = model_of("siamese"), exact("siamese", "weighted")
    factors = batch_factors(model, weighted, x, targets, fisher="type2", sharing="expand")  # type: ignore[arg-type]
    for key, reference in expected.items():
        assert relative_error(factors[key]["G"], reference["G"]) < TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_matched_and_has_the_passes_that_reach_it(name: str) -> None:
    plan = planned(name, "weighted", "type2")
    passes = {match.name: match.num_passes for match in plan.matched}
    assert not plan.skipped
    if name == "towers":
        assert passes == {"left.0": 3, "left.2": 3, "right.0": 2, "right.1": 2, "right.2": 2}
    else:
        assert passes.pop("left") == 3 and passes.pop("right") == 2 and set(passes.values()) == {5}


@pytest.mark.parametrize("name", ["trunk", "towers"])
def test_every_parameter_is_matched_by_one_drawn_pass(name: str) -> None:
    plan = planned(name, "weighted", "mc")
    assert not plan.skipped and {match.num_passes for match in plan.matched} == {1}


@pytest.mark.parametrize("name", ["siamese", "same input"])
def test_verify_knows_uses_that_a_pass_does_not_reach(name: str) -> None:
    found = kfac_fx.verify(copy.deepcopy(model_of(name)), weighted, *data(), fisher="type2")
    assert found.ok, str(found)
    assert "the loss is a sum of several: cross_entropy (mean) + mse (mean)" in str(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_line_names_every_loss(loss: str) -> None:
    info = planned("trunk", loss, "type2").capture.loss_info
    assert info.note == f"{LOSSES[loss][1]}, 6 examples x 1 term"
    assert info.kind == ("cross_entropy" if loss == "two cross-entropies" else "several")


def test_text_and_json_of_a_plan_name_every_loss() -> None:
    plan = planned("trunk", "weighted", "mc")
    assert "loss     cross_entropy (mean) + mse (mean), 6 examples x 1 term\n" in str(plan)
    document = json.loads(report.to_json(plan))
    jsonschema.validate(document, SCHEMA)
    assert document["loss"]["note"] == "cross_entropy (mean) + mse (mean), 6 examples x 1 term"


def test_losses_with_different_numbers_of_terms_are_named_with_theirs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.whole = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.token(x).mT, self.whole(x.mean(1))

    x, labels = torch.randn(N, 5, 4, dtype=torch.float64), torch.randint(3, (N, 5))
    plan = kfac_fx.inspect(Tokens().double(), weighted, x, (labels, OTHERS, VALUES))
    info = plan.capture.loss_info
    assert info.note == "cross_entropy (mean, 5 terms) + mse (mean, 1 term), 6 examples"
    swapped = kfac_fx.inspect(Tokens().double(), reversed_order, x, (labels, OTHERS, VALUES))
    assert swapped.capture.loss_info.ignores == info.ignores
    assert (swapped.capture.loss_info.terms, info.terms) == (5, 5)


def test_a_loss_of_weight_zero_adds_nothing() -> None:
    factors = statistics(planned("trunk", "weight zero", "type2"), model_of("trunk"))
    expected = exact("trunk", "weight zero")
    assert not factors["right.weight"]["G"].any()
    for key in ("body.weight", "left.weight"):
        assert relative_error(factors[key]["G"], expected[key]["G"]) < TOLERANCE, key


def test_what_no_prediction_depends_on_is_skipped_with_that_reason() -> None:
    """A head that makes the target of a loss, and a head without a loss."""

    class Teacher(Trunk):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.idle = nn.Linear(4, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (*super().forward(x), self.teacher(x), self.idle(torch.tanh(self.body(x))))

    def loss_fn(outputs: tuple[Tensor, ...], targets: Targets) -> Tensor:
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], outputs[2])

    plan = kfac_fx.inspect(Teacher().double(), loss_fn, *data(), fisher="type2")
    assert [match.name for match in plan.matched] == ["body", "left", "right"]
    reasons = {skip.parameter: (skip.reason, skip.detail) for skip in plan.skipped}
    outside = (Reason.OUTSIDE_FISHER, "no gradient from any prediction of the losses")
    unused = (Reason.UNUSED, "it received no gradient")
    assert reasons == {
        "teacher.weight": outside,
        "teacher.bias": outside,
        "idle.weight": unused,
        "idle.bias": unused,
    }
