"""Functions that were traced for one capture are found by later ones, as they would trace them."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import kfac_fx
from kfac_fx import graph, traces
from kfac_fx.instrument import instrument
from tests.training import differing, run_step, snapshot


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * width, 3))


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(size, 2, 6, 6), torch.randint(3, (size,))) for _ in range(4)]


def trained(model: nn.Module, **settings: float) -> kfac_fx.TrainStep:
    method = kfac_fx.KFAC(inverse_every=2, **settings)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, backend="eager")
    run_step(step, batches())
    return step


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many functions were traced since the last look. Starts with none that can be found."""
    calls, original = [], graph.traced
    monkeypatch.setattr(graph, "traced", lambda *args: (calls.append(1), original(*args))[1])

    def since() -> int:
        number = len(calls)
        calls.clear()
        return number

    yield since


def test_a_second_step_of_an_equal_model_finds_the_layers_functions(counted: Callable[[], int]) -> None:
    trained(network())
    first = counted()
    trained(network())
    assert 0 < counted() <= first - 6  # statistics, fold and precondition of two layers


@pytest.mark.parametrize(("width", "damping", "found"), [(4, 0.5, 2), (6, 0.03, 0)])
def test_other_settings_and_sizes_are_traced_anew(
    width: int, damping: float, found: int, counted: Callable[[], int]
) -> None:
    """But for the check of the gradients and the products with directions, which know no settings."""
    trained(network())
    first = counted()
    trained(network(width), damping=damping)
    assert counted() == first - found


def test_what_is_found_gives_the_same_bits_as_what_is_traced() -> None:
    traces.forget()
    one, two = network(), network()
    first, second = trained(one), trained(two)
    assert differing(snapshot(one, first), snapshot(two, second)) == []


def test_another_default_dtype_does_not_find_the_traces(counted: Callable[[], int]) -> None:
    trained(network())
    first = counted()
    torch.set_default_dtype(torch.float64)
    try:
        model = network()
        step = trained(model)
        found = counted()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == first
    assert {t.dtype for t in step.state_dict()["curvature"]["0.weight"].values()} == {torch.float64}


def test_the_traces_keep_no_model_alive() -> None:
    model = network()
    step = trained(model)
    seen = weakref.ref(model)
    del model, step
    gc.collect()
    assert seen() is None


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_MOST", 3)
    trained(network())
    assert len(traces._everywhere) == 3


def traced_by_torch(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Node]
) -> tuple[Graph, dict[str, Tensor]]:
    """What `graph.traced` returns, by `make_fx`."""
    with graph.fake_mode(arguments[0].graph):
        values = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in map(graph.value, arguments)
        ]
        module = make_fx(lambda *tensors: tuple(function(*tensors)))(*values)
    module.graph.eliminate_dead_code()
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return module.graph, {name: getattr(module, name) for name in read}


@pytest.mark.parametrize("name", ["kfac", "ekfac", "nkfac", "skfac", "singd"])
def test_the_programs_are_those_that_torchs_own_tracer_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = batches()[0]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), network())
    code = []
    for tracer in (graph.traced, traced_by_torch):
        monkeypatch.setattr(graph, "traced", tracer)
        traces.forget()
        plan = kfac_fx.inspect(nn.Sequential(model[0], nn.Conv2d(4, 2, 1), model[1]), None, x, y, method=name)
        code.append(instrument(plan, "statistics").module.code)
    assert code[0] == code[1] and "bmm" in code[0]
