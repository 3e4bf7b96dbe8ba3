"""`TrainStep` against plain PyTorch: the same numbers with the identity as its method.

Bit-identical means: parameters, buffers and losses after 20 steps are the same bits, on the eager backend,
while statistics and inverses are collected on their schedules. Where PyTorch itself would run another kernel
than the traced graph the test says so and uses a tolerance.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfac_fx
from tests.training import (
    Batch,
    Identity,
    MakeOptimizer,
    adamw,
    differing,
    distance,
    plain_step,
    run_plain,
    run_step,
    sgd,
    snapshot,
    twin,
)

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

STEPS = 20


class Checkpointed(nn.Module):
    """A block with dropout that is recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Dropout(0.4), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden + checkpoint(self.block, hidden, use_reentrant=False))


class AutocastRegion(nn.Module):
    """bfloat16 in the middle, float32 around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.tanh(self.middle(hidden))
        return self.last(hidden.float())


class Tied(nn.Module):
    """A token table that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(tokens)))).transpose(1, 2)


class InPlace(nn.Module):
    """Activations and sums that overwrite their input, and a counter buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        hidden = F.relu(self.first(x), inplace=True)
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.1)
        hidden = hidden + F.leaky_relu_(self.second(hidden))
        hidden.mul_(0.5).add_(1.0)
        return self.last(hidden)


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 8, num_layers=2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention with separate q, k and v, all of which read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(5, 8), encoder, nn.Flatten(), nn.Linear(24, 4))


def mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12, bias=bias), nn.Tanh(), nn.Linear(12, 4))


def images(size: int) -> Batch:
    return torch.randn(size, 2, 8, 8), torch.randint(4, (size,))


def sequences(size: int) -> Batch:
    return torch.randn(size, 3, 5), torch.randint(4, (size,))


def vectors(size: int) -> Batch:
    return torch.randn(size, 6), torch.randint(4, (size,))


def attended(size: int) -> Batch:
    return torch.randn(size, 3, 8), torch.randint(4, (size,))


def tokens(size: int) -> Batch:
    return torch.randint(11, (size, 3)), torch.randint(11, (size, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "convolution, batch norm, dropout": (conv_net, images),
    "transformer with dropout": (transformer, sequences),
    "checkpointed block with dropout": (Checkpointed, vectors),
    "autocast region": (AutocastRegion, vectors),
    "tied weights": (Tied, tokens),
    "operations in place": (InPlace, vectors),
}


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Weights with decay at one rate, everything else without at another."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": others, "lr": 0.02}, {"params": weights, "lr": 0.05, "weight_decay": 0.01}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD with momentum": sgd,
    "AdamW": adamw,
    "groups with weight decay": grouped,
    "Adam with coupled decay": lambda model: torch.optim.Adam(
        model.parameters(), lr=0.003, weight_decay=0.1, amsgrad=True
    ),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.003, momentum=0.5),
}


def both(
    model: nn.Module, batches: list[Batch], make: MakeOptimizer, *, backend: str = "eager"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(with the identity, plain): parameters, buffers and losses of two runs from the same start."""
    other = twin(model)
    step = kfac_fx.compile(other, F.cross_entropy, method=Identity(), optimizer=make(other), backend=backend)
    ours = run_step(step, batches)
    plain = run_plain(model, F.cross_entropy, make, batches)
    return (
        {**snapshot(other), "losses": torch.stack(ours)},
        {**snapshot(model), "losses": torch.stack(plain)},
    )


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("case", CASES)
def test_with_the_identity_as_method_training_is_bit_identical(case: str, make: MakeOptimizer) -> None:
    build, draw = CASES[case]
    model = build()
    before = snapshot(model)
    ours, plain = both(model, [draw(6) for _ in range(STEPS)], make)
    assert differing(ours, plain) == []
    assert len(differing(before, plain)) >= len(before) // 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_with_its_groups_gets_the_same_gradients(optimizer: str) -> None:
    ours, plain = both(conv_net(), [images(5) for _ in range(STEPS)], OPTIMIZERS[optimizer])
    assert differing(ours, plain) == []


def test_a_recurrent_network_is_bit_identical_to_pytorchs_own_decomposition() -> None:
    model, batches = Recurrent(), [sequences(5) for _ in range(STEPS)]
    fused = twin(model)
    with torch.backends.mkldnn.flags(enabled=False):
        ours, plain = both(model, batches, sgd)
    assert differing(ours, plain) == []
    # PyTorch's default on a CPU is oneDNN's fused LSTM kernel, which rounds in another order than the matmuls
    # that a graph can show. So here only float32 rounding can be asked for.
    ours, plain = both(fused, batches, sgd)
    assert distance(ours, plain) < 1e-6


