"""R_ and the Fisher's seeds of every known loss, against Hessians of the loss by double backward.

The reference needs no table of losses: G = sum of J^T H J, with H the Hessian of the WHOLE loss with respect
to the outputs and J the Jacobian of the outputs with respect to a layer's output.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.helpers import batch_factors
from tests.oracles import loss_hessian, record_uses, reference_factors, relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

Loss = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-10
N, C = 6, 3
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
SOFT = torch.softmax(torch.arange(float(N * C)).view(N, C).double().sin(), 1)
BITS = (torch.arange(N * C).view(N, C) % 2).double()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double()


def inputs() -> Tensor:
    return torch.randn(N, 4, dtype=torch.float64)


def manual_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").mean()


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    mask = (targets != 1).to(outputs.dtype)
    return (F.cross_entropy(outputs, targets, reduction="none") * mask).sum() / mask.sum()


def weighted_by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    importance = torch.linspace(0.2, 1.5, len(targets), dtype=outputs.dtype)
    return (F.cross_entropy(outputs, targets, reduction="none") * importance).mean()


# R_ is the factor between the loss and the sum of its terms -log p(y|f) (1/2 |f - y|^2 for squared error).
CASES: dict[str, tuple[Loss, Tensor, float]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS, 1 / N),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS, 1.0),
    "ignored labels": (nn.CrossEntropyLoss(ignore_index=2), LABELS, 1 / 4),
    "ignored labels, sum": (nn.CrossEntropyLoss(ignore_index=2, reduction="sum"), LABELS, 1.0),
    "default ignore index": (nn.CrossEntropyLoss(), LABELS.where(LABELS != 0, -100), 1 / 4),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS, 1 / float(WEIGHTS[LABELS].sum())),
    "class weights, sum": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), LABELS, 1.0),
    "class weights and ignored labels": (
        nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1),
        LABELS,
        1 / float(WEIGHTS[LABELS[LABELS != 1]].sum()),
    ),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS, 1 / N),
    "label smoothing and class weights": (
        nn.CrossEntropyLoss(label_smoothing=0.2, weight=WEIGHTS),
        LABELS,
        1 / float(WEIGHTS[LABELS].sum()),
    ),
    "soft targets": (nn.CrossEntropyLoss(), SOFT, 1 / N),
    "soft targets and class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), SOFT, 1 / N),
    "none, then mean": (manual_mean, LABELS, 1 / N),
    "none, then a masked mean": (masked_mean, LABELS, 1 / 4),
    "negative log-likelihood of log-softmax": (
        lambda f, y: F.nll_loss(F.log_softmax(f, 1), y),
        LABELS,
        1 / N,
    ),
    "squared error": (nn.MSELoss(), BITS, 2 / (N * C)),
    "squared error, sum": (nn.MSELoss(reduction="sum"), BITS, 2.0),
    "squared error, none, then mean": (
        lambda f, y: F.mse_loss(f, y, reduction="none").mean(),
        BITS,
        2 / (N * C),
    ),
    "half the squared error": (lambda f, y: 0.5 * F.mse_loss(f, y), BITS, 1 / (N * C)),
    "binary cross-entropy": (nn.BCEWithLogitsLoss(), BITS, 1 / (N * C)),
    "binary cross-entropy, sum": (nn.BCEWithLogitsLoss(reduction="sum"), BITS, 1.0),
}
# Terms of unequal weight or of more than one kind have no single R_; their curvature is still defined.
WEIGHTED: dict[str, tuple[Loss, Tensor]] = {
    "weighted by hand": (weighted_by_hand, LABELS),
    "positive weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), BITS),
    "positive weight, sum": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="sum"), BITS),
    "element weights": (nn.BCEWithLogitsLoss(weight=WEIGHTS), BITS),
    "scaled": (lambda f, y: 3.0 * F.cross_entropy(f, y), LABELS),
    "scaled by a tensor of the batch": (lambda f, y: F.cross_entropy(f, y) * y.double().mean(), LABELS),
    "two losses on two heads": (
        lambda f, y: F.cross_entropy(f[:, :2], y.clamp(max=1)) + 0.3 * F.mse_loss(f[:, 2:], BITS[:, :1]),
        LABELS,
    ),
    "mean of two cross-entropies": (
        lambda f, y: (F.cross_entropy(f, y) + F.cross_entropy(-f, y.flip(0))) / 2,
        LABELS,
    ),
}
ALL: dict[str, tuple[Loss, Tensor]] = {**{k: v[:2] for k, v in CASES.items()}, **WEIGHTED}


@pytest.mark.parametrize("case", ALL)
def test_the_type_2_factors_equal_those_of_the_exact_hessian(case: str) -> None:
    loss_fn, targets = ALL[case]
    model, x = net(), inputs()
    expected = reference_factors(model, loss_fn, x, targets, fisher="type2", sharing="expand")
    found = batch_factors(model, loss_fn, x, targets, fisher="type2", sharing="expand")
    for name in expected:
        assert relative_error(found[name]["G"], expected[name]["G"]) < TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_the_empirical_factor_is_normalised_by_r(case: str) -> None:
    """G = R_ sum g g^T with g the gradient of one un-reduced term: the ordinary gradients over R_."""
    loss_fn, targets, scale = CASES[case]
    model, x = net(), inputs()
    outputs, uses = record_uses(model, x)
    (g,) = torch.autograd.grad(loss_fn(outputs, targets), uses["2.weight"][0].output)
    found = batch_factors(model, loss_fn, x, targets, fisher="empirical", sharing="expand")
    assert relative_error(found["2.weight"]["G"][0], g.T @ g / scale) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_plan_states_the_kind_and_reduction_of_the_loss(case: str) -> None:
    loss_fn, targets, scale = CASES[case]
    plan = kfac_fx.inspect(net(), loss_fn, inputs(), targets)
    kind = {"squ": "mse", "hal": "mse", "bin": "bce"}.get(case[:3], "cross_entropy")
    assert plan.capture.loss_info.kind == kind
    assert plan.capture.loss_info.examples == N
    if "sum" in case:
        assert plan.capture.loss_info.reduction == "sum"


@pytest.mark.parametrize(
    "case", ["ignored labels", "class weights", "none, then a masked mean", "positive weight"]
)
def test_sampled_labels_average_to_the_exact_factor(case: str) -> None:
    """Each example repeated, so that one batch holds many draws: their mean is within Monte Carlo error."""
    loss_fn, targets = ALL[case]
    copies = 3000
    model, x = nn.Linear(4, C).double(), inputs()
    x_many, y_many = x.repeat(copies, 1), targets.repeat(copies, *[1] * (targets.dim() - 1))
    exact = batch_factors(model, loss_fn, x, targets, fisher="type2", sharing="expand")["weight"]["G"]
    drawn = batch_factors(model, loss_fn, x_many, y_many, fisher="mc", sharing="expand")["weight"]["G"]
    assert 1e-6 < relative_error(drawn, exact) < 0.05


class Positions(nn.Module):
    """A prediction for every position; classes are dimension 1, as torch's cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).movedim(-1, 1)


