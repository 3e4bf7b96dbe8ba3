"""What the statistics hold: no tensor of the graph dwarfs the activations, and none waits for the end."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import kfac_fx
from kfac_fx.forms import LARGEST_PATCHES


class Block(nn.Module):
    """A residual block of a ResNet for CIFAR."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Same size over the stride."""
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages, with a stem of another kernel."""

    def __init__(self, width: int, blocks: int, stem: nn.Module) -> None:
        super().__init__()
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        stages = [
            Block(i if k == 0 else o, o, s if k == 0 else 1) for i, o, s in sizes for k in range(blocks)
        ]
        self.body, self.head = nn.Sequential(stem, *stages), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.body(x).mean((2, 3)))


def pair(first: nn.Module, second: nn.Module) -> nn.Module:
    """Two layers."""
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten())


MODELS = {
    "resnet": (ResNet(8, 1, nn.Conv2d(3, 8, 3, 1, 1)), (32, 3, 32, 32)),
    "large kernels": (pair(nn.Conv2d(3, 8, 7, 2, 3), nn.Conv2d(8, 8, 9, 1, 4)), (16, 3, 48, 48)),
    "small images": (pair(nn.Conv2d(8, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)), (32, 8, 7, 7)),
    "without padding": (pair(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)), (64, 1, 28, 28)),
    "lines": (pair(nn.Conv1d(4, 8, 9, padding=4), nn.Conv1d(8, 8, 9, 2)), (32, 4, 200)),
    "depthwise": (pair(nn.Conv2d(16, 16, 7, 1, 3, groups=16), nn.Conv2d(16, 8, 1)), (16, 16, 14, 14)),
    "few examples": (pair(nn.Conv2d(8, 8, 9, 1, 4, groups=8), nn.Conv2d(8, 8, 3, 1, 2, 2)), (3, 8, 16, 16)),
    "channels last": (pair(nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)), (32, 4, 32, 32)),
}


def batch(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, sizes = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(sizes)
    if name == "channels last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    return model, x, torch.randint(10, (sizes[0],))


def made(module: GraphModule) -> Iterator[tuple[Node, bool, Tensor]]:
    """(node, whether it was inserted, value) of every node that makes a tensor; views make none."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        views = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if not views:
            yield node, node.meta.get("kfac_fx", "").startswith("inserted"), value


@pytest.mark.parametrize(("name", "sharing"), [*((name, "expand") for name in MODELS), ("resnet", "reduce")])
def test_no_tensor_of_the_statistics_dwarfs_the_largest_activation(name: str, sharing: str) -> None:
    model, x, y = batch(name)
    step = kfac_fx.compile(model, F.cross_entropy, sharing=sharing)
    step(x, y)
    module = step.graphs["statistics"]
    largest = max(value.numel() for _, inserted, value in made(module) if not inserted)
    state = max(
        node.meta["val"].numel()
        for node in module.graph.find_nodes(op="placeholder")
        if str(node.target).startswith("s_")
    )
    wrong = [
        (node.format_node(), value.numel() / largest)
        for node, inserted, value in made(module)
        if inserted and value.numel() > max(LARGEST_PATCHES * largest, state)
    ]
    assert not wrong


def peak_bytes(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> int:
    """Most bytes held at once, above those at the start."""
    run(x, y)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(x, y)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_a_statistics_step_peaks_at_a_quarter_more_than_a_plain_step_and_the_state() -> None:
    model, x, y = batch("resnet")
    often = kfac_fx.compile(model, F.cross_entropy, method=kfac_fx.KFAC(inverse_every=1000))
    never = kfac_fx.KFAC(statistics_every=1000, inverse_every=1000)
    rarely = kfac_fx.compile(model, F.cross_entropy, method=never)
    often(x, y), rarely(x, y)
    state = sum(factor.bytes for factor in often.plan.factors)
    assert peak_bytes(often, x, y) <= 1.25 * peak_bytes(rarely, x, y) + state


def copied(channels_last: bool) -> int:
    """Elements that the copies of one statistics step write."""
    torch.manual_seed(0)
    model = pair(nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32)), nn.Conv2d(32, 8, 3, 2, 1))
    x, y = torch.randn(32, 16, 16, 16), torch.randint(512, (32,))
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    step = kfac_fx.compile(model, F.cross_entropy, method=kfac_fx.KFAC(inverse_every=1000))
    step(x, y), step(x, y)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step(x, y)
    events = recorded.key_averages(group_by_input_shape=True)
    return sum(e.count * math.prod(e.input_shapes[0]) for e in events if e.key == "aten::copy_")


def test_images_with_their_channels_last_are_copied_no_more_than_others() -> None:
    assert 0 < copied(True) <= 1.1 * copied(False)
