"""What is inserted multiplies in full float32 on CUDA; the model's products keep what the user allows.

The flags are the host's, so a CPU shows which of them each product would have met.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_fx
from kfac_fx import lower, precision
from kfac_fx.forms import preferred
from kfac_fx.instrument import instrument

CUDA = torch.device("cuda")
MATMUL, CONV, MKLDNN = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.convolution_backward")


def flags() -> tuple[str, ...]:
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "refused"
    return MATMUL.fp32_precision, CONV.fp32_precision, legacy, MKLDNN.fp32_precision


@pytest.fixture(autouse=True)
def flags_come_back() -> Iterator[None]:
    before = flags()
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision, CONV.fp32_precision, _, MKLDNN.fp32_precision = before
    assert flags() == before


def allow(how: str) -> None:
    if how == "allow_tf32":
        MATMUL.allow_tf32 = True
    elif how == "fp32_precision":
        MATMUL.fp32_precision = "tf32"
    elif how != "default":
        torch.set_float32_matmul_precision(how)


@pytest.mark.parametrize("how", ["default", "high", "medium", "allow_tf32", "fp32_precision"])
def test_tf32_is_off_inside_and_comes_back_after_an_error_however_it_was_allowed(how: str) -> None:
    allow(how)
    before = flags()
    with pytest.raises(KeyError), precision.full_float32(CUDA):
        assert flags()[:3] == ("ieee", "ieee", "highest")
        assert not MATMUL.allow_tf32  # torch raises here where its two flags disagree
        raise KeyError
    assert flags() == before
    with precision.full_float32(torch.device("cpu")):
        assert flags() == before


def test_contexts_of_threads_that_overlap_leave_tf32_off_until_the_last_ends() -> None:
    allow("high")
    before, inside = flags(), ("ieee", "ieee", "highest")
    first, second = precision.full_float32(CUDA), precision.full_float32(CUDA)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not that which was entered last: the threads do not know of each other
    assert flags()[:3] == inside
    with precision.full_float32(CUDA):
        assert flags()[:3] == inside
    assert flags()[:3] == inside
    second.__exit__(None, None, None)
    assert flags() == before


class Seen(TorchDispatchMode):
    """Products in their order, with the flags that each met."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) in PRODUCTS:
            self.found.append((str(func.overloadpacket), *flags()[:2]))
        return func(*args, **(kwargs or {}))


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))


def program(form: str, dtype: torch.dtype) -> tuple[GraphModule, list[Tensor]]:
    model, data = conv_net().to(dtype), (torch.randn(5, 3, 6, 6, dtype=dtype), torch.randint(3, (5,)))
    plan = kfac_fx.inspect(model, F.cross_entropy, *data)
    geometry = next(m.uses[0].geometry for m in plan.matched if m.uses[0].geometry is not None)
    assert geometry is not None
    with preferred({(geometry, 5, 3, "cpu"): form}):  # type: ignore[dict-item]
        plan = kfac_fx.inspect(model, F.cross_entropy, *data)
    module = instrument(plan, "statistics").module
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    extra = [torch.rand(value.shape, dtype=value.dtype) for value in values[len([*model.parameters()]) + 2 :]]
    return module, [*model.parameters(), *data, *extra]


def inserted(module: GraphModule, targets: Callable[[str], bool]) -> list[Any]:
    nodes = (n for n in module.graph.nodes if str(n.meta.get("kfac_fx", "")).startswith("inserted"))
    return [n for n in nodes if targets(str(n.target))]


@pytest.mark.parametrize("form", ["patches", "products", "shifts", "transform", "convolution"])
def test_inserted_products_meet_full_float32_and_the_models_own_do_not(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tensors = program(form, torch.float32)
    changed = lower.with_full_float32(module)
    wanted = module(*tensors)
    assert not inserted(changed, lambda target: target.startswith(PRODUCTS))
    count = len(inserted(module, lambda target: target.startswith(PRODUCTS)))
    assert len(inserted(changed, lambda target: target.startswith("kfac_fx."))) == count > 8

    full, met = precision.full_float32, []

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        with full(CUDA):
            met.append(flags()[:2])
            yield

    monkeypatch.setattr(precision, "full_float32", recorded)
    allow("high")
    own = flags()[:2]
    with torch.no_grad():
        with Seen() as before:
            module(*tensors)
        with Seen() as after:  # not inside the operators
            found = changed(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert met == [("ieee", "ieee")] * count
    assert len(after.found) == len(before.found) - count > 3
    assert {seen[1:] for seen in before.found + after.found} == {own} == {("tf32", "tf32")}


def test_products_of_float64_stay() -> None:
    module, _ = program("convolution", torch.float64)
    changed = lower.with_full_float32(module)
    assert [str(n.target) for n in changed.graph.nodes] == [str(n.target) for n in module.graph.nodes]


def test_the_program_that_is_read_is_not_changed() -> None:
    module, _ = program("convolution", torch.float32)
    before = module.print_readable(print_output=False)
    lower.with_full_float32(module)
    assert module.print_readable(print_output=False) == before and "kfac_fx.mm" not in before


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_the_operators_are_torchs(name: str) -> None:
    batch = (2,) if "b" in name else ()
    added, left, right = torch.randn(*batch, 3, 5), torch.randn(*batch, 3, 4), torch.randn(*batch, 4, 5)
    arguments = (added, left, right) if "add" in name else (left, right)
    scales = {"beta": 0.5, "alpha": 2.0} if "add" in name else {}
    found = getattr(torch.ops.kfac_fx, name)(*arguments, **scales)
    assert torch.equal(found, getattr(torch, name)(*arguments, **scales))
    torch.library.opcheck(
        getattr(torch.ops.kfac_fx, name).default,
        arguments,
        scales,
        test_utils=("test_schema", "test_faketensor"),
    )
