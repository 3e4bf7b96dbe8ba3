"""One K-FAC step under every damping rule (D0 to D4 of methods.md 1.6) against dense algebra written here."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.linalg import damped_inverses
from tests.damped import added, eye
from tests.helpers import gradients, one_step
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
DAMPING = 0.02
RULES = ("tikhonov", "factored", "sqrt", "full", "relative")


def dense(rule: str, damping: float, a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """The damped block's solution by one dense solve. gradient: [d_out, d_in]."""
    if rule == "tikhonov":
        block = torch.kron(g, a) + damping * eye(len(a) * len(g))
    else:
        to_a, to_g = added(rule, damping, a, g)
        block = torch.kron(g + to_g * eye(len(g)), a + to_a * eye(len(a)))
    return torch.linalg.solve(block, gradient.flatten()).view_as(gradient)


def stepped(
    model: nn.Module, x: Tensor, y: Tensor, rule: str, **options: object
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(curvature, what was subtracted from each parameter at learning rate 1) of one step."""
    settings = {"damping": DAMPING, "kl_clip": None, "damping_rule": rule, **options}
    method = kfac_fx.KFAC(**settings)  # type: ignore[arg-type]
    result = one_step(model, F.cross_entropy, x, y, method=method, fisher="type2")
    return result.curvature, {name: -change for name, change in result.change.items()}


def with_bias(tensors: dict[str, Tensor], name: str, rows: slice = slice(None)) -> Tensor:
    bias = name.replace("weight", "bias")
    return torch.cat([tensors[name][rows].flatten(1), tensors[bias][rows, None]], 1)


@pytest.mark.parametrize("rule", RULES)
def test_linear_and_grouped_convolution_layers_step_by_the_dense_inverse(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(7, 4, 3, 3, dtype=torch.float64), torch.randint(3, (7,))
    state, change = stepped(model, x, y, rule)
    grads = gradients(model, F.cross_entropy, x, y)
    factors = state["3.weight"]
    wanted = dense(rule, DAMPING, factors["A"][0], factors["G"][0], with_bias(grads, "3.weight"))
    assert relative_error(with_bias(change, "3.weight"), wanted) < TOLERANCE
    for group in range(2):
        factors, rows = state["0.weight"], slice(3 * group, 3 * group + 3)
        gradient = with_bias(grads, "0.weight", rows)
        wanted = dense(rule, DAMPING, factors["A"][group], factors["G"][group], gradient)
        assert relative_error(with_bias(change, "0.weight", rows), wanted) < TOLERANCE


class Tied(nn.Module):
    """A token table that is the output layer too, with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.table(tokens)).mean(1)) @ self.table.weight.T


@pytest.mark.parametrize("rule", RULES)
def test_embeddings_step_by_the_dense_inverse(rule: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(5, (7, 3)), torch.randint(3, (7,))
    state, change = stepped(model, x, y, rule)
    factors = state["0.weight"]
    gradient = gradients(model, F.cross_entropy, x, y)["0.weight"].T
    wanted = dense(rule, DAMPING, torch.diag(factors["A"]), factors["G"][0], gradient)
    assert relative_error(change["0.weight"].T, wanted) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_tied_weights_step_by_the_inverse_of_the_joined_product_and_norms_by_their_blocks(rule: str) -> None:
    torch.manual_seed(2)
    model = Tied().double()
    x, y = torch.randint(5, (7, 3)), torch.randint(6, (7,))
    state, change = stepped(model, x, y, rule)
    grads = gradients(model, F.cross_entropy, x, y)
    table = state["table.weight"]
    a, g, a_swapped, g_swapped = (
        torch.diag(table["A"]),
        table["G"][0],
        table["A_swapped"][0],
        table["G_swapped"],
    )
    g_swapped = torch.diag(g_swapped)
    inner = a * g.trace() + g_swapped * a_swapped.trace()
    outer = (g * a.trace() + a_swapped * g_swapped.trace()) / inner.trace()
    wanted = dense(rule, DAMPING, inner, outer, grads["table.weight"].T)
    assert relative_error(change["table.weight"].T, wanted) < TOLERANCE
    for channel, block in enumerate(state["norm.weight"]["F"]):
        largest = float(torch.linalg.eigvalsh(block)[-1])
        damping = max(1e-4, DAMPING * largest) if rule == "relative" else DAMPING
        gradient = torch.stack([grads["norm.weight"][channel], grads["norm.bias"][channel]])
        found = torch.stack([change["norm.weight"][channel], change["norm.bias"][channel]])
        assert relative_error(found, torch.linalg.solve(block + damping * eye(2), gradient)) < TOLERANCE


def layer() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))


