"""Equal layers are traced once; each still has its own tensors, statistics, constants and direction."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

import kfac_fx
from kfac_fx.graph import constant
from kfac_fx.splice import splice
from tests.helpers import batch_factors, gradients, one_step
from tests.oracles import reference_factors, relative_error

TOLERANCE = 1e-10


class Mixed(nn.Module):
    """Equal convolutions around others, equal Linear layers, two inputs that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 1), (3, 1), (5, 2), (3, 1), (5, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, kernel, padding=pad) for kernel, pad in shapes)
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        for conv in self.convs:
            x = x + torch.tanh(conv(x))
        x = x.mean((2, 3))
        return self.head(torch.tanh(self.left(x)) + self.right(x))


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Mixed().double(), torch.randn(32, 6, 12, 12, dtype=torch.float64), torch.randint(3, (32,))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_layer_has_its_own_factors(case: tuple[nn.Module, Tensor, Tensor], sharing: str) -> None:
    model, x, y = case
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y)
    forms = {match.name: match.uses[0].options.get("form") for match in plan.matched}
    assert forms["convs.0"] == forms["convs.2"] == "transform"  # constants are what could be mixed up
    found = batch_factors(model, F.cross_entropy, x, y, fisher="empirical", sharing=sharing)
    wanted = reference_factors(model, nn.CrossEntropyLoss(), x, y, fisher="empirical", sharing=sharing)
    for name, factors in wanted.items():
        for side, factor in factors.items():
            assert relative_error(found[name][side], factor) < TOLERANCE, (name, side)


def test_every_layer_has_its_own_direction(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The second step, whose precondition is in the graph: inverses of the first step times its gradient."""
    model, x, y = case
    method = kfac_fx.KFAC(inverse_every=5, kl_clip=None)
    first = one_step(model, F.cross_entropy, x, y, method=method, fisher="empirical", lr=0.0)
    step = kfac_fx.compile(
        model, F.cross_entropy, method=method, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
    )
    step(x, y)
    applied: dict[str, Tensor] = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: applied.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    step(x, y)
    plain = gradients(model, F.cross_entropy, x, y)
    for name in ["convs.0", "convs.1", "convs.2", "convs.3", "convs.4", "left", "right"]:
        state = first.curvature[f"{name}.weight"]
        joint = torch.cat([plain[f"{name}.weight"].flatten(1), plain[f"{name}.bias"].unsqueeze(1)], 1)
        wanted = state["G_inverse"][0] @ joint @ state["A_inverse"][0]
        found = torch.cat([applied[f"{name}.weight"].flatten(1), applied[f"{name}.bias"].unsqueeze(1)], 1)
        assert relative_error(found, wanted) < TOLERANCE, name


def waves(kind: str) -> Tensor:
    return getattr(torch.arange(3.0), kind)()


def doubled(x: Tensor) -> dict[str, Tensor]:
    return {"sum": x + constant(waves, "cos") * 2}


def halved(x: Tensor) -> dict[str, Tensor]:
    return {"sum": x + constant(waves, "sin") / 2, "product": x * constant(waves, "tan")}


def written(order: list) -> tuple[GraphModule, list[dict[str, Node]]]:
    """A graph of one placeholder with these functions spliced in, traced functions kept by name."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        value = torch.empty(3)
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = value
    graph.output(x)
    module = GraphModule(nn.Module(), graph)
    x, output = module.graph.find_nodes(op="placeholder")[0], module.graph.output_node()
    known: dict = {}
    results = [
        splice(module, f, [x], before=output, label=f.__name__, key=f.__name__, known=known) for f in order
    ]
    output.args = (tuple(node for result in results for node in result.values()),)
    module.recompile()
    assert len(known) == len({f.__name__ for f in order})
    return module, results


def test_a_function_that_is_known_is_copied_with_its_own_constants() -> None:
    order = [doubled, doubled, halved, doubled, halved]
    module, _ = written(order)
    x = torch.randn(3)
    for found, wanted in zip(module(x), [t for f in order for t in f(x).values()], strict=True):
        assert torch.equal(found, wanted)
    assert len(dict(module.named_buffers())) == 3  # one per table, however often it is read
