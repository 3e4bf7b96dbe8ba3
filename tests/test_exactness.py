"""Type-2 factors against exact Gauss-Newton blocks: where K-FAC is exact it must be, elsewhere it must not.

E1 to E12 are the exactness oracles of the specification; each positive statement has its negative control.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from tests.helpers import batch_factors, factor_reader, gradients, one_step
from tests.oracles import (
    example_hessians,
    hessian_root,
    kronecker_block,
    record_uses,
    reduction_factor,
    reference_factors,
    relative_error,
    weight_ggn,
)

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
REDUCTIONS = ("mean", "sum")
LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Pool(nn.Module):
    """Mean or sum over the given dimensions."""

    def __init__(self, how: str, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.how, self.dims = how, dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims) if self.how == "mean" else x.sum(self.dims)


class Positionwise(nn.Module):
    """Tokens [N, T, d] through two linear layers, position by position; `flat` merges N and T at the end."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.flat = nn.Linear(4, 3), nn.Linear(3, 2), flat

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(self.body(x))
        return outputs.flatten(0, 1) if self.flat else outputs


def mlp(*sizes: int, activation: Callable[[], nn.Module] | None = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out)] + ([activation()] if activation else [])
    return nn.Sequential(*(layers[:-1] if activation else layers)).double()


def targets_for(loss: str, outputs: Tensor) -> Tensor:
    """Random targets of the kind the loss expects, one per example (cross-entropy) or per entry."""
    if loss == "cross-entropy":
        return torch.randint(outputs.shape[1], (outputs.shape[0],))
    return torch.randn_like(outputs) if loss == "mse" else torch.randint(2, outputs.shape).double()


def block_errors(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, *, sharing: str, fisher: str = "type2"
) -> dict[str, float]:
    """Relative error of the library's G (x) A against the exact block, layer by layer."""
    curvature = batch_factors(model, loss_fn, x, y, fisher=fisher, sharing=sharing)
    assert set(curvature) == {name for name, _ in model.named_parameters() if name.endswith("weight")}
    errors = {}
    for name, state in curvature.items():
        bias = name.removesuffix("weight") + "bias"
        has_bias = bias in dict(model.named_parameters())
        exact = weight_ggn(model, loss_fn, x, y, name, bias if has_bias else None)
        errors[name] = relative_error(kronecker_block(state["A"], state["G"]), exact)
    return errors


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reference_roots_and_reduction_factors_reproduce_the_loss_hessian(loss: str, reduction: str) -> None:
    torch.manual_seed(0)
    loss_fn, outputs = LOSSES[loss](reduction=reduction), torch.randn(6, 4, dtype=torch.float64)
    root = hessian_root(loss_fn, outputs)
    hessians = example_hessians(loss_fn, outputs, targets_for(loss, outputs))
    assert relative_error(reduction_factor(loss_fn, outputs) * root @ root.mT, hessians) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(4, 2), (4, 5, 3, 2), (2, 6, 1)])
def test_e1_deep_linear_network_with_squared_loss_is_exact(sizes: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(1)
    model, loss_fn = mlp(*sizes, activation=None), nn.MSELoss(reduction=reduction)
    x = torch.randn(9, sizes[0], dtype=torch.float64)
    y = torch.randn(9, sizes[-1], dtype=torch.float64)
    sharing = "expand" if reduction == "mean" else "reduce"
    assert max(block_errors(model, loss_fn, x, y, sharing=sharing).values()) < TOLERANCE


def test_e1_fails_for_the_empirical_fisher_and_for_cross_entropy() -> None:
    torch.manual_seed(2)
    model, x = mlp(4, 5, 3, activation=None), torch.randn(9, 4, dtype=torch.float64)
    squared = torch.randn(9, 3, dtype=torch.float64)
    empirical = block_errors(model, nn.MSELoss(), x, squared, sharing="expand", fisher="empirical")
    classes = block_errors(model, nn.CrossEntropyLoss(), 3 * x, torch.randint(3, (9,)), sharing="expand")
    assert min(empirical.values()) > 1e-1
    assert min(classes.values()) > 1e-2


@pytest.mark.parametrize(("reduction", "repeats"), [("mean", 1), ("sum", 1), ("mean", 5)])
@pytest.mark.parametrize("loss", LOSSES)
def test_e2_one_distinct_example_is_exact_for_any_network_and_loss(
    loss: str, reduction: str, repeats: int
) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), *mlp(3, 4, 2)).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64).repeat(repeats, 1, 1, 1)
    y = targets_for(loss, model(x).detach())
    errors = block_errors(model, LOSSES[loss](reduction=reduction), x, y, sharing="expand")
    assert max(errors.values()) < TOLERANCE


