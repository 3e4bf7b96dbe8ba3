"""No step reads a value of the device but a layer's first, where the device runs behind Python.

On a CPU nothing runs behind: the tests say that it does, and count what would wait (`waits.py`).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import NonFiniteLossError
from kfac_fx.methods import METHODS
from tests.training import differing, snapshot, twin
from tests.waits import counted, running_behind

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

EVERY = {
    name: cls(statistics_every=2, **({"inverse_every": 4} if cls.inverse_every else {}))
    for name, cls in METHODS.items()
}
KFAC, SKFAC = EVERY["kfac"], kfac_fx.SKFAC(statistics_every=2, inverse_every=4, window=3)
NKFAC = kfac_fx.NKFAC(statistics_every=2, inverse_every=4, exact_every=2)


@pytest.fixture
def behind() -> Iterator[None]:
    """Every device runs behind Python for a whole test."""
    with running_behind():
        yield


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


def reads_beside_a_twin_that_reads(method: Any, refresh: str, count: int) -> list[Counter[str]]:
    """Reads of each step after the fourth; losses, parameters and state are those of a model that may read.

    To the bit, but for the rule whose largest eigenvalue is found in another way.
    """
    model = net()
    other = twin(model)
    reading = compiled(model, method, refresh=refresh)
    with running_behind():
        behind = compiled(other, method, refresh=refresh)
    found = []
    for index in range(4 + count):
        data = batch()
        for step in (reading, behind):
            step.optimizer.param_groups[0]["lr"] = 0.01 / (index + 2)
        loss = reading(*data)
        with running_behind(), counted() as reads:
            own = behind(*data)
        assert torch.equal(loss, own) or (method is RELATIVE and torch.allclose(loss, own))
        found.append(reads)
    before, after = snapshot(model, reading), snapshot(other, behind)
    if method is RELATIVE:
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)
    assert method is RELATIVE or not differing(before, after)
    counts = behind.state_dict()["counts"]
    assert set(counts["statistics"].values()) == {7} and set(counts["refreshes"].values()) <= {3, 4, 5}
    return found[4:]


RULED = {
    rule: kfac_fx.KFAC(statistics_every=2, inverse_every=4, damping_rule=rule)
    for rule in ("sqrt", "full", "relative", "tikhonov")
}
RELATIVE = RULED["relative"]
UNDAMPED = kfac_fx.KFAC(statistics_every=2, inverse_every=4, damping=0.0)
EIGEN = {"ekfac": EVERY["ekfac"], "tikhonov": RULED["tikhonov"]}
SILENT = {name: method for name, method in EVERY.items() if name not in EIGEN}
SILENT |= {"nkfac": NKFAC, "window": SKFAC} | {rule: RULED[rule] for rule in ("sqrt", "full", "relative")}
STAGGERED = [
    pytest.param(SILENT[name], "staggered", id=f"{name}-staggered")
    for name in ("kfac", "kfc", "nkfac", "sqrt", "full", "window")
]


@pytest.mark.parametrize(
    ("method", "refresh"), [*(pytest.param(m, "together", id=name) for name, m in SILENT.items()), *STAGGERED]
)
def test_no_step_after_the_first_reads_the_device_and_the_bits_are_the_same(
    method: Any, refresh: str
) -> None:
    assert reads_beside_a_twin_that_reads(method, refresh, 9) == [Counter()] * 9


@pytest.mark.parametrize(
    ("method", "refresh"),
    [
        *(pytest.param(method, "together", id=name) for name, method in EIGEN.items()),
        pytest.param(UNDAMPED, "together", id="undamped"),
        pytest.param(EIGEN["ekfac"], "staggered", id="ekfac-staggered"),
    ],
)
def test_methods_by_eigenvectors_wait_at_a_refresh_alone_where_torch_decomposes(
    method: Any, refresh: str
) -> None:
    """And read once per decomposition of a size, right after it, whether there is a null space to settle."""
    found = reads_beside_a_twin_that_reads(method, refresh, 9)
    refreshes = (0, 4, 8) if refresh == "together" else (0, 1, 2, 4, 5, 6, 8)
    assert [bool(reads) for reads in found] == [index in refreshes for index in range(9)]
    for reads in found:
        decompositions, looks = reads.pop("_linalg_eigh", 0), reads.pop("__bool__", 0)
        assert reads.pop("_local_scalar_dense", 0) == looks <= decompositions
        assert looks == 0 or method is not UNDAMPED
        assert reads == Counter()


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(
    ("method", "loss_fn"), [(KFAC, F.cross_entropy), (KFAC, summed), (SKFAC, summed)], ids=lambda value: None
)
def test_no_accumulated_update_reads_the_device(method: Any, loss_fn: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = kfac_fx.compile(model, loss_fn, method=method, optimizer=optimizer, backend="eager")
    found = []
    for _ in range(12):
        data = batch()
        with counted() as reads:
            step.accumulate(*data)
            step.accumulate(*data)
            step.update()
        found.append(reads)
    first = 8 if method is SKFAC else 2  # of a kind, which write their programs too; until no factor grows
    assert found[0] and found[first:] == [Counter()] * (12 - first)


@pytest.mark.usefixtures("behind")
def test_the_quadratic_model_of_a_step_is_read_at_once() -> None:
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=4, quadratic_model=True)
    step = kfac_fx.compile(net(), F.cross_entropy, method=method, backend="eager")
    for index in range(6):
        data = batch()
        with counted() as reads:
            step(*data)
        assert index < 2 or reads["cpu"] == 1


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
     (NKFAC, 4, "accumulate"), (NKFAC, 5, "step"), (NKFAC, 6, "step"),
     (SKFAC, 4, "step"), (SKFAC, 6, "step"), (SKFAC, 6, "accumulate")],
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
    tracked = (".A", ".G", ".F", "_rows", "_weights", "running_mean", "running_var")
    kept = [n for n in before if n.endswith(tracked)]
    assert len(kept) >= 7
    if how == "step":
        assert not set(differing(before, after)) & {*kept, *(n for n in before if "num_batches" in n)}
    else:  # the good half has moved the buffers of the norm
        assert not set(differing(before, after)) & {n for n in kept if "running" not in n}
    assert torch.isfinite(step(*batch()))
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(model, step).values())


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("how", ["step", "accumulate"])
def test_a_batch_that_makes_thin_factors_grow_is_waited_for(how: str) -> None:
    model = net()
    step = compiled(model, kfac_fx.SKFAC(statistics_every=2, inverse_every=4))
    for _ in range(6):
        step(*batch())
    before, (inputs, targets) = snapshot(model, step), (torch.randn(8, 2, 5, 5), torch.randint(3, (8,)))
    if how == "step":
        with pytest.raises(NonFiniteLossError, match="curvature are unchanged"):
            step(inputs * torch.nan, targets)
        assert not differing(before, snapshot(model, step))
    else:
        step.accumulate(inputs * torch.nan, targets)
        with pytest.raises(NonFiniteLossError, match="1 call ago"):
            step.update()
        step.update()
        after = snapshot(model, step)
        assert not [name for name in differing(before, after) if name.endswith(("_rows", "_weights"))]
    rows = [name for name in before if name.endswith("A_rows")]
    for _ in range(2):
        assert torch.isfinite(step(inputs, targets))
    after = snapshot(model, step)
    assert rows and all(after[name].shape[1] == 8 > before[name].shape[1] for name in rows)


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
