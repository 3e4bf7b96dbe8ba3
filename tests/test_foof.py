"""FOOF, the forward-only method: V = grad (A + lambda I)^-1 and nothing of the loss (oracle E13)."""

import warnings

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import Reason
from kfac_fx.methods import METHODS
from tests.helpers import gradients, one_step
from tests.oracles import input_factors, record_uses, relative_error

TOLERANCE = 1e-10
DAMPING = 0.02


def net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 3)
    )
    return model.double(), torch.randn(7, 4, 3, 3, dtype=torch.float64), torch.randint(3, (7,))


def joint(tensors: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"][:, None]], 1)


def foof(**settings: float | None) -> kfac_fx.FOOF:
    return kfac_fx.FOOF(**{"damping": DAMPING, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_e13_the_direction_is_the_gradient_times_the_damped_inverse_of_A(sharing: str) -> None:
    model, x, y = net()
    result = one_step(model, F.cross_entropy, x, y, method=foof(), fisher="empirical", sharing=sharing)
    grads, factors = gradients(model, F.cross_entropy, x, y), input_factors(record_uses(model, x)[1], sharing)
    for name in ("0", "3", "4"):
        a = factors[f"{name}.weight"]
        damped = a + DAMPING * torch.eye(a.shape[-1], dtype=a.dtype)
        gradient = joint(grads, name).reshape(len(a), -1, a.shape[-1])
        wanted = torch.linalg.solve(damped, gradient.mT).mT.flatten(0, 1)
        assert relative_error(-joint(result.change, name), wanted) < TOLERANCE
        assert relative_error(result.curvature[f"{name}.weight"]["A"], a) < TOLERANCE


def test_e13_the_factors_are_those_of_curvlinops_forward_only() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()
    x, y = torch.randn(6, 2, 2, 2, dtype=torch.float64), torch.randint(3, (6,))
    peer = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        check_deterministic=False,
        fisher_type="forward-only",
        separate_weight_and_bias=False,
    )
    peer.compute_kronecker_factors()
    found = one_step(model, F.cross_entropy, x, y, method=foof(), fisher="empirical").curvature
    for name in ("0", "3"):
        assert relative_error(found[f"{name}.weight"]["A"][0], peer._input_covariances[name]) < TOLERANCE
        g = peer._gradient_covariances.get(name)
        assert g is None or torch.equal(g, torch.eye(3, dtype=torch.float64))


def test_neither_the_scale_of_the_loss_nor_the_fisher_enters_the_curvature() -> None:
    model, x, y = net()
    once = one_step(model, F.cross_entropy, x, y, method=foof(), fisher="empirical")
    other = one_step(model, lambda f, t: 8 * F.cross_entropy(f, t), x, y, method=foof(), fisher="type2")
    for name, state in once.curvature.items():
        assert all(torch.equal(tensor, other.curvature[name][key]) for key, tensor in state.items())
    for name, change in once.change.items():
        assert relative_error(other.change[name], 8 * change) < TOLERANCE


def test_without_damping_it_applies_the_pseudo_inverse() -> None:
    model, x, y = net()
    result = one_step(model, F.cross_entropy, x, y, method=foof(damping=0.0), fisher="empirical")
    a = result.curvature["3.weight"]["A"][0]
    assert torch.linalg.matrix_rank(a, hermitian=True) < len(a)
    gradient = joint(gradients(model, F.cross_entropy, x, y), "3")
    wanted = gradient @ torch.linalg.pinv(a, rtol=1e-10, hermitian=True)
    assert relative_error(-joint(result.change, "3"), wanted) < TOLERANCE


class Mixed(nn.Module):
    """An embedding, a norm, two readers of one tensor, and a weight that is used in both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(6, 4, padding_idx=5), nn.LayerNorm(4)
        self.q, self.k, self.code = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens))
        x = self.q(x) * self.k(x)
        return (torch.tanh(x @ self.code.T) @ self.code).mean(1)


def test_shared_inputs_are_inverted_once_and_what_has_no_single_input_is_left_alone() -> None:
    torch.manual_seed(2)
    model, x, y = Mixed().double(), torch.randint(6, (7, 3)), torch.randint(4, (7,))
    result = one_step(model, F.cross_entropy, x, y, method=foof(), fisher="empirical")
    q, k = result.curvature["q.weight"], result.curvature["k.weight"]
    assert q["A_inverse"].data_ptr() == k["A_inverse"].data_ptr()
    grads = gradients(model, F.cross_entropy, x, y)
    damped = k["A"][0] + DAMPING * torch.eye(5, dtype=torch.float64)
    assert (
        relative_error(-joint(result.change, "k"), joint(grads, "k") @ torch.linalg.inv(damped)) < TOLERANCE
    )
    counts = torch.bincount(x[x != 5], minlength=6).double() / x.numel()
    wanted = grads["words.weight"] / (counts + DAMPING)[:, None]
    assert relative_error(-result.change["words.weight"], wanted) < TOLERANCE
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method="foof")
    refused = {s.parameter for s in plan.skipped if s.reason is Reason.METHOD}
    assert refused == {"norm.weight", "norm.bias", "code"}
    for name in refused:
        assert relative_error(-result.change[name], grads[name]) < 1e-12


@pytest.mark.parametrize("name", ["foof", "kfac", "nkfac"])
def test_a_first_inverse_that_fails_is_counted_and_warned_of_once(name: str) -> None:
    """Six rows in 41 columns: A is singular, and rounding makes it indefinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    floor = {"damping_floor": 0.0} if name == "nkfac" else {}
    method = METHODS[name](damping=1e-30, statistics_every=1, inverse_every=1, **floor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    x, y = 1e4 * torch.randn(6, 40), torch.randint(3, (6,))
    with pytest.warns(UserWarning, match=rf"^{name} could not invert . of its factors .* Raise the dam"):
        step(x, y)
    first = step.counts["kept_last"]
    assert first > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, y)
    assert step.counts["kept_last"] >= first