def test_e2_fails_for_nine_examples() -> None:
    torch.manual_seed(4)
    model, x = mlp(4, 5, 3), 2 * torch.randn(9, 4, dtype=torch.float64)
    errors = block_errors(model, nn.CrossEntropyLoss(), x, torch.randint(3, (9,)), sharing="expand")
    assert min(errors.values()) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_e2_empirical_fisher_of_one_example_is_its_own_outer_product(loss: str) -> None:
    torch.manual_seed(5)
    model, x = mlp(4, 5, 3), torch.randn(1, 4, dtype=torch.float64)
    loss_fn, outputs = LOSSES[loss](), model(x).detach()
    y = targets_for(loss, outputs)
    curvature = batch_factors(model, loss_fn, x, y, fisher="empirical", sharing="expand")
    grads = gradients(model, loss_fn, x, y)
    for name, state in curvature.items():
        joint = torch.cat([grads[name], grads[name.replace("weight", "bias")][:, None]], dim=1).flatten()
        exact = torch.outer(joint, joint) / reduction_factor(loss_fn, outputs)
        assert relative_error(kronecker_block(state["A"], state["G"]), exact) < TOLERANCE


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_e3_expand_is_exact_where_every_position_has_its_own_loss(reduction: str) -> None:
    torch.manual_seed(6)
    model, loss_fn = Positionwise().double(), nn.MSELoss(reduction=reduction)
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    assert max(block_errors(model, loss_fn, x, y, sharing="expand").values()) < TOLERANCE
    assert min(block_errors(model, loss_fn, x, y, sharing="reduce").values()) > 1e-1


@pytest.mark.parametrize(("reduction", "how"), [("mean", "mean"), ("sum", "sum"), ("mean", "sum")])
def test_e4_reduce_is_exact_where_positions_are_pooled(reduction: str, how: str) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 3), Pool(how, (1,)), nn.Linear(3, 2)).double()
    x, y = torch.randn(9, 5, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    loss_fn = nn.MSELoss(reduction=reduction)
    assert max(block_errors(model, loss_fn, x, y, sharing="reduce").values()) < TOLERANCE
    assert block_errors(model, loss_fn, x, y, sharing="expand")["0.weight"] > 1e-1


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_e5_summing_both_factors_would_be_too_large_by_the_squared_number_of_positions(how: str) -> None:
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 3), Pool(how, (1,)), nn.Linear(3, 2)).double()
    x, y = torch.randn(9, 5, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    state = batch_factors(model, nn.MSELoss(), x, y, fisher="type2", sharing="reduce")["0.weight"]
    summed = record_uses(model, x)[1]["0.weight"][0].rows.sum(2)
    exact = weight_ggn(model, nn.MSELoss(), x, y, "0.weight", "0.bias")
    wrong = kronecker_block(torch.einsum("ngi,ngj->gij", summed, summed) / 9, state["G"])
    assert abs(relative_error(wrong, exact) - (5**2 - 1)) < 1e-8


@pytest.mark.parametrize(
    ("rank", "stride", "reduction"), [(1, 1, "sum"), (2, 2, "mean"), (2, 1, "sum"), (3, 2, "mean")]
)
def test_e6_convolution_with_global_average_pooling_is_exact_for_reduce(
    rank: int, stride: int, reduction: str
) -> None:
    torch.manual_seed(9)
    kernel = (3, 2, 2)[:rank]
    conv = CONV[rank](2, 2, kernel, stride=stride, padding=1)
    model = nn.Sequential(conv, Pool("mean", tuple(range(2, 2 + rank))), nn.Linear(2, 2)).double()
    x = torch.randn(7, 2, *(5, 4, 3)[:rank], dtype=torch.float64)
    y, loss_fn = torch.randn(7, 2, dtype=torch.float64), nn.MSELoss(reduction=reduction)
    assert max(block_errors(model, loss_fn, x, y, sharing="reduce").values()) < TOLERANCE
    assert block_errors(model, loss_fn, x, y, sharing="expand")["0.weight"] > 1e-1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_e7_convolution_before_a_pointwise_convolution_is_exact_for_expand(reduction: str) -> None:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)).double()
    x, y = torch.randn(4, 2, 2, 2, dtype=torch.float64), torch.randn(4, 2, 2, 2, dtype=torch.float64)
    loss_fn = nn.MSELoss(reduction=reduction)
    assert max(block_errors(model, loss_fn, x, y, sharing="expand").values()) < TOLERANCE
    assert block_errors(model, loss_fn, x, y, sharing="reduce")["0.weight"] > 1e-1