IGNORED = torch.tensor([[0, 1, -100, -100], [2, -100, 1, 0], [1, 1, 2, 0]])


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_ignored_positions_of_a_sequence_weigh_nothing_in_g(fisher: str) -> None:
    model, x = Positions().double(), torch.randn(3, 4, 4, dtype=torch.float64)
    found = batch_factors(model, F.cross_entropy, x, IGNORED, fisher=fisher, sharing="expand")["layer.weight"]
    kept = IGNORED.flatten() != -100
    logits = model.layer(x).flatten(0, 1)[kept].detach()
    if fisher == "empirical":
        p = logits.softmax(1) - F.one_hot(IGNORED.flatten()[kept], C)
        expected = p.T @ p / kept.sum()
    else:
        p = logits.softmax(1)
        expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert relative_error(found["G"][0], expected) < TOLERANCE


def test_ignored_positions_of_a_sequence_do_not_enter_a() -> None:
    """A row whose term is ignored is masked; the mean runs over the kept terms alone (padding is no data)."""
    model, x = Positions().double(), torch.randn(3, 4, 4, dtype=torch.float64)
    kept = IGNORED.flatten() != -100
    x.flatten(0, 1)[~kept] = 50.0
    found = batch_factors(model, F.cross_entropy, x, IGNORED, fisher="type2", sharing="expand")[
        "layer.weight"
    ]
    rows = x.flatten(0, 1)[kept]
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    assert relative_error(found["A"][0], rows.T @ rows / len(rows)) < TOLERANCE


def test_class_positions_of_an_image_are_terms_of_their_own() -> None:
    model, x = nn.Conv2d(2, C, 1).double(), torch.randn(2, 2, 3, 2, dtype=torch.float64)
    y = torch.randint(C, (2, 3, 2))
    found = batch_factors(model, F.cross_entropy, x, y, fisher="type2", sharing="expand")["weight"]
    outputs = model(x).detach()
    hessian = loss_hessian(F.cross_entropy, outputs, y).view(2, C, 6, 2, C, 6)
    assert relative_error(found["G"][0], torch.einsum("ncpndp->cd", hessian)) < TOLERANCE
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y)
    assert (plan.capture.loss_info.examples, plan.capture.loss_info.terms) == (2, 6)


class TwoHeads(nn.Module):
    """A shared body; each head has a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return torch.cat([self.left(hidden), self.right(hidden)], 1)


def two_heads_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    left = F.cross_entropy(outputs[:, :3], targets)
    return (left + F.cross_entropy(outputs[:, 3:], targets.clamp(max=1))) / 2


@pytest.mark.parametrize("fisher", ["type2", "mc"])
def test_two_heads_add_their_curvature_in_the_body_and_keep_their_own(fisher: str) -> None:
    model, copies = TwoHeads().double(), 1 if fisher == "type2" else 3000
    x = inputs()
    expected = reference_factors(model, two_heads_loss, x, LABELS, fisher="type2", sharing="expand")
    found = batch_factors(
        model, two_heads_loss, x.repeat(copies, 1), LABELS.repeat(copies), fisher=fisher, sharing="expand"
    )
    for name in expected:
        assert relative_error(found[name]["G"], expected[name]["G"]) < (
            TOLERANCE if fisher == "type2" else 0.05
        )


def test_a_loss_computed_for_display_only_does_not_count() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        F.mse_loss(outputs, torch.zeros_like(outputs))
        return F.cross_entropy(outputs, targets)

    model, x = net(), inputs()
    expected = batch_factors(model, F.cross_entropy, x, LABELS, fisher="type2", sharing="expand")
    found = batch_factors(model, loss_fn, x, LABELS, fisher="type2", sharing="expand")
    assert relative_error(found["0.weight"]["G"], expected["0.weight"]["G"]) < TOLERANCE


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_with_every_label_ignored_stays_finite_or_says_so(reduction: str) -> None:
    model, x = net(), inputs()
    loss_fn = nn.CrossEntropyLoss(ignore_index=0, reduction=reduction)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = kfac_fx.compile(model, loss_fn, backend="eager")
    if reduction == "mean":
        with pytest.raises(kfac_fx.errors.NonFiniteLossError):
            step(x, torch.zeros_like(LABELS))
    else:
        assert step(x, torch.zeros_like(LABELS)) == 0
    for value, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(value, old)
    for state in step.state_dict()["curvature"].values():
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