def test_a_step_inside_autocast_equals_the_usual_loop() -> None:
    model, batches = mlp(), [vectors(6) for _ in range(STEPS)]
    other = twin(model)
    step = kfac_fx.compile(other, F.cross_entropy, method=Identity(), optimizer=adamw(other), backend="eager")
    optimizer, losses, ours = adamw(model), [], []
    for inputs, targets in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours.append(step(inputs, targets))
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert differing(snapshot(other), snapshot(model)) == []
    assert torch.equal(torch.stack(ours), torch.stack(losses))
    dtypes = {
        n.meta["val"].dtype
        for n in step.graphs["plain"].graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    }
    assert torch.bfloat16 in dtypes
    assert torch.is_autocast_cache_enabled()


def test_autocast_on_and_off_are_two_captures() -> None:
    model, batch = mlp(), vectors(6)
    step = kfac_fx.compile(model, F.cross_entropy, method=Identity(), optimizer=sgd(model), backend="eager")
    other = twin(model)
    optimizer = sgd(other)
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ours = step(*batch)
            loss = F.cross_entropy(other(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(ours, loss.detach())
    assert differing(snapshot(model), snapshot(other)) == []


def test_a_learning_rate_scheduler_acts_as_ever() -> None:
    model = conv_net()
    other, batches = twin(model), [images(5) for _ in range(STEPS)]
    optimizers = {id(m): sgd(m) for m in (model, other)}
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizers[id(m)], max_lr=0.2, total_steps=STEPS + 1)
        for m in (model, other)
    ]
    step = kfac_fx.compile(
        other, F.cross_entropy, method=Identity(), optimizer=optimizers[id(other)], backend="eager"
    )
    torch.manual_seed(0)
    for batch in batches:
        step(*batch)
        schedulers[1].step()
    torch.manual_seed(0)
    for batch in batches:
        plain_step(model, F.cross_entropy, optimizers[id(model)], batch)
        schedulers[0].step()
    assert differing(snapshot(other), snapshot(model)) == []
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


def test_a_smaller_last_batch_and_batches_of_any_size_just_work() -> None:
    ours, plain = both(conv_net(), [images(size) for size in (6, 6, 2, 6, 6, 2, 5, 6)], sgd)
    assert differing(ours, plain) == []


def test_train_and_eval_mode_may_alternate() -> None:
    model, batch = conv_net(), images(5)
    other = twin(model)
    step = kfac_fx.compile(other, F.cross_entropy, method=Identity(), optimizer=sgd(other), backend="eager")
    optimizer = sgd(model)
    for mode in (True, False, True, False):
        torch.manual_seed(1)
        ours = step.model.train(mode) and step(*batch)
        torch.manual_seed(1)
        assert torch.equal(ours, plain_step(model.train(mode), F.cross_entropy, optimizer, batch))
    assert differing(snapshot(other), snapshot(model)) == []


def test_freezing_and_unfreezing_between_steps_is_followed() -> None:
    model, batch = mlp(), vectors(5)
    other = twin(model)
    step = kfac_fx.compile(other, F.cross_entropy, method=Identity(), optimizer=sgd(other), backend="eager")
    optimizer = sgd(model)
    for trainable in (True, False, True):
        for each in (model, other):
            each[0].requires_grad_(trainable)
        assert torch.equal(step(*batch), plain_step(model, F.cross_entropy, optimizer, batch))
    assert differing(snapshot(other), snapshot(model)) == []


def test_the_inductor_backend_agrees_within_rounding() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    ours, plain = both(model, [vectors(6) for _ in range(STEPS)], sgd, backend="inductor")
    assert distance(ours, plain) < 1e-6


def test_one_graph_per_variant_and_no_recompilation_when_the_learning_rate_changes() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=10)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(50):
            step(torch.randn(5, 3), torch.randint(2, (5,)))
            scheduler.step()
    counters = torch._dynamo.utils.counters
    # "plain", "statistics", and "batch_statistics", whose statistics are inverted before they are applied
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


# ---------------------------------------------------------------- accumulation


def double(batch: Batch) -> Batch:
    """The batch with floating inputs in float64."""
    inputs = batch[0].double() if batch[0].is_floating_point() else batch[0]
    return inputs, batch[1]


