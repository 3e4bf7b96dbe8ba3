"""What every registered method owes to every kind of layer, whatever its formulas are.

The references are the method itself on the same data in another way (a whole batch for two parts of it, a run
that was not interrupted, the eager graph for the compiled one) and plain PyTorch for parameters a method
refuses. The formulas have their own test files.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import NonFiniteLossError, Reason
from kfac_fx.methods import METHODS, resolve
from tests.training import Batch, differing, distance, plain_step, run_step, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

# AdaNKFAC differs from NKFAC in what the tests of `DISTINCT` set for all, KFC from K-FAC in its option.
DISTINCT = tuple(name for name in METHODS if name != "adankfac")
SETTINGS = {"kfc": {"spatially_uncorrelated_activations": True}}


class Experts(nn.Module):
    """Batched linear layers: one weight per expert in a single tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 6, 5) / 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        routed = x.unsqueeze(0).expand(3, -1, -1)
        return self.head(torch.tanh(torch.bmm(routed, self.weight)).mean(0))


class Attention(nn.Module):
    """q, k and v read one tensor; an embedding before, norms between.

    Keys fade with the position: else their gradients would sum to zero over positions, and `reduce` would
    factorise rounding noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens))
        keys = self.k(x) * torch.arange(1, 4, dtype=x.dtype).reciprocal().unsqueeze(-1)
        return self.head(F.scaled_dot_product_attention(self.q(x), keys, self.v(x)).mean(1))


class TiedHead(nn.Module):
    """A token table that is also the output layer, and a tied autoencoder in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.code = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8) / 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight, self.mix = self.tokens.weight, nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.tokens(tokens)))
        hidden = hidden + torch.tanh(hidden @ self.code.T) @ self.code
        return self.head(hidden).mean(1)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2, dilation=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def small_conv_net() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))


def images(size: int) -> Batch:
    return torch.randn(size, 2, 8, 8), torch.randint(4, (size,))


def vectors(size: int) -> Batch:
    return torch.randn(size, 6), torch.randint(4, (size,))


def sequences(size: int) -> Batch:
    return torch.randint(11, (size, 3)), torch.randint(4, (size,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "convolutions": (conv_net, images),
    "experts": (Experts, vectors),
    "attention": (Attention, sequences),
    "tied": (TiedHead, sequences),
}


def method_of(name: str, **settings: Any) -> Any:
    """The method with a schedule that a short run passes through several times."""
    schedule = {"statistics_every": 1, "inverse_every": 3 if METHODS[name]().inverse_every else 0}
    return replace(resolve(name), **(SETTINGS.get(name, {}) | schedule | settings))


def step_of(model: nn.Module, name: str, *, settings: Any = None, **options: Any) -> kfac_fx.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"backend": "eager", "optimizer": optimizer} | options
    return kfac_fx.compile(model, F.cross_entropy, method=method_of(name, **(settings or {})), **options)


def double(batch: Batch) -> Batch:
    return (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])


def test_adankfac_is_nkfac_with_another_schedule_and_optimizer() -> None:
    own = {name for name in vars(kfac_fx.AdaNKFAC) if not name.startswith("__")}
    assert own == {"name", "statistics_every", "inverse_every", "base_optimizer"}
    assert kfac_fx.AdaNKFAC.__mro__[1] is kfac_fx.NKFAC


WITH_POSITIONS = [(case, "reduce") for case in ("convolutions", "attention")]
CASES = [
    (name, case, sharing)
    for name in DISTINCT
    for case, sharing in [*((case, "expand") for case in MODELS), *WITH_POSITIONS]
    if name != "kfc" or (case, sharing) == ("convolutions", "expand")  # elsewhere it is K-FAC
]


@pytest.mark.parametrize(("name", "case", "sharing"), CASES)
def test_every_parameter_is_accounted_for_and_two_unequal_parts_equal_the_whole_batch(
    name: str, case: str, sharing: str
) -> None:
    build, draw = MODELS[case]
    model = build().double().eval()
    batches = [double(draw(7)) for _ in range(5)]
    found = []
    for split in (True, False):
        trained = twin(model)
        step = step_of(trained, name, sharing=sharing)
        for x, y in batches:
            if split:
                step.accumulate(x[:2], y[:2])
                step.accumulate(x[2:], y[2:])
                step.update()
            else:
                step(x, y)
        found.append(snapshot(trained))
    assert distance(*found) < 1e-9
    assert distance(found[1], snapshot(model)) > 1e-6

    matched = {n for m in step.plan.matched for n in (m.weight, m.bias) if n is not None}
    skipped = {s.parameter: s for s in step.plan.skipped}
    assert matched | set(skipped) == {n for n, _ in model.named_parameters()} and not matched & set(skipped)
    assert all(s.reason is Reason.METHOD and len(s.detail.split()) > 3 for s in skipped.values())
    assert matched, "a method must do something for each of these models"


