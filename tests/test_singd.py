"""SINGD and IKFAC against dense formulas written here, group by group of each kind of layer."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from tests.helpers import batch_factors, gradients
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
DAMPING, STEP = 0.02, 0.1
METHODS = {"singd": kfac_fx.SINGD, "ikfac": kfac_fx.IKFAC}
Roots = tuple[Tensor, Tensor]


def method_of(name: str, **settings: Any) -> Any:
    return METHODS[name](**{"damping": DAMPING, "lr_cov": STEP, "statistics_every": 1, **settings})


def updated(name: str, a: Tensor, g: Tensor, roots: Roots, momenta: Roots, *, alpha: float) -> list[Tensor]:
    """(K, C, m_K, m_C) after one update by the published formulas. a, g: dense [d, d]."""
    (k, c), (m_k, m_c) = roots, momenta
    h_k, h_c, l_k, l_c = k.T @ a @ k, c.T @ g @ c, k.T @ k, c.T @ c
    weights = [1.0] * 4
    if name == "singd":
        weights = [
            float(h_c.trace()) / len(c),
            float(l_c.trace()) / len(c),
            float(h_k.trace()) / len(k),
            float(l_k.trace()) / len(k),
        ]
    m_k = alpha * m_k + 0.5 * (weights[0] * h_k + DAMPING * weights[1] * l_k - torch.eye(len(k)).to(k))
    m_c = alpha * m_c + 0.5 * (weights[2] * h_c + DAMPING * weights[3] * l_c - torch.eye(len(c)).to(c))
    return [k - STEP * k @ m_k, c - STEP * c @ m_c, m_k, m_c]


def fresh(a: Tensor, g: Tensor) -> tuple[Roots, Roots]:
    """Identity roots and zero momenta."""
    eyes = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
    return eyes, (torch.zeros_like(a), torch.zeros_like(g))


def two_steps(model: nn.Module, x: Tensor, y: Tensor, name: str) -> tuple[dict[str, Tensor], Any]:
    """(change of each parameter in the second step at lr 1, curvature after it); the first step has lr 0."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    step = kfac_fx.compile(
        twin, F.cross_entropy, method=method_of(name), optimizer=optimizer, backend="eager"
    )
    step(x, y)
    optimizer.param_groups[0]["lr"] = 1.0
    step(x, y)
    change = {n: (model.get_parameter(n) - p).detach() for n, p in twin.named_parameters()}
    return change, step.state_dict()["curvature"]


def expected_two_steps(name: str, a: Tensor, g: Tensor, gradient: Tensor) -> tuple[list[Tensor], Tensor]:
    """The state after two updates with the same moments, and C C^T grad K K^T."""
    alpha = 0.5 if name == "singd" else 0.0
    roots, momenta = fresh(a, g)
    k, c, m_k, m_c = updated(name, a, g, roots, momenta, alpha=alpha)
    k, c, m_k, m_c = updated(name, a, g, (k, c), (m_k, m_c), alpha=alpha)
    return [k, c, m_k, m_c], c @ c.T @ gradient @ k @ k.T


def check_layer(
    name: str, state: Any, factors: Any, gradient: Tensor, change: Tensor, group: int = 0
) -> None:
    """State and direction of one group of one layer against the dense formulas."""
    a = factors["A"] if factors["A"].dim() == 1 else factors["A"][group]
    dense, direction = expected_two_steps(
        name, torch.diag(a) if a.dim() == 1 else a, factors["G"][group], gradient
    )
    names = ["A_root", "G_root"] + (["A_momentum", "G_momentum"] if name == "singd" else [])
    assert set(state) == set(names)
    for key, expected in zip(names, dense, strict=False):
        found = torch.diag(state[key]) if state[key].dim() == 1 else state[key][group]
        assert relative_error(found, expected) < TOLERANCE
    assert relative_error(change, direction) < TOLERANCE