class Gated(nn.Module):
    """Three layers that read one tensor.

    No softmax: it would make the summed gradient of the keys zero in theory, and its factor rounding noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.sigmoid(self.q(x) * self.k(x)) * self.v(x)).mean(1))


ACCUMULATED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "mlp": (mlp, vectors),
    "three readers of one tensor": (Gated, attended),
    "convolution, layer norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4)
        ),
        images,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.LayerNorm(15), nn.Linear(15, 4)),
        lambda size: (torch.randint(11, (size, 3)), torch.randint(4, (size,))),
    ),
    "tied weights": (Tied, tokens),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean cross-entropy": nn.CrossEntropyLoss(),
    "sum cross-entropy": nn.CrossEntropyLoss(reduction="sum"),
    "mean squared error": lambda f, y: F.mse_loss(f, F.one_hot(y, f.shape[1]).movedim(-1, 1).to(f.dtype)),
    "weighted, with ignored labels": nn.CrossEntropyLoss(
        weight=torch.arange(1.0, 5.0).double(), ignore_index=1
    ),
    "an unknown mean": lambda f, y: (f.gather(1, y.unsqueeze(1)) ** 4).mean(),
}


def halves(batch: Batch, at: int) -> list[Batch]:
    return [(batch[0][:at], batch[1][:at]), (batch[0][at:], batch[1][at:])]


def accumulated_and_whole(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], batches: list[Batch], sharing: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State after training on two unequal halves of each batch, and on the whole batches."""
    found = []
    for split in (True, False):
        copy = twin(model)
        method = kfac_fx.KFAC(statistics_every=1, inverse_every=2, damping=0.1)
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.05, momentum=0.9)
        step = kfac_fx.compile(
            copy, loss_fn, method=method, optimizer=optimizer, sharing=sharing, backend="eager"
        )
        for batch in batches:
            if split:
                for half in halves(batch, 2):
                    step.accumulate(*half)
                step.update()
            else:
                step(*batch)
        found.append(snapshot(copy, step))
    return found[0], found[1]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", ACCUMULATED)
def test_two_unequal_halves_equal_the_whole_batch(case: str, sharing: str) -> None:
    build, draw = ACCUMULATED[case]
    batches = [double(draw(7)) for _ in range(3)]
    halved, whole = accumulated_and_whole(build().double(), F.cross_entropy, batches, sharing)
    assert distance(halved, whole) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_two_unequal_halves_equal_the_whole_batch_for_every_loss(loss: str) -> None:
    loss_fn = LOSSES[loss]
    inputs = [torch.randn(7, 6).double() for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0, 2, 1])
    halved, whole = accumulated_and_whole(mlp().double(), loss_fn, [(x, labels) for x in inputs], "expand")
    assert distance(halved, whole) < 1e-10


def test_accumulate_alone_changes_no_parameter_and_three_parts_add_up() -> None:
    model, (x, y) = mlp().double(), double(vectors(9))
    other = twin(model)
    make = {m: kfac_fx.compile(m, F.cross_entropy, optimizer=sgd(m), backend="eager") for m in (model, other)}
    before = snapshot(model)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 9)):
        loss = make[model].accumulate(x[rows], y[rows])
        assert loss.shape == () and not loss.requires_grad
        assert differing(snapshot(model), before) == []
    make[model].update()
    make[other](x, y)
    assert distance(snapshot(model, make[model]), snapshot(other, make[other])) < 1e-10


# ---------------------------------------------------------------- continuation