def test_e8_neither_is_exact_for_two_wide_convolutions() -> None:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)).double()
    x, y = torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    for sharing in ("expand", "reduce"):
        errors = block_errors(model, nn.MSELoss(), x, y, sharing=sharing)
        assert errors["0.weight"] > 1e-1


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("loss", LOSSES)
def test_e9_sum_and_mean_losses_differ_by_their_reduction_factors(loss: str, fisher: str) -> None:
    torch.manual_seed(12)
    model, x = mlp(4, 5, 2), torch.randn(9, 4, dtype=torch.float64)
    outputs = model(x).detach()
    y = targets_for(loss, outputs)
    mean, total = LOSSES[loss](reduction="mean"), LOSSES[loss](reduction="sum")
    ratio = reduction_factor(mean, outputs) / reduction_factor(total, outputs)
    of_mean, of_sum = (
        one_step(model, loss_fn, x, y, method=kfac_fx.KFAC(damping=lam, kl_clip=None), fisher=fisher)
        for loss_fn, lam in ((mean, 1e-2 * ratio), (total, 1e-2))
    )
    for name, state in of_mean.curvature.items():
        assert relative_error(state["A"], of_sum.curvature[name]["A"]) < 1e-12
        assert relative_error(state["G"], ratio * of_sum.curvature[name]["G"]) < TOLERANCE
    for name, change in of_mean.change.items():
        assert relative_error(change, of_sum.change[name]) < TOLERANCE


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_e10_loss_terms_beside_the_batch_equal_the_flattened_batch(loss: str, fisher: str) -> None:
    torch.manual_seed(13)
    model, x = Positionwise().double(), torch.randn(5, 2, 4, dtype=torch.float64)
    flat = Positionwise(flat=True).double()
    flat.load_state_dict(model.state_dict())
    y = targets_for(loss, model(x).detach())
    deep = batch_factors(model, LOSSES[loss](), x, y, fisher=fisher, sharing="expand")
    rows = batch_factors(flat, LOSSES[loss](), x, y.flatten(0, 1), fisher=fisher, sharing="expand")
    early = batch_factors(
        model, LOSSES[loss](), x.flatten(0, 1), y.flatten(0, 1), fisher=fisher, sharing="expand"
    )
    for name, state in deep.items():
        for factor in ("A", "G"):
            assert relative_error(state[factor], rows[name][factor]) < TOLERANCE
            assert relative_error(state[factor], early[name][factor]) < TOLERANCE


@pytest.mark.parametrize(
    ("fisher", "sharing"), [("type2", "expand"), ("type2", "reduce"), ("empirical", "reduce")]
)
def test_e10_classes_before_positions_count_every_position_as_a_loss_term(fisher: str, sharing: str) -> None:
    torch.manual_seed(16)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2)).double()
    x, y = torch.randn(4, 2, 4, dtype=torch.float64), torch.randint(2, (4, 2))
    found = batch_factors(model, nn.CrossEntropyLoss(), x, y, fisher=fisher, sharing=sharing)
    wanted = reference_factors(model, nn.CrossEntropyLoss(), x, y, fisher=fisher, sharing=sharing)
    for name, state in wanted.items():
        for factor, value in state.items():
            assert relative_error(found[name][factor], value) < TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
def test_e11_sampled_labels_average_to_the_type_2_factors(loss: str) -> None:
    torch.manual_seed(14)
    model, x = mlp(4, 5, 2), torch.randn(48, 4, dtype=torch.float64)
    y, loss_fn = targets_for(loss, model(x).detach()), LOSSES[loss]()
    exact = batch_factors(model, loss_fn, x, y, fisher="type2", sharing="expand")
    read = factor_reader(model, loss_fn, fisher="mc")
    draws = [read(x, y) for _ in range(150)]
    assert relative_error(draws[0]["0.weight"]["G"], draws[1]["0.weight"]["G"]) > 1e-3
    for name, state in exact.items():
        mean = torch.stack([draw[name]["G"] for draw in draws]).mean(0)
        assert relative_error(draws[0][name]["A"], state["A"]) < 1e-12
        assert relative_error(draws[0][name]["G"], state["G"]) > 1e-2
        assert (mean - state["G"]).abs().max() < 0.1 * state["G"].abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_e12_empirical_factor_is_made_of_the_ordinary_output_gradients(loss: str, reduction: str) -> None:
    torch.manual_seed(15)
    model, x = mlp(4, 12, 3), torch.randn(5, 4, dtype=torch.float64)
    outputs, uses = record_uses(model, x)
    loss_fn, y = LOSSES[loss](reduction=reduction), targets_for(loss, outputs.detach())
    state = batch_factors(model, loss_fn, x, y, fisher="empirical", sharing="expand")["0.weight"]
    (g,) = torch.autograd.grad(loss_fn(outputs, y), uses["0.weight"][0].output)
    terms = {"cross-entropy": 5, "mse": 5 * 3 / 2, "bce": 5 * 3}[loss] if reduction == "mean" else 1
    scale = 0.5 if (loss, reduction) == ("mse", "sum") else terms
    assert relative_error(state["G"][0], scale * g.T @ g) < TOLERANCE
    assert torch.linalg.matrix_rank(state["G"][0], hermitian=True, rtol=1e-10) <= 5