def test_the_rules_give_different_steps() -> None:
    changes = [with_bias(stepped(*layer(), rule)[1], "0.weight") for rule in RULES]
    for i, one in enumerate(changes):
        assert all(relative_error(one, other) > 1e-2 for other in changes[:i])


@pytest.mark.parametrize("rule", RULES)
def test_without_damping_every_rule_applies_the_pseudo_inverse_of_a_singular_factor(rule: str) -> None:
    """The gradients of a softmax add up to zero over the classes, so that the last G is singular."""
    model, x, y = layer()
    state, change = stepped(model, x, y, rule, damping=0.0)
    grads = gradients(model, F.cross_entropy, x, y)
    assert torch.linalg.eigvalsh(state["2.weight"]["G"][0])[0] < 1e-15
    for name in ("0.weight", "2.weight"):
        a, g = (torch.linalg.pinv(state[name][side][0], rtol=1e-10, hermitian=True) for side in ("A", "G"))
        assert relative_error(with_bias(change, name), g @ with_bias(grads, name) @ a) < TOLERANCE


def test_without_damping_words_that_never_occurred_are_left_alone() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randint(5, (9, 2)), torch.randint(3, (9,))
    change = stepped(model, x, y, "relative", damping=0.0)[1]["0.weight"]
    assert torch.equal(change[-1], torch.zeros(4, dtype=torch.float64))
    assert all(row.norm() > 0 for row in change[x.unique()])


@pytest.mark.parametrize("rule", RULES)
def test_lambda_may_be_a_tensor_that_lives_with_the_factors(rule: str) -> None:
    model, x, y = layer()
    method = kfac_fx.KFAC(damping=DAMPING, damping_rule=rule)
    state, _ = stepped(model, x, y, rule)
    as_tensor = torch.tensor(0.3, dtype=torch.float64)
    found, wanted = (method.refreshed(state, damping=value)[0] for value in (as_tensor, 0.3))
    other = method.refreshed(state, damping=DAMPING)[0]
    for key, tensors in found.items():
        assert all(torch.equal(tensor, wanted[key][name]) for name, tensor in tensors.items())
        changed = any(not torch.equal(tensor, other[key][name]) for name, tensor in tensors.items())
        assert changed == (rule != "tikhonov"), "eigenvectors do not depend on lambda, inverses do"


def test_layers_that_share_their_input_share_its_eigenvectors() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    torch.manual_seed(5)
    model, x, y = Heads().double(), torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    state, change = stepped(model, x, y, "tikhonov")
    grads = gradients(model, F.cross_entropy, x, y)
    assert state["q.weight"]["A_basis"].data_ptr() == state["k.weight"]["A_basis"].data_ptr()
    for name in ("q.weight", "k.weight"):
        factors = state[name]
        wanted = dense("tikhonov", DAMPING, factors["A"][0], factors["G"][0], with_bias(grads, name))
        assert relative_error(with_bias(change, name), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping_rule": "pi"}, r"KFAC\(damping_rule='pi'\): must be one of tikhonov"),
        ({"damping": -1.0}, r"KFAC\(damping=-1.0\)"),
    ],
)
def test_unknown_rules_and_negative_damping_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kfac_fx.KFAC(**settings)


def test_a_matrix_that_its_damping_does_not_make_definite_is_retried_with_ten_times_as_much() -> None:
    values = torch.tensor([3.0, 1.0, -0.5], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    factor = ((basis * values) @ basis.T).expand(2, 3, 3).clone()
    factor[1] += 3 * eye(3)  # this one is definite
    damping = torch.full((2,), 0.1, dtype=torch.float64)
    last = torch.zeros_like(factor)
    result = damped_inverses([factor], [damping], last=[last])
    assert (result.retried, result.raised, result.kept_last) == (1, 1, 0)
    assert relative_error(result.inverses[0][0], torch.linalg.inv(factor[0] + eye(3))) < TOLERANCE
    assert relative_error(result.inverses[0][1], torch.linalg.inv(factor[1] + 0.1 * eye(3))) < TOLERANCE
    hopeless = damped_inverses([factor], [damping / 10], last=[last])
    assert (hopeless.retried, hopeless.raised, hopeless.kept_last) == (1, 1, 1)
    assert torch.equal(hopeless.inverses[0][0], last[0])


def test_a_step_counts_the_retry_with_more_damping() -> None:
    model, x, y = layer()
    state, _ = stepped(model, x, y, "full")
    factor = state["0.weight"]["A"]
    lowest = torch.linalg.eigvalsh(factor[0])[0]
    bad = {**state["0.weight"], "A": factor - (lowest + 5 * DAMPING) * eye(6)}
    _, refreshed = kfac_fx.KFAC(damping=DAMPING, damping_rule="full").refresh({"x": bad}, counts={"x": 0})
    assert (refreshed.retried, refreshed.kept_last) == (2, 0)
