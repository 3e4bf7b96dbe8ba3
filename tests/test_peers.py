"""Factors against those of curvlinops 3.0.1 on a convolution net and a transformer classifier.

Same split of constants, taken from its source: A is the mean over examples and positions, with the bias as
last column; G carries the loss reduction. One conversion: its empirical gradient of a squared loss is that of
||f - y||^2, ours that of 1/2 ||f - y||^2 with the 2 in the reduction factor, so its G is twice ours. Its
type-2 factors use the Hessian, where both agree.
"""

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from tests.helpers import batch_factors
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

CLASSES = 2
LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
SHARINGS = ("expand", "reduce")
FISHERS = {"type2": "type-2", "empirical": "empirical"}


class Attention(nn.Module):
    """Self-attention with separate projections and two heads.

    Keys fade with their position; otherwise their gradients would add up to zero over positions, because a
    softmax ignores a common shift, and the key's reduced G would be rounding noise.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        fade = 1 / (1 + torch.arange(x.shape[1], dtype=x.dtype))
        weights = (q @ (k * fade[:, None]).mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Token embedding, one block, mean over the tokens, linear head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.first(x))
        x = x + self.mlp(self.second(x))
        return self.head(x.mean(1))


def convolution_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, (2, 3), stride=2, padding=(1, 2), dilation=(1, 2), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )


MODELS = {"convolution net": (convolution_net, (2, 6, 6)), "transformer": (Transformer, (5, 5))}


def peer_factors(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, *, fisher: str, sharing: str
) -> dict[str, dict[str, Tensor]]:
    """curvlinops' cached factors, renamed to weight names."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    operator = KFACLinearOperator(
        model,
        loss_fn,
        [parameter for module in layers.values() for parameter in module.parameters()],
        [(x, y)],
        check_deterministic=False,
        fisher_type=FISHERS[fisher],
        kfac_approx=sharing,
        separate_weight_and_bias=False,
    )
    operator.compute_kronecker_factors()
    inputs, grads = operator._input_covariances, operator._gradient_covariances
    return {f"{name}.weight": {"A": inputs[name], "G": grads[name]} for name in layers}


CASES = [
    *[
        (name, "cross-entropy", "mean", fisher, sharing)
        for name in MODELS
        for fisher in FISHERS
        for sharing in SHARINGS
    ],
    ("convolution net", "mse", "mean", "type2", "reduce"),
    ("convolution net", "mse", "mean", "empirical", "expand"),
    ("convolution net", "bce", "sum", "type2", "expand"),
    ("convolution net", "bce", "mean", "empirical", "reduce"),
    ("transformer", "mse", "sum", "type2", "expand"),
    ("transformer", "mse", "sum", "empirical", "reduce"),
    ("transformer", "bce", "mean", "type2", "reduce"),
    ("transformer", "cross-entropy", "sum", "empirical", "expand"),
]


@pytest.mark.parametrize(("name", "loss", "reduction", "fisher", "sharing"), CASES)
def test_factors_equal_those_of_curvlinops(
    name: str, loss: str, reduction: str, fisher: str, sharing: str
) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, loss_fn = build().double(), LOSSES[loss](reduction=reduction)
    x = torch.randn(6, *shape, dtype=torch.float64)
    y = {
        "cross-entropy": torch.randint(CLASSES, (6,)),
        "mse": torch.randn(6, CLASSES, dtype=torch.float64),
        "bce": torch.randint(2, (6, CLASSES)).double(),
    }[loss]
    peer = peer_factors(model, loss_fn, x, y, fisher=fisher, sharing=sharing)
    found = batch_factors(model, loss_fn, x, y, fisher=fisher, sharing=sharing)
    conversion = 2.0 if (loss, fisher) == ("mse", "empirical") else 1.0
    for weight, state in peer.items():
        assert relative_error(found[weight]["A"][0], state["A"]) < 1e-10
        assert relative_error(conversion * found[weight]["G"][0], state["G"]) < 1e-10
