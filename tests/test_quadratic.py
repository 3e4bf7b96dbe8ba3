"""The quadratic model of the loss: products with the Gauss-Newton matrix, the update that minimises it.

References are dense: Jacobians by reverse mode, Hessians of the criterion by double backward, plain solves.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.batch import flatten_batch
from kfac_fx.forward import forward_program
from kfac_fx.quadratic import gram, minimiser
from tests.helpers import gradients
from tests.oracles import jacobians, loss_hessian

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
DAMPING, ETA = 0.05, 0.01
Loss = Callable[[Tensor, Tensor], Tensor]
Case = tuple[nn.Module, Loss, Tensor, Tensor]


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in vector.values()])


def gauss_newton(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor) -> Tensor:
    """J^T H J of all trainable parameters in order, [numel, numel]."""
    model = copy.deepcopy(model)
    outputs = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    J = torch.cat([j.flatten(1) for j in jacobians(outputs, leaves)], 1)
    return J.T @ loss_hessian(loss_fn, outputs, y) @ J


def random_directions(model: nn.Module, *, count: int = 3) -> list[dict[str, Tensor]]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [{name: torch.randn_like(p) for name, p in named.items()} for _ in range(count)]


def products_by_library(case: Case, directions: list[dict[str, Tensor]]) -> Tensor:
    model, loss_fn, x, y = case
    plan = kfac_fx.inspect(model, loss_fn, x, y)
    forward = forward_program(plan.capture)
    tensors = [*model.parameters(), *model.buffers(), *flatten_batch(x, y).tensors]
    with torch.no_grad():
        derivatives = [forward.derivative(direction, tensors) for direction in directions]
    return gram(derivatives, directions, damping=0.0)


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def rows(num: int = 7, width: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(num, width, dtype=torch.float64)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
TERM_WEIGHTS = torch.linspace(0.2, 1.4, 7, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, -100, 1, 2, 0])
PRESENT = LABELS.clamp(min=0)
FRACTIONS = torch.linspace(0, 1, 21, dtype=torch.float64).view(7, 3)
LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "cross-entropy": (F.cross_entropy, PRESENT),
    "cross-entropy, summed": (lambda f, y: F.cross_entropy(f, y, reduction="sum"), PRESENT),
    "cross-entropy, class weights": (lambda f, y: F.cross_entropy(f, y, weight=CLASS_WEIGHTS), PRESENT),
    "cross-entropy, ignored labels": (F.cross_entropy, LABELS),
    "cross-entropy, smoothed labels": (
        lambda f, y: F.cross_entropy(f, y, weight=CLASS_WEIGHTS, label_smoothing=0.2),
        LABELS,
    ),
    "cross-entropy, soft targets": (F.cross_entropy, torch.softmax(FRACTIONS, 1)),
    "cross-entropy, own weight per term": (
        lambda f, y: (F.cross_entropy(f, y, reduction="none") * TERM_WEIGHTS).sum(),
        PRESENT,
    ),
    "log-likelihood": (lambda f, y: F.nll_loss(F.log_softmax(f, 1), y), PRESENT),
    "squared error": (F.mse_loss, FRACTIONS),
    "squared error, summed": (lambda f, y: F.mse_loss(f, y, reduction="sum"), FRACTIONS),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, FRACTIONS),
    "binary cross-entropy, weights": (
        lambda f, y: F.binary_cross_entropy_with_logits(
            f, y, weight=TERM_WEIGHTS[:, None], pos_weight=CLASS_WEIGHTS
        ),
        FRACTIONS,
    ),
    "two losses": (
        lambda f, y: 0.3 * F.mse_loss(f, y) + F.binary_cross_entropy_with_logits(2 * f, y),
        FRACTIONS,
    ),
}


class Attention(nn.Module):
    """Token embeddings with a padding token, masked and causal attention, the embedding again as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 8, padding_idx=0)
        self.mix, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        q, k, v = (part.view(*x.shape, 2, 4).transpose(1, 2) for part in self.mix(h).chunk(3, -1))
        mask = (x != 0)[:, None, None, :]
        h = h + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(h.shape)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(h.shape)
        return F.linear(self.norm(h), self.tokens.weight).transpose(1, 2)


def convolution(*, training: bool) -> Case:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)),
    ).double()
    model(torch.randn(8, 4, 4, 4, dtype=torch.float64))  # running statistics that are not the initial ones
    model.train(training)
    return model, F.cross_entropy, torch.randn(5, 4, 4, 4, dtype=torch.float64), torch.randint(3, (5,))


