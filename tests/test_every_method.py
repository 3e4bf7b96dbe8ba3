"""What every registered method owes to every kind of layer, whatever its formulas are.

The references are the method itself on the same data in another way (a whole batch for two parts of it, a run
that was not interrupted, the eager graph for the compiled one) and plain PyTorch for parameters a method
refuses. The formulas have their own test files.
"""

import copy
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

NAMES = tuple(METHODS)


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


def images(size: int) -> Batch:
    return torch.randn(size, 2, 8, 8), torch.randint(4, (size,))


def images_of(size: int) -> Batch:
    """The same images whenever it is called."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 2, 8, 8, generator=generator), torch.arange(size) % 4


def vectors(size: int) -> Batch:
    return torch.randn(size, 6), torch.randint(4, (size,))


def sequences(size: int) -> Batch:
    return torch.randint(11, (size, 3)), torch.randint(4, (size,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), vectors),
    "convolutions": (conv_net, images),
    "experts": (Experts, vectors),
    "attention": (Attention, sequences),
    "tied": (TiedHead, sequences),
}


def method_of(name: str, **settings: Any) -> Any:
    """The method with a schedule that a short run passes through several times."""
    schedule = {"statistics_every": 1, "inverse_every": 3 if METHODS[name]().inverse_every else 0}
    return replace(resolve(name), **(schedule | settings))


def step_of(model: nn.Module, name: str, *, settings: Any = None, **options: Any) -> kfac_fx.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"backend": "eager", "optimizer": optimizer} | options
    return kfac_fx.compile(model, F.cross_entropy, method=method_of(name, **(settings or {})), **options)


def double(batch: Batch) -> Batch:
    return (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_matched_or_refused_with_a_sentence(name: str, case: str) -> None:
    build, draw = MODELS[case]
    model = build()
    plan = kfac_fx.inspect(model, F.cross_entropy, *draw(4), method=name)
    matched = {n for m in plan.matched for n in (m.weight, m.bias) if n is not None}
    skipped = {s.parameter: s for s in plan.skipped}
    assert matched | set(skipped) == {n for n, _ in model.named_parameters()} and not matched & set(skipped)
    assert all(s.reason is Reason.METHOD and len(s.detail.split()) > 3 for s in skipped.values())
    assert matched, "a method must do something for each of these models"


WITH_POSITIONS = [(case, "reduce") for case in ("convolutions", "attention")]


@pytest.mark.parametrize(("case", "sharing"), [*((case, "expand") for case in MODELS), *WITH_POSITIONS])
@pytest.mark.parametrize("name", NAMES)
def test_two_unequal_parts_equal_the_whole_batch(name: str, case: str, sharing: str) -> None:
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


@pytest.mark.parametrize(("case", "fisher"), [("convolutions", "mc"), ("attention", "type2")])
@pytest.mark.parametrize("name", NAMES)
def test_the_fisher_of_the_prediction_works_and_differs_from_the_empirical_one(
    name: str, case: str, fisher: str
) -> None:
    build, draw = MODELS[case]
    model, batches = build(), [draw(5) for _ in range(4)]
    ends = {}
    for kind in (fisher, "empirical"):
        trained = twin(model)
        run_step(step_of(trained, name, fisher=kind), batches)
        ends[kind] = snapshot(trained)
        assert all(torch.isfinite(t).all() for t in ends[kind].values())
    same = name == "foof"  # G = I: no gradient enters its curvature
    assert (distance(ends[fisher], ends["empirical"]) == 0) == same


@pytest.mark.parametrize("name", NAMES)
def test_continuing_from_a_saved_state_is_bit_identical(name: str, tmp_path: Any) -> None:
    """Batches of several sizes, so that a state whose size follows the batch is saved too.

    Inverses are refreshed at every third step: the saved ones serve the step after the save.
    """
    save_at = 4
    model, batches = conv_net(), [images(size) for size in (4, 4, 6, 4, 3, 4, 6)]
    step = step_of(model, name)
    run_step(step, batches[:save_at])
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = run_step(step, batches[save_at:], seed=9)
    other = conv_net()
    other.load_state_dict(kept["model"])
    again = step_of(other, name)
    again.load_state_dict(kept["step"])
    assert torch.equal(torch.stack(run_step(again, batches[save_at:], seed=9)), torch.stack(rest))
    assert differing(snapshot(other, again), snapshot(model, step)) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_state_can_be_loaded_into_a_step_that_ran_at_another_batch_size(name: str) -> None:
    model, batches = conv_net(), [images(4) for _ in range(5)]
    step = step_of(model, name)
    run_step(step, batches)
    other = conv_net()
    again = step_of(other, name)
    run_step(again, [images(7) for _ in range(2)])
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(step.state_dict()))
    ends = [torch.stack(run_step(s, [images_of(size) for size in (4, 3, 6)])) for s in (step, again)]
    assert torch.equal(*ends) and differing(snapshot(other, again), snapshot(model, step)) == []


@pytest.mark.parametrize("index", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_changes_nothing(name: str, index: int) -> None:
    model, batches = conv_net(), [images(4) for _ in range(6)]
    step = step_of(model, name)
    run_step(step, batches[:index])
    if index:
        before = snapshot(model, step)
    with pytest.raises(NonFiniteLossError):
        step(batches[index][0] * float("nan"), batches[index][1])
    if index:
        assert differing(snapshot(model, step), before) == []
    losses = run_step(step, batches[index:])
    assert all(torch.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_graph_agrees_with_the_eager_one(name: str) -> None:
    model, batches = MODELS["mlp"][0](), [vectors(6) for _ in range(7)]
    ends = []
    for backend in ("eager", "inductor"):
        trained = twin(model)
        run_step(step_of(trained, name, settings={"statistics_every": 2}, backend=backend), batches)
        ends.append(snapshot(trained))
    assert distance(*ends) < 1e-4


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_digits_with_its_base_optimizer(name: str) -> None:
    """On a learning rate for this small task; the published base optimizer otherwise."""
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data[:512], dtype=torch.float32) / 16, torch.tensor(labels[:512])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    start = F.cross_entropy(model(x), y).item()
    step = kfac_fx.compile(model, F.cross_entropy, method=method_of(name), backend="eager")
    rate = {"skfac": 0.05, "adankfac": 0.01, "nkfac": 0.05}.get(name, 0.05)
    for group in step.optimizer.param_groups:
        group["lr"] = rate
    for _ in range(8):
        for batch in torch.randperm(512).split(128):
            step(x[batch], y[batch])
    assert F.cross_entropy(model(x), y).item() < 0.5 * start
