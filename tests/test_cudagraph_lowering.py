"""Programs as CUDA graphs: whatever outlives a run is copied out of the memory that the next run reuses.

On a CPU there are no CUDA graphs. The stand-in runs a program eagerly and returns its outputs the way a
replay does: in one memory that all programs share, which the next run of any of them overwrites, first with
NaN and with ones for whole numbers.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import kfac_fx
from kfac_fx import host, lower
from kfac_fx.errors import NonFiniteLossError
from tests.test_every_method import DISTINCT, step_of, vectors
from tests.training import differing, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


class Pool:
    """Memory of all replays, by place, shape and dtype. marked: addresses that were declared to stay."""

    def __init__(self) -> None:
        self.memory: dict[Any, Tensor] = {}
        self.modes: list[str] = []
        self.begun = 0
        self.marked: set[int] = set()

    def compiled(self, module: GraphModule, mode: str) -> Callable[..., Sequence[Tensor]]:
        self.modes.append(mode)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            for held in self.memory.values():
                held.fill_(torch.nan if held.is_floating_point() else 1)
            return [self.kept(place, output) for place, output in enumerate(module(*tensors))]

        return run

    def kept(self, place: int, output: Tensor) -> Tensor:
        key = place, output.shape, output.stride(), output.dtype
        held = self.memory.setdefault(key, torch.empty_like(output))
        return held.copy_(output)

    def begin(self) -> None:
        self.begun += 1


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """`backend="inductor"` is run by the stand-in, and takes a CPU for a device with CUDA graphs."""
    found = Pool()
    monkeypatch.setattr(lower, "compiled", found.compiled)
    monkeypatch.setattr(lower, "uses_cuda_graphs", lambda backend, device: backend == "inductor")
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", found.begin)
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda t: found.marked.add(t.data_ptr()))
    return found


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))


def pair(name: str, **options: Any) -> tuple[nn.Module, kfac_fx.TrainStep, nn.Module, kfac_fx.TrainStep]:
    model = net()
    other = twin(model)
    return model, step_of(model, name, **options), other, step_of(other, name, backend="inductor", **options)


CASES = [(name, False, "together") for name in DISTINCT]
CASES += [("kfac", True, "together"), ("nkfac", True, "staggered"), ("kfac", False, "staggered")]


@pytest.mark.parametrize(("name", "behind", "refresh"), CASES)
def test_a_run_of_replays_is_the_eager_run_bit_for_bit(
    name: str, behind: bool, refresh: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "waits", lambda device: behind)
    every = 3 if refresh == "staggered" else 2
    model, eager, other, replayed = pair(name, settings={"statistics_every": every}, refresh=refresh)
    returned, wanted = [], []
    for _ in range(7):
        batch = vectors(6)
        wanted.append(eager(*batch).clone())
        returned.append(replayed(*batch))
    assert torch.equal(torch.stack(returned), torch.stack(wanted))  # each outlives the steps after it
    assert not differing(snapshot(model, eager), snapshot(other, replayed))
    assert set(pool.modes) == {"reduce-overhead"} and pool.begun >= 7
    assert pool.marked == {buffer.data_ptr() for buffer in other.buffers()}  # those of the batch norm


@pytest.mark.parametrize(("name", "behind"), [("kfac", False), ("skfac", True)])
def test_accumulated_batches_outlive_the_replays_between(
    name: str, behind: bool, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "waits", lambda device: behind)
    model, eager, other, replayed = pair(name)
    for _ in range(3):
        parts = [vectors(4) for _ in range(3)]
        for step in (eager, replayed):
            for part in parts:
                step.accumulate(*part)
            step.update()
    assert not differing(snapshot(model, eager), snapshot(other, replayed))


@pytest.mark.parametrize("behind", [False, True])
def test_a_batch_that_is_not_finite_is_undone_after_replays_as_in_the_eager_run(
    behind: bool, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "waits", lambda device: behind)
    model, eager, other, replayed = pair("kfac", settings={"statistics_every": 2})
    for index in range(9):
        inputs, targets = vectors(6)
        if index in (3, 4, 6):
            inputs = inputs * torch.nan
        for step in (eager, replayed):
            try:
                step(inputs, targets)
            except NonFiniteLossError:
                assert index > 2
    for step in (eager, replayed):
        try:
            step.state_dict()
        except NonFiniteLossError:
            pass
    after = snapshot(model, eager)
    assert not differing(after, snapshot(other, replayed))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_without_the_copies_the_stand_in_spoils_the_run(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_owning", lambda run, mutated: run)
    model, eager, other, replayed = pair("kfac")
    for _ in range(3):
        batch = vectors(6)
        for step in (eager, replayed):
            try:
                step(*batch)
            except NonFiniteLossError:
                assert step is replayed
    assert differing(snapshot(model, eager), snapshot(other, replayed))


@pytest.mark.parametrize(
    ("backend", "device", "resolved", "mode"),
    [
        ("auto", "cpu", "eager", None),
        ("auto", "cuda", "inductor", "reduce-overhead"),
        ("inductor", "cuda", "inductor", "reduce-overhead"),
        ("inductor", "cpu", "inductor", "default"),
        ("inductor-no-cudagraphs", "cuda", "inductor-no-cudagraphs", "default"),
        ("eager", "cuda", "eager", None),
    ],
)
def test_the_backend_decides_whether_cuda_graphs_are_used(
    backend: str, device: str, resolved: str, mode: str | None
) -> None:
    found = lower.resolve_backend(backend, torch.device(device))
    assert (found, lower.compile_mode(found, torch.device(device))) == (resolved, mode)


def test_a_program_compiles_in_the_mode_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that mode records nothing, but torch takes the marks, the products and the mode."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    step, data = step_of(model, "kfac"), (torch.randn(5, 3), torch.randint(4, (5,)))
    step(*data)
    monkeypatch.setattr(lower, "uses_cuda_graphs", lambda backend, device: backend == "inductor")
    module = step.graphs["batch_statistics"]
    runs = [lower.lower(module, "eager"), lower.lower(lower.with_full_float32(module), "inductor")]
    outputs = [run(*model.parameters(), *copy.deepcopy(list(model.buffers())), *data) for run in runs]
    torch.testing.assert_close(list(outputs[0]), list(outputs[1]))