def attention() -> Case:
    torch.manual_seed(3)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 1, 2], [3, 3, 0, 0]])
    return Attention().double(), F.cross_entropy, tokens, torch.randint(6, (3, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_dense_gauss_newton_matrix_for_every_loss(name: str) -> None:
    loss_fn, y = LOSSES[name]
    case = mlp(), loss_fn, rows(), y
    directions = random_directions(case[0])
    D = torch.stack([flat(direction) for direction in directions])
    expected = D @ gauss_newton(*case) @ D.T
    assert torch.linalg.norm(products_by_library(case, directions) - expected) < TOLERANCE * expected.norm()


@pytest.mark.parametrize(
    "case",
    [convolution(training=False), convolution(training=True), attention()],
    ids=["batch norm, eval", "batch norm, train", "attention"],
)
def test_products_are_those_of_the_dense_gauss_newton_matrix_for_every_layer(case: Case) -> None:
    directions = random_directions(case[0])
    D = torch.stack([flat(direction) for direction in directions])
    before = [buffer.clone() for buffer in case[0].buffers()]
    found = products_by_library(case, directions)
    assert all(torch.equal(b, old) for b, old in zip(case[0].buffers(), before, strict=True))
    expected = D @ gauss_newton(*case) @ D.T
    assert torch.linalg.norm(found - expected) < TOLERANCE * expected.norm()


# ---------------------------------------------------------------- the minimiser


def test_the_minimiser_solves_the_system_and_falls_by_half_the_slope() -> None:
    torch.manual_seed(4)
    root = torch.randn(3, 5, dtype=torch.float64) * torch.tensor([[1e-4], [1.0], [1e5]], dtype=torch.float64)
    curvature, slopes = root @ root.T, torch.randn(3, dtype=torch.float64)
    c = minimiser(curvature, slopes, precision=torch.finfo(torch.float64).eps)
    assert torch.allclose(c, -torch.linalg.solve(curvature, slopes), rtol=1e-9)
    value = 0.5 * c @ curvature @ c + slopes @ c
    assert float(value) == pytest.approx(float(0.5 * slopes @ c), rel=1e-10)


def test_parallel_directions_share_the_step_and_flat_ones_get_none() -> None:
    curvature = torch.tensor([[2.0, 4.0, 0.0], [4.0, 8.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    slopes = torch.tensor([-3.0, -6.0, -1.0], dtype=torch.float64)
    c = minimiser(curvature, slopes, precision=1e-16)
    assert float(c[0] + 2 * c[1]) == pytest.approx(1.5)
    assert float(c[2]) == 0
    alone = minimiser(torch.zeros(1, 1, dtype=torch.float64), slopes[:1], precision=1e-16)
    assert float(alone) == 0


# ---------------------------------------------------------------- whole steps


def preconditioned(state: dict[str, dict[str, Tensor]], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """-G^-1 grad A^-1 of the Linear layers in the state, weight and bias jointly."""
    found = {}
    for key, factors in state.items():
        bias = key.replace("weight", "bias")
        whole = torch.cat([grads[key], grads[bias][:, None]], 1)
        step = -factors["G_inverse"][0] @ whole @ factors["A_inverse"][0]
        found |= {key: step[:, :-1], bias: step[:, -1]}
    return found


def compiled(model: nn.Module, loss_fn: Loss, **options: object) -> kfac_fx.TrainStep:
    settings = {"damping": DAMPING, "inverse_every": 2, "quadratic_model": True}
    exclude = options.pop("exclude", ())
    method = kfac_fx.KFAC(**{**settings, **options})  # type: ignore[arg-type]
    return kfac_fx.compile(model, loss_fn, method=method, exclude=exclude, backend="eager")  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("exclude", [(), ("2.*",)])
@pytest.mark.parametrize("name", ["cross-entropy, class weights", "squared error"])
def test_updates_minimise_the_dense_quadratic_model(
    name: str, exclude: tuple[str, ...], momentum: bool
) -> None:
    loss_fn, y = LOSSES[name]
    model = mlp()
    step = compiled(model, loss_fn, l2=ETA, model_momentum=momentum, exclude=exclude)
    last: dict[str, Tensor] = {}
    for index in range(3):
        x = rows() + 0.3 * index
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        curvature = gauss_newton(model, loss_fn, x, y)
        grads = {n: g + ETA * before[n] for n, g in gradients(model, loss_fn, x, y).items()}
        step(x, y)
        matched = preconditioned(step.state_dict()["curvature"], grads)
        zeros = {n: torch.zeros_like(g) for n, g in grads.items()}
        rest = {n: -g for n, g in grads.items() if n not in matched}
        D = torch.stack([flat({**zeros, **d}) for d in (matched, rest, last) if d])
        assert len(D) == 1 + bool(exclude) + (momentum and index > 0)
        M = curvature + (DAMPING + ETA) * torch.eye(D.shape[1], dtype=D.dtype)
        coefficients = -torch.linalg.solve(D @ M @ D.T, D @ flat(grads))
        delta = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        assert (flat(delta) - coefficients @ D).norm() < 1e-9 * flat(delta).norm()
        last = delta if momentum else {}


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_one_undamped_step_of_a_linear_regression_reaches_the_minimum(fisher: str) -> None:
    torch.manual_seed(5)
    model = nn.Linear(4, 1).double()
    x, y = rows(20), torch.randn(20, 1, dtype=torch.float64)
    method = kfac_fx.KFAC(damping=0.0, quadratic_model=True)
    step = kfac_fx.compile(model, F.mse_loss, method=method, fisher=fisher, backend="eager")  # type: ignore[arg-type]
    step(x, y)
    design = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(design, y).solution[:, 0]
    found = torch.cat([model.weight[0], model.bias]).detach()
    assert (found - best).norm() < 1e-8 * best.norm()