def saved_and_loaded(state: object, path: object) -> dict:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("save_at", [4, 5])
def test_continuing_from_a_saved_state_is_bit_identical(
    make: MakeOptimizer, save_at: int, tmp_path: object
) -> None:
    """inverse_every=5: saving at 5 refreshes at once, saving at 4 uses the saved inverses first."""
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=5)
    model, batches = conv_net(), [images(size) for size in (6, 6, 6, 6, 6, 6, 6, 3, 6, 6, 3, 6)]
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=make(model), backend="eager")
    run_step(step, batches[:save_at])
    kept = saved_and_loaded({"model": model.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    rest = run_step(step, batches[save_at:], seed=9)

    other = conv_net()
    other.load_state_dict(kept["model"])
    again = kfac_fx.compile(other, F.cross_entropy, method=method, optimizer=make(other), backend="eager")
    again.load_state_dict(kept["step"])
    assert torch.equal(torch.stack(run_step(again, batches[save_at:], seed=9)), torch.stack(rest))
    assert differing(snapshot(other, again), snapshot(model, step)) == []


def test_a_state_can_be_loaded_into_a_step_that_has_already_run(tmp_path: object) -> None:
    model, batches = conv_net(), [images(6) for _ in range(9)]
    step = kfac_fx.compile(model, F.cross_entropy, optimizer=sgd(model), backend="eager")
    run_step(step, batches[:4])
    kept = saved_and_loaded({"model": model.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    first = run_step(step, batches[4:], seed=3)
    model.load_state_dict(kept["model"])
    step.load_state_dict(kept["step"])
    assert step.state_dict()["step"] == 4
    assert torch.equal(torch.stack(run_step(step, batches[4:], seed=3)), torch.stack(first))


def test_a_state_that_was_loaded_but_not_used_saves_unchanged(tmp_path: object) -> None:
    model = mlp()
    step = kfac_fx.compile(model, F.cross_entropy, optimizer=adamw(model), backend="eager")
    run_step(step, [vectors(5) for _ in range(3)])
    kept = saved_and_loaded(step.state_dict(), tmp_path / "state.pt")
    fresh = kfac_fx.compile(model, F.cross_entropy, optimizer=adamw(model), backend="eager")
    fresh.load_state_dict(kept)
    assert differing(snapshot(model, fresh), snapshot(model, step)) == []


def test_the_state_holds_tensors_and_plain_numbers_under_the_weights_names() -> None:
    model = mlp()
    step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
    run_step(step, [vectors(5)])
    state = step.state_dict()
    assert state["step"] == 1
    assert set(state["curvature"]) == {"0.weight", "2.weight"}
    assert {name: tuple(t.shape) for name, t in state["curvature"]["0.weight"].items()} == {
        "A": (1, 7, 7),
        "G": (1, 12, 12),
        "A_inverse": (1, 7, 7),
        "G_inverse": (1, 12, 12),
    }


def test_layers_that_read_one_tensor_share_one_a_in_memory_and_on_disk(tmp_path: object) -> None:
    model = Attention()
    step = kfac_fx.compile(model, F.cross_entropy, optimizer=sgd(model), backend="eager")
    run_step(step, [attended(5) for _ in range(2)])
    for state in (step.state_dict(), saved_and_loaded(step.state_dict(), tmp_path / "state.pt")):
        curvature = state["curvature"]
        places = {key: curvature[f"{key}.weight"]["A"].data_ptr() for key in ("q", "k", "v", "head")}
        assert places["q"] == places["k"] == places["v"] != places["head"]
        inverses = {curvature[f"{key}.weight"]["A_inverse"].data_ptr() for key in ("q", "k", "v")}
        assert len(inverses) == 3


# ---------------------------------------------------------------- schedules, Fisher, clip


def test_statistics_and_inverses_follow_their_schedules() -> None:
    model = mlp()
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=3)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=sgd(model), backend="eager")
    changed: dict[str, list[int]] = {"A": [], "G": [], "A_inverse": [], "G_inverse": []}
    before: dict[str, Tensor] = {}
    for index in range(10):
        step(*vectors(5))
        now = {name: t.clone() for name, t in step.state_dict()["curvature"]["2.weight"].items()}
        for name in changed:
            if name not in before or not torch.equal(before[name], now[name]):
                changed[name].append(index)
        before = now
    assert changed["A"] == changed["G"] == [0, 2, 4, 6, 8]
    assert changed["A_inverse"] == changed["G_inverse"] == [0, 3, 6, 9]


def test_the_moving_average_is_bias_corrected() -> None:
    model, batches = mlp().double(), [double(vectors(5)) for _ in range(4)]
    method = kfac_fx.KFAC(decay=0.5, inverse_every=100)
    step = kfac_fx.compile(
        model,
        F.cross_entropy,
        method=method,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        backend="eager",
    )
    rows = [torch.cat([x, torch.ones(5, 1, dtype=x.dtype)], 1) for x, _ in batches]
    weights = [0.5**3, 0.5**2, 0.5, 1.0]
    run_step(step, batches)
    expected = sum(w * r.T @ r / 5 for w, r in zip(weights, rows, strict=True)) / sum(weights)
    found = step.state_dict()["curvature"]["0.weight"]["A"][0]
    assert (found - expected).norm() < 1e-12 * expected.norm()


def test_the_sampled_fisher_draws_new_labels_at_every_statistics_update() -> None:
    model, batch = mlp(), vectors(8)
    method = kfac_fx.KFAC(decay=0.0, inverse_every=2)
    step = kfac_fx.compile(
        model,
        F.cross_entropy,
        method=method,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        fisher="mc",
        backend="eager",
    )
    drawn = []
    for _ in range(6):
        step(*batch)
        drawn.append({n: t.clone() for n, t in step.state_dict()["curvature"]["2.weight"].items()})
    assert all(torch.equal(one["A"], drawn[0]["A"]) for one in drawn)
    for index, one in enumerate(drawn):
        assert all(not torch.equal(one["G"], other["G"]) for other in drawn[:index])


def test_steps_without_statistics_draw_no_labels() -> None:
    """Dropout masks of the model must not depend on the Fisher in steps that do not collect statistics."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 4))
    losses = {}
    for fisher in ("mc", "empirical"):
        copy, batch = twin(model), None
        method = kfac_fx.KFAC(statistics_every=50, inverse_every=50)
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.0)
        step = kfac_fx.compile(
            copy, F.cross_entropy, method=method, optimizer=optimizer, fisher=fisher, backend="eager"
        )
        batch = (torch.ones(5, 6), torch.arange(5) % 4)
        step(*batch)
        losses[fisher] = torch.stack(run_step(step, [batch] * 5, seed=4))
    assert torch.equal(losses["mc"], losses["empirical"])


def test_the_kl_clip_scales_all_layers_to_the_bound() -> None:
    """nu = min(1, sqrt(kappa / |sum lr^2 <V, grad>|)), with each parameter group's own learning rate."""
    model, (x, y) = mlp().double(), double(vectors(8))
    rates = {"0.weight": 0.3, "0.bias": 0.3, "2.weight": 0.7, "2.bias": 0.7}

    def change(kl_clip: float | None) -> dict[str, Tensor]:
        copy = twin(model)
        groups = [{"params": [p], "lr": rates[name]} for name, p in copy.named_parameters()]
        method = kfac_fx.KFAC(kl_clip=kl_clip, damping=0.1)
        step = kfac_fx.compile(
            copy, F.cross_entropy, method=method, optimizer=torch.optim.SGD(groups), backend="eager"
        )
        step(x, y)
        before = dict(model.named_parameters())
        return {name: (p - before[name]).detach() for name, p in copy.named_parameters()}

    free = change(None)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    quadratic = -sum(
        rates[name] * (free[name] * gradient).sum() for name, gradient in zip(free, gradients, strict=True)
    )
    assert quadratic > 0
    for share in (0.01, 0.5, 4.0):
        clipped = change(float(share * quadratic))
        for name in free:
            expected = min(1.0, share**0.5) * free[name]
            assert (clipped[name] - expected).norm() < 1e-10 * expected.norm()


def test_the_returned_loss_is_a_detached_scalar_and_no_gradient_is_left_behind() -> None:
    model = mlp()
    step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
    for _ in range(2):
        loss = step(*vectors(5))
        assert loss.shape == () and not loss.requires_grad and loss.dtype is torch.float32
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_any_matched_layer_trains_with_plain_gradients() -> None:
    model, (x, y) = mlp(), vectors(5)
    other = twin(model)
    step = kfac_fx.compile(other, F.cross_entropy, optimizer=sgd(other), exclude=("*",), backend="eager")
    optimizer = sgd(model)
    for _ in range(3):
        assert torch.equal(step(x, y), plain_step(model, F.cross_entropy, optimizer, (x, y)))
    assert differing(snapshot(model), snapshot(other)) == []
    assert step.plan.coverage == 0.0


def test_excluded_parameters_get_their_plain_gradient() -> None:
    model, (x, y) = mlp(), vectors(5)
    other = twin(model)
    step = kfac_fx.compile(
        other,
        F.cross_entropy,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.5),
        exclude=("2.*",),
        backend="eager",
    )
    step(x, y)
    plain_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.5), (x, y))
    assert torch.equal(model[2].weight, other[2].weight) and torch.equal(model[2].bias, other[2].bias)
    assert not torch.equal(model[0].weight, other[0].weight)
    assert {skip.parameter for skip in step.plan.skipped} == {"2.weight", "2.bias"}


def test_damping_of_nearly_infinite_size_turns_towards_the_gradient() -> None:
    """(G + c I)^-1 grad (A + d I)^-1 tends to grad / lambda: checks layouts end to end against plain SGD."""
    model, (x, y) = conv_net().double(), double(images(5))
    model[3].p = 0.0
    other, damping = twin(model), 1e8
    step = kfac_fx.compile(
        other,
        F.cross_entropy,
        method=kfac_fx.KFAC(damping=damping, kl_clip=None, damping_rule="sqrt"),
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1 * damping),
        backend="eager",
    )
    step(x, y)
    plain_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), (x, y))
    assert distance(snapshot(other), snapshot(model)) < 1e-3
