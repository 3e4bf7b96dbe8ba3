"""EKFAC against the dense Fisher of autograd, dense algebra and curvlinops 3.0.1 (oracle K8)."""

import copy
import functools
import math

import pytest
import torch
from curvlinops import EKFACLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import squares
from kfac_fx.gram import InputRows
from tests.helpers import gradients, one_step
from tests.oracles import kronecker_block, relative_error, weight_ggn
from tests.test_embedding_norm_tied import SplitConcat

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
State = dict[str, Tensor]


class Words(nn.Module):
    """Embedding, mean, tanh, head; the same word may occur twice in a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1).tanh())


class TiedWords(nn.Module):
    """The token table is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1).tanh() @ self.embedding.weight.T


class TiedCode(nn.Module):
    """One matrix encodes and, transposed, decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(3, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.code.T).tanh() @ self.code


def example(kind: str) -> tuple[nn.Module, Tensor, int, tuple[str, str | None]]:
    """(model, inputs, classes, (weight, bias)) of one layer kind."""
    torch.manual_seed(0)
    if kind == "words":
        return Words().double(), torch.randint(6, (7, 4)), 2, ("embedding.weight", None)
    if kind == "tied words":
        return TiedWords().double(), torch.randint(5, (7, 4)), 5, ("embedding.weight", None)
    if kind == "tied code":
        return TiedCode().double(), torch.randn(7, 5, dtype=torch.float64), 5, ("code", None)
    if kind == "two uses":
        return (
            SplitConcat(bias=True).double(),
            torch.randn(7, 6, dtype=torch.float64),
            4,
            (
                "shared.weight",
                "shared.bias",
            ),
        )
    first = {
        "linear": lambda: [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)],
        "tokens": lambda: [nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)],
        "conv": lambda: [nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)],
        "grouped": lambda: [nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)],
    }[kind]
    shape = {"linear": (5,), "tokens": (3, 5), "conv": (2, 3, 3), "grouped": (4, 3, 3)}[kind]
    model = nn.Sequential(*first()).double()
    return model, torch.randn(7, *shape, dtype=torch.float64), 3, ("0.weight", "0.bias")


KINDS = ("linear", "tokens", "conv", "grouped", "words", "two uses", "tied words", "tied code")


def exact_block(model: nn.Module, x: Tensor, y: Tensor, names: tuple[str, str | None]) -> Tensor:
    """The Gauss-Newton block over rvec of the canonical gradient.

    That of an embedding, and of the tied matrix here, is the transposed parameter.
    """
    block = weight_ggn(model, nn.CrossEntropyLoss(), x, y, *names)
    if not names[0].startswith(("embedding", "code")):
        return block
    rows_, columns = model.get_parameter(names[0]).shape
    order = torch.arange(rows_ * columns).view(rows_, columns).T.flatten()
    return block[order][:, order]


def settled(model: nn.Module, x: Tensor, y: Tensor, *, sharing: str = "expand", **settings: float) -> State:
    """State after two still steps on one batch: the basis of the first, S of the second."""
    method = kfac_fx.EKFAC(statistics_every=1, inverse_every=100, **{"scale_decay": 0.0, **settings})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(
        model,
        nn.CrossEntropyLoss(),
        method=method,
        optimizer=optimizer,
        fisher="type2",
        sharing=sharing,
        backend="eager",
    )
    for _ in range(2):
        step(x, y)
    return step.state_dict()["curvature"]


def bases(state: State) -> list[Tensor]:
    """Q_G (x) Q_A of every group."""
    groups, _, d_in = state["S"].shape
    q_a = state.get("A_basis", torch.eye(d_in, dtype=torch.float64).expand(groups, d_in, d_in))
    return [torch.kron(g, a) for g, a in zip(state["G_basis"], q_a, strict=True)]


def kfac_block(state: State) -> Tensor:
    a = state["A"] if state["A"].dim() == 3 else torch.diag(state["A"])[None]
    return kronecker_block(a, state["G"])


@functools.cache
def compared(kind: str, sharing: str) -> tuple[State, Tensor]:
    """(state of the layer, the exact block) of one kind."""
    model, x, classes, names = example(kind)
    y = torch.randint(classes, (7,))
    return settled(model, x, y, sharing=sharing)[names[0]], exact_block(model, x, y, names)


CASES = [(kind, sharing) for kind in KINDS for sharing in ("expand", "reduce")]


@pytest.mark.parametrize(("kind", "sharing"), CASES)
def test_k8_S_is_the_diagonal_of_the_exact_block_in_the_eigenbasis_of_the_factors(
    kind: str, sharing: str
) -> None:
    state, exact = compared(kind, sharing)
    basis = torch.block_diag(*bases(state))
    assert relative_error(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64)) < TOLERANCE
    assert relative_error(state["S"].flatten(), (basis.T @ exact @ basis).diagonal()) < TOLERANCE
    assert abs(float(state["S"].sum() / exact.trace()) - 1) < TOLERANCE


@pytest.mark.parametrize(("kind", "sharing"), [case for case in CASES if "tied" not in case[0]])
def test_k8_no_other_diagonal_is_nearer_to_the_block_and_kfacs_is_not(kind: str, sharing: str) -> None:
    state, exact = compared(kind, sharing)
    per_group = [q @ torch.diag(s.flatten()) @ q.T for q, s in zip(bases(state), state["S"], strict=True)]
    for side, factor in (("A", state["A"]), ("G", state["G"])):
        if factor.dim() == 3:
            rotated = state[f"{side}_basis"].mT @ factor @ state[f"{side}_basis"]
            assert relative_error(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))) < TOLERANCE
    errors = [float((exact - other).norm()) for other in (torch.block_diag(*per_group), kfac_block(state))]
    assert errors[0] < 0.999 * errors[1]


def test_k8_one_example_without_positions_is_exact() -> None:
    """Where K-FAC is exact (oracle E2), so is EKFAC; nine examples are the control."""
    for num, exact in ((1, True), (9, False)):
        model, _, _, names = example("linear")
        x, y = torch.randn(num, 5, dtype=torch.float64), torch.randint(3, (num,))
        state = settled(model, x, y)["0.weight"]
        (basis,) = bases(state)
        found = basis @ torch.diag(state["S"].flatten()) @ basis.T
        error = relative_error(found, exact_block(model, x, y, names))
        assert error < TOLERANCE if exact else error > 1e-2


def test_k8_the_short_cut_for_one_position_is_the_general_formula() -> None:
    a, g = torch.randn(2, 5, 1, 3, dtype=torch.float64), torch.randn(2, 5, 1, 4, dtype=torch.float64)
    q_a, q_g = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    use = squares.parts_of_rows([(InputRows(rows=a, ones=False), g)])
    silent = squares.parts_of_rows([(InputRows(rows=torch.zeros_like(a), ones=False), g)])
    short = squares.squared_projections([use], q_a, q_g, bias=False, examples=5)
    general = squares.squared_projections([use, silent], q_a, q_g, bias=False, examples=5)
    assert relative_error(short, general) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "words", "tied words"])
def test_a_step_after_the_refresh_divides_by_the_averaged_S_in_the_basis(kind: str) -> None:
    model, x, classes, (weight, bias) = example(kind)
    y, damping = torch.randint(classes, (7,)), 0.02
    exact = settled(model, x, y)[weight]["S"]
    first = one_step(
        model,
        F.cross_entropy,
        x,
        y,
        method=kfac_fx.EKFAC(statistics_every=1, inverse_every=9, damping=damping, kl_clip=None),
        fisher="type2",
        lr=0.0,
    ).curvature[weight]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    method = kfac_fx.EKFAC(statistics_every=1, inverse_every=9, damping=damping, kl_clip=None)
    step = kfac_fx.compile(
        twin, F.cross_entropy, method=method, optimizer=optimizer, fisher="type2", backend="eager"
    )
    step(x, y)
    optimizer.param_groups[0]["lr"] = 1.0
    step(x, y)
    scale = 0.75 * first["S"] + 0.25 * exact
    assert relative_error(step.state_dict()["curvature"][weight]["S"], scale) < TOLERANCE
    grads, new = gradients(model, F.cross_entropy, x, y), dict(twin.named_parameters())
    change = {name: (p - new[name]).detach() for name, p in model.named_parameters()}

    def canonical(tensors: dict[str, Tensor]) -> Tensor:
        if weight.startswith("embedding"):
            return tensors[weight].T[None]
        matrix = tensors[weight].flatten(1)
        matrix = matrix if bias is None else torch.cat([matrix, tensors[bias][:, None]], 1)
        return matrix.reshape(scale.shape)

    for group, basis in enumerate(bases(first)):
        block = basis @ torch.diag(scale[group].flatten() + damping) @ basis.T
        wanted = torch.linalg.solve(block, canonical(grads)[group].flatten())
        assert relative_error(canonical(change)[group].flatten(), wanted) < TOLERANCE


def test_at_the_refresh_it_is_kfac_with_exact_tikhonov_damping() -> None:
    model, x, classes, _ = example("conv")
    y = torch.randint(classes, (7,))
    ends = [
        one_step(model, F.cross_entropy, x, y, method=method, fisher="type2").change
        for method in (
            kfac_fx.EKFAC(damping=0.01, statistics_every=1, inverse_every=1),
            kfac_fx.KFAC(damping=0.01, damping_rule="tikhonov"),
            kfac_fx.KFAC(damping=0.01),
        )
    ]
    for name, change in ends[0].items():
        assert relative_error(change, ends[1][name]) < TOLERANCE
        assert relative_error(change, ends[2][name]) > 1e-3


def test_a_basis_that_cannot_be_refreshed_stays_with_its_S() -> None:
    model, x, classes, _ = example("linear")
    method = kfac_fx.EKFAC()
    state = settled(model, x, torch.randint(classes, (7,)))["0.weight"]
    bad = {**state, "A": state["A"] * math.nan}
    new, refreshed = method.refresh({"x": bad, "y": state}, counts={"x": 1, "y": 1})
    assert refreshed.kept_last == 1
    assert torch.equal(new["x"]["A_basis"], state["A_basis"]) and torch.equal(new["x"]["S"], state["S"])
    assert not torch.equal(new["y"]["S"], state["S"])


def test_without_damping_a_word_that_never_occurred_is_left_alone() -> None:
    model, x, _, _ = example("words")
    x = x.clamp(max=4)
    method = kfac_fx.EKFAC(damping=0.0, kl_clip=None, statistics_every=1, inverse_every=5)
    change = one_step(model, F.cross_entropy, x, torch.randint(2, (7,)), method=method, fisher="type2").change
    assert torch.equal(change["embedding.weight"][5], torch.zeros(3, dtype=torch.float64))
    assert all(torch.isfinite(tensor).all() for tensor in change.values())


@pytest.mark.parametrize("settings", [{"scale_decay": 1.0}, {"scale_decay": -0.1}, {"kl_clip": 0.0}])
def test_settings_without_meaning_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ValueError, match=rf"EKFAC\({next(iter(settings))}="):
        kfac_fx.EKFAC(**settings)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_products_equal_those_of_curvlinops(sharing: str, reduction: str) -> None:
    """Eigenvalues are distinct here, so that both have the same eigenvectors up to sign."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    x, y = torch.randn(30, 2, 4, 4, dtype=torch.float64), torch.randint(3, (30,))
    loss_fn, parameters = nn.CrossEntropyLoss(reduction=reduction), list(model.parameters())
    peer = EKFACLinearOperator(
        model,
        loss_fn,
        parameters,
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    vectors = [torch.randn_like(p) for p in parameters]
    products = peer @ vectors
    method = kfac_fx.EKFAC(statistics_every=1, inverse_every=100, scale_decay=0.0)
    step = kfac_fx.compile(
        model,
        loss_fn,
        method=method,
        optimizer=torch.optim.SGD(parameters, lr=0.0),
        fisher="type2",
        sharing=sharing,
        backend="eager",
    )
    for _ in range(2):
        step(x, y)
    curvature = step.state_dict()["curvature"]
    for index, name in enumerate(("0", "2", "5")):
        state, (weight, bias) = curvature[f"{name}.weight"], vectors[2 * index : 2 * index + 2]
        joint = torch.cat([weight.flatten(1), bias[:, None]], 1)
        basis_a, basis_g = state["A_basis"][0], state["G_basis"][0]
        found = basis_g @ (state["S"][0] * (basis_g.T @ joint @ basis_a)) @ basis_a.T
        wanted = torch.cat([products[2 * index].flatten(1), products[2 * index + 1][:, None]], 1)
        assert relative_error(found, wanted) < 1e-8
        corrected = peer._corrected_eigenvalues[name].flatten().sort().values
        assert relative_error(state["S"].flatten().sort().values, corrected) < 1e-8