def reference(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Factors of one batch (checked against hooks and curvlinops elsewhere) and autograd's gradients."""
    loss = nn.CrossEntropyLoss()
    factors = batch_factors(model, loss, x, y, fisher="empirical", sharing="expand")
    return factors, gradients(model, loss, x, y)


def joined(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """Weight and bias of a layer as one matrix."""
    return torch.cat([tensors[f"{layer}.weight"].flatten(1), tensors[f"{layer}.bias"][:, None]], 1)


@pytest.mark.parametrize("name", METHODS)
def test_linear_layers_step_by_the_published_formulas(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    factors, grads = reference(model, x, y)
    change, state = two_steps(model, x, y, name)
    check_layer(name, state["0.weight"], factors["0.weight"], joined(grads, "0"), joined(change, "0"))
    check_layer(name, state["2.weight"], factors["2.weight"], grads["2.weight"], change["2.weight"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("groups", [2, 4])
def test_every_group_of_a_convolution_moves_by_its_own_traces(name: str, groups: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    x, y = torch.randn(5, 4, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    factors, grads = reference(model, x, y)
    change, state = two_steps(model, x, y, name)
    whole, moved = joined(grads, "0").chunk(groups), joined(change, "0").chunk(groups)
    for group in range(groups):
        check_layer(name, state["0.weight"], factors["0.weight"], whole[group], moved[group], group=group)


class Experts(nn.Module):
    """Batched linear layers: weight [experts, d_in, d_out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).tanh().sum(1)


@pytest.mark.parametrize("name", METHODS)
def test_every_expert_of_a_batched_layer_moves_by_its_own_traces(name: str) -> None:
    torch.manual_seed(2)
    model = Experts().double()
    x, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.randint(5, (6,))
    factors, grads = reference(model, x, y)
    change, state = two_steps(model, x, y, name)
    for expert in range(3):
        gradient, moved = grads["weight"][expert].T, change["weight"][expert].T
        check_layer(name, state["weight"], factors["weight"], gradient, moved, group=expert)


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_keep_a_vector_and_step_by_the_published_formulas(name: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(5, (7, 3)), torch.randint(3, (7,))
    factors, grads = reference(model, x, y)
    change, state = two_steps(model, x, y, name)
    assert state["0.weight"]["A_root"].shape == (6,)
    check_layer(name, state["0.weight"], factors["0.weight"], grads["0.weight"].T, change["0.weight"].T)


class Tied(nn.Module):
    """A token table that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.table(tokens)).sum(1) @ self.table.weight.T


@pytest.mark.parametrize("name", METHODS)
def test_a_tied_table_moves_by_the_partial_traces_of_both_uses(name: str) -> None:
    torch.manual_seed(4)
    model = Tied().double()
    x, y = torch.randint(7, (6, 3)), torch.randint(7, (6,))
    factors, grads = reference(model, x, y)
    found = factors["table.weight"]
    uses = [(torch.diag(found["A"]), found["G"][0]), (torch.diag(found["G_swapped"]), found["A_swapped"][0])]
    inner = sum(left * right.trace() for left, right in uses)
    outer = sum(right * left.trace() for left, right in uses)
    total = sum(left.trace() * right.trace() for left, right in uses)
    inner, outer = inner * found["A"].sum() / total, outer / found["A"].sum()
    assert torch.isclose(inner.trace() * outer.trace(), total)
    change, state = two_steps(model, x, y, name)
    joint = {"A": inner.diagonal(), "G": outer[None]}
    check_layer(name, state["table.weight"], joint, grads["table.weight"].T, change["table.weight"].T)


def test_norms_are_refused_with_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    plan = kfac_fx.inspect(model, F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)), method="ikfac")
    skipped = {skip.parameter: skip for skip in plan.skipped}
    assert set(skipped) == {"1.weight", "1.bias"}
    assert all(
        skip.reason is kfac_fx.Reason.METHOD and "Kronecker" in skip.detail for skip in skipped.values()
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("alpha1", 1.0), ("lr_cov", 0.0), ("inverse_every", 5), ("damping", -1.0)]
)
def test_settings_without_meaning_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"SINGD\({setting}="):
        kfac_fx.SINGD(**{setting: value})


def test_costs_are_those_of_the_products() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method="singd")
    for factor in plan.factors:
        d, other = factor.dim, {5: 5, 3: 5}[factor.dim]
        if factor.owner == "2.weight":
            other = 8 - d
        assert factor.flops_statistics == 2 * 6 * d**2 + 8 * d**3 and factor.flops_refresh == 0
        assert factor.flops_apply == 4 * d**2 * other
        assert factor.bytes == 2 * d * d * 4