@pytest.mark.parametrize("fisher", ["mc", "type2"])
@pytest.mark.parametrize("name", DISTINCT)
def test_the_fisher_of_the_prediction_works_and_differs_from_the_empirical_one(
    name: str, fisher: str
) -> None:
    build, draw = MODELS["attention"] if fisher == "type2" and name != "kfc" else (small_conv_net, images)
    model, batches = build(), [draw(5) for _ in range(4)]
    ends = {}
    for kind in (fisher, "empirical"):
        trained = twin(model)
        run_step(step_of(trained, name, fisher=kind), batches)
        ends[kind] = snapshot(trained)
        assert all(torch.isfinite(t).all() for t in ends[kind].values())
    same = name == "foof"  # G = I: no gradient enters its curvature
    assert (distance(ends[fisher], ends["empirical"]) == 0) == same


@pytest.mark.parametrize("name", DISTINCT)
def test_a_saved_state_continues_bit_identically_in_a_new_step_and_in_one_that_ran_at_another_size(
    name: str, tmp_path: Any
) -> None:
    """Batches of two sizes, so that a state whose size follows the batch is saved too.

    Inverses are refreshed at every third step: the saved ones serve the step after the save.
    """
    save_at = 4
    model, batches = small_conv_net(), [images(size) for size in (4, 4, 6, 4, 6, 4, 4)]
    step = step_of(model, name)
    run_step(step, batches[:save_at])
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    rest = torch.stack(run_step(step, batches[save_at:], seed=9))
    for elsewhere in ([], [images(6), images(6)]):
        other = small_conv_net()
        again = step_of(other, name)
        run_step(again, elsewhere)
        kept = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(kept["model"])
        again.load_state_dict(kept["step"])
        assert torch.equal(torch.stack(run_step(again, batches[save_at:], seed=9)), rest)
        assert differing(snapshot(other, again), snapshot(model, step)) == []


@pytest.mark.parametrize("name", DISTINCT)
def test_a_batch_that_is_not_finite_changes_nothing(name: str) -> None:
    """Neither the first batch nor a later one."""
    model, (x, y) = small_conv_net(), images(4)
    step = step_of(model, name)
    with pytest.raises(NonFiniteLossError):
        before = snapshot(model)
        step(x * float("nan"), y)
    assert differing(snapshot(model), before) == []
    run_step(step, [images(4) for _ in range(4)])
    with pytest.raises(NonFiniteLossError):
        before = snapshot(model, step)
        step(x * float("nan"), y)
    assert differing(snapshot(model, step), before) == []
    losses = run_step(step, [images(4) for _ in range(2)])
    assert all(torch.isfinite(loss) for loss in losses)
    assert "0.weight" in differing(snapshot(model, step), before)


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "kfc"])
def test_the_compiled_graph_agrees_with_the_eager_one(name: str) -> None:
    """One layer, and statistics at every step: each kernel is a run of the C++ compiler."""
    model, batches = nn.Linear(6, 4).double(), [double(vectors(6)) for _ in range(6)]
    ends = []
    for backend in ("eager", "inductor"):
        trained = twin(model)
        run_step(step_of(trained, name, backend=backend), batches)
        ends.append(snapshot(trained))
    assert distance(*ends) < 1e-12
    assert distance(ends[0], snapshot(model)) > 1e-3


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "kfc"])
def test_what_a_method_refuses_gets_its_plain_gradient(name: str) -> None:
    model, batch = Attention(), sequences(5)
    other = twin(model)
    step = kfac_fx.compile(
        other,
        F.cross_entropy,
        method=method_of(name),
        optimizer=torch.optim.SGD(other.parameters(), lr=0.5),
        backend="eager",
    )
    step(*batch)
    plain_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.5), batch)
    refused = {s.parameter for s in step.plan.skipped}
    for (key, plain), (_, own) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(plain, own) == (key in refused)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_digits_with_its_base_optimizer(name: str) -> None:
    """On a learning rate for this small task; the published base optimizer otherwise."""
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data[:512], dtype=torch.float32) / 16, torch.tensor(labels[:512])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    start = F.cross_entropy(model(x), y).item()
    step = kfac_fx.compile(model, F.cross_entropy, method=method_of(name), backend="eager")
    for group in step.optimizer.param_groups:
        group["lr"] = 0.01 if name == "adankfac" else 0.05
    for _ in range(8):
        for batch in torch.randperm(512).split(128):
            step(x[batch], y[batch])
    assert F.cross_entropy(model(x), y).item() < 0.5 * start
