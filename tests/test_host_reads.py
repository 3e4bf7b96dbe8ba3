"""No step reads a value of the device but a layer's first, where the device runs behind Python.

On a CPU nothing runs behind: the tests say that it does, and find every call that would wait on CUDA, in
Python (`item`, `tolist`, truth values, numbers copied from the host) and below it (`_local_scalar_dense`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fx
from kfac_fx import host
from kfac_fx.errors import NonFiniteLossError
from tests.training import differing, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

READS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")
)
FROM_HOST = frozenset({torch.tensor, torch.as_tensor, torch.scalar_tensor})
DISPATCHED = frozenset(
    {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero}
)
KFAC = kfac_fx.KFAC(statistics_every=2, inverse_every=4)
NKFAC = kfac_fx.NKFAC(statistics_every=2, inverse_every=4, exact_every=2)


class Python(TorchFunctionMode):
    """Counts calls that wait for a CUDA device: reads, and numbers that become tensors there."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = func in FROM_HOST and kwargs.get("device") is not None
        copied |= func in (torch.where, Tensor.where) and any(isinstance(a, (int, float)) for a in args)
        if func in READS or copied:
            self.found[func.__name__] += 1
        return func(*args, **kwargs)


class Below(TorchDispatchMode):
    """Counts operators that bring a value to the host."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in DISPATCHED:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    with Python(found), Below(found):
        yield found


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device runs behind Python."""
    monkeypatch.setattr(host, "waits", lambda device: True)


def net() -> nn.Module:
    parts = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 8), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 5, 5), torch.randint(3, (6,))


def compiled(model: nn.Module, method: Any = KFAC, **options: Any) -> kfac_fx.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"backend": "eager"} | options
    return kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, **options)


def reads_of_each_step(step: kfac_fx.TrainStep, count: int) -> list[Counter[str]]:
    """Those of every step after the fourth, each with another learning rate."""
    for _ in range(4):
        step(*batch())
    found = []
    for index in range(count):
        data = batch()
        step.optimizer.param_groups[0]["lr"] = 0.01 / (index + 2)
        with counted() as reads:
            step(*data)
        found.append(reads)
    return found


RULES = [kfac_fx.KFAC(statistics_every=2, inverse_every=4, damping_rule=rule) for rule in ("sqrt", "full")]


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("refresh", ["together", "staggered"])
@pytest.mark.parametrize(
    "method", [KFAC, NKFAC, kfac_fx.KFC(statistics_every=2, inverse_every=4), *RULES], ids=lambda m: m.name
)
def test_no_step_after_the_first_reads_the_device(method: Any, refresh: str) -> None:
    step = compiled(net(), method, refresh=refresh)
    assert reads_of_each_step(step, 9) == [Counter()] * 9
    kinds = step.state_dict()["counts"]
    assert set(kinds["refreshes"].values()) <= {3, 4, 5} and set(kinds["statistics"].values()) == {7}


@pytest.mark.usefixtures("behind")
def test_no_accumulated_update_reads_the_device() -> None:
    step = compiled(net())
    found = []
    for _ in range(8):
        data = batch()
        with counted() as reads:
            step.accumulate(*data)
            step.accumulate(*data)
            step.update()
        found.append(reads)
    assert found[0] and found[2:] == [Counter()] * 6  # the first two of a kind write their programs too


@pytest.mark.parametrize("method", [KFAC, NKFAC], ids=lambda m: m.name)
def test_the_counter_finds_the_reads_of_a_device_that_does_not_run_behind(method: Any) -> None:
    found = reads_of_each_step(compiled(net(), method), 9)
    assert all(reads["__bool__"] and reads["_local_scalar_dense"] for reads in found)  # the check of the loss
    refreshes, others = found[0] + found[4], found[1] + found[5]
    assert sum(refreshes.values()) > sum(others.values())  # the inverses'


@pytest.mark.usefixtures("behind")
def test_the_first_step_still_reads_what_it_needs() -> None:
    step, data = compiled(net()), batch()
    with counted() as reads:
        step(*data)
    assert reads["_local_scalar_dense"]


@pytest.mark.parametrize("refresh", ["together", "staggered"])
@pytest.mark.parametrize("method", [KFAC, NKFAC], ids=lambda m: m.name)
def test_a_step_that_does_not_read_gives_the_same_bits(
    method: Any, refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    other = twin(model)
    at_once = compiled(model, method, refresh=refresh)
    monkeypatch.setattr(host, "waits", lambda device: True)
    behind = compiled(other, method, refresh=refresh)
    for _ in range(9):
        data = batch()
        assert torch.equal(at_once(*data), behind(*data))
    assert not differing(snapshot(model, at_once), snapshot(other, behind))


def run_bad(step: kfac_fx.TrainStep, how: str, data: tuple[Tensor, Tensor]) -> None:
    if how == "step":
        assert not torch.isfinite(step(*data))
        return
    step.accumulate(*batch())
    step.accumulate(*data)
    with pytest.raises(NonFiniteLossError, match="1 call ago"):
        step.update()
    step.update()


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(
    ("method", "good", "how"),
    [(KFAC, 4, "step"), (KFAC, 5, "accumulate"), (KFAC, 6, "step"), (KFAC, 6, "accumulate"),
     (NKFAC, 4, "accumulate"), (NKFAC, 5, "step"), (NKFAC, 6, "step")],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_a_batch_that_is_not_finite_leaves_factors_and_buffers_and_is_reported_later(
    method: Any, good: int, how: str
) -> None:
    model = net()
    step = compiled(model, method)
    for _ in range(good):
        step(*batch())
    before = snapshot(model, step)
    velocity = {n: step.optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    inputs, targets = batch()
    run_bad(step, how, (inputs * torch.nan, targets))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    if how == "step":
        with pytest.raises(NonFiniteLossError, match=r"1 call ago the loss is nan.* repeat it"):
            step(*batch())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    for name, moved in parameters.items():  # momentum alone
        torch.testing.assert_close(moved, before[name] - 0.01 * 0.9 * velocity[name])
    after = snapshot(model, step)
    kept = [n for n in before if n.endswith((".A", ".G", ".F", "running_mean", "running_var"))]
    assert len(kept) >= 7
    if how == "step":
        assert not set(differing(before, after)) & {*kept, *(n for n in before if "num_batches" in n)}
    else:  # the good half has moved the buffers of the norm
        assert not set(differing(before, after)) & {n for n in kept if "running" not in n}
    assert torch.isfinite(step(*batch()))
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(model, step).values())


@pytest.mark.usefixtures("behind")
def test_a_gradient_that_is_not_finite_is_reported_by_state_dict() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    step = kfac_fx.compile(model, lambda y, t: ((y - t) ** 2).sum(1).sqrt().mean(), backend="eager")
    inputs = torch.randn(4, 3)
    step(inputs, torch.randn(4, 2))
    assert torch.isfinite(step(inputs, model(inputs).detach()))  # the root has no derivative at zero
    with pytest.raises(NonFiniteLossError, match="1 call ago .* its gradient is not finite"):
        step.state_dict()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    step.state_dict()


def indefinite(step: kfac_fx.TrainStep, key: str) -> None:
    """Give a layer a G that no damping of its rule makes positive definite."""
    owner = step._curvature._layers[key]["G"]
    step._curvature._tensors[owner] = -torch.eye(3)[None] * 1e3


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_factor_that_fails_keeps_its_inverse_and_the_next_refresh_retries(resumed: bool) -> None:
    method = kfac_fx.KFAC(statistics_every=100, inverse_every=2)
    model = net()
    step = compiled(model, method)
    step(*batch())
    step(*batch())
    before = step.state_dict()["curvature"]["6.weight"]["G_inverse"].clone()
    indefinite(step, "6.weight")
    with counted() as reads:
        step(*batch())
    assert reads == Counter()
    assert step.counts == {"retried": 0, "kept_last": 1}
    assert torch.equal(step.state_dict()["curvature"]["6.weight"]["G_inverse"], before)
    if resumed:
        other = twin(model)
        state = step.state_dict()
        assert state["counts"]["troubled"]
        step = compiled(other, method)
        step.load_state_dict(state)
    step(*batch())
    with counted() as reads:
        step(*batch())
    assert reads["_local_scalar_dense"]
    assert step.counts["retried"] >= 1 and step.counts["kept_last"] == 2


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.item(),
    "tolist": lambda t: t.tolist(),
    "__bool__": bool,
    "__float__": float,
    "nonzero": lambda t: t.nonzero(),
    "tensor": lambda t: torch.tensor(1.0, device=t.device),
    "where": lambda t: torch.where(t > 0, t, 0.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_counter_counts(name: str) -> None:
    value = torch.ones(())
    with counted() as reads:
        CALLS[name](value)
    assert reads[name]
    with counted() as reads:
        torch.where(value > 0, value, value).masked_fill(value > 2, 0.0)
    assert reads == Counter()
