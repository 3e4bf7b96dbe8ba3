"""SKFAC's strategies for convolutions, positions drawn at random and sums over the receptive field."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import append_one, conv_patches, relative_error
from tests.test_skfac import DAMPING, TOLERANCE, assert_equal, conv_net, doubles, images, kfac, run, skfac
from tests.training import run_step, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


class Sampled(nn.Module):
    """A convolution with 36 positions whose rows can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 20, 3, padding=1), nn.Linear(720, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


def drawn_in(state: dict[str, Tensor], model: Sampled, x: Tensor, count: int) -> list[int]:
    """The positions whose patches are the rows of A, the same for every example."""
    patches = append_one(conv_patches(model.conv, x).flatten(2))
    rows = state["A_rows"][0].unflatten(0, (len(x), count)) * (len(x) * count) ** 0.5
    distance = (rows.unsqueeze(2) - patches.unsqueeze(1)).abs().amax(-1)
    assert distance.amin(2).max() < 1e-12
    chosen = distance.argmin(2)
    assert (chosen == chosen[0]).all()
    return chosen[0].tolist()


def test_subsampled_positions_are_those_of_a_and_of_g_and_change_with_every_update() -> None:
    model, x, y = Sampled().double(), doubles(2, 3, 6, 6), torch.randint(4, (2,))
    histories = []
    for seed in (1, 1, 2):
        method, history = skfac(strategy="subsample", positions=3, seed=seed), []
        copy = twin(model)
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.0)
        step = kfac_fx.compile(copy, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
        for _ in range(4):
            step(x, y)
            state = step.state_dict()["curvature"]["conv.weight"]
            history.append(drawn_in(state, copy, x, 3))
            out = copy.conv(x)
            (g,) = torch.autograd.grad(F.cross_entropy(copy.head(out.flatten(1)), y), out)
            rows = g.flatten(2)[:, :, history[-1]].transpose(1, 2).flatten(0, 1) * (2 * 36 / 3) ** 0.5
            assert relative_error(state["G_rows"][0], rows) < TOLERANCE
        histories.append(history)
    assert histories[0] == histories[1] != histories[2]
    assert len({tuple(h) for h in histories[0]}) == 4


def test_a_convolution_with_few_positions_keeps_them_all() -> None:
    model, batch = conv_net(), images(3)
    found, _ = run(model, skfac(strategy="subsample", positions=16), [batch])
    assert_equal(found, run(model, kfac(), [batch])[0])


def by_field(module: nn.Conv2d, x: Tensor, g: Tensor, *, sharing: str, num_terms: int) -> Tensor:
    """V of strategy S3 with dense algebra: A of summed patches, its trace matched; the bias by itself."""
    patches = conv_patches(module, x)  # [N, T, C, K]
    gradient = torch.einsum("nto,ntck->ock", g, patches)
    if sharing == "reduce":
        patches, g = patches.mean(1, keepdim=True), g.sum(1, keepdim=True)
    num, volume = patches.shape[0] * patches.shape[1], patches.shape[3]
    trace = (patches**2).sum() / num
    fields = patches.sum(3).flatten(0, 1)
    a = fields.T @ fields / num
    a = a * trace / (volume * a.trace())
    factor = num_terms * torch.einsum("nto,ntp->op", g, g)
    pi = math.sqrt((a.trace() / len(a)) / (factor.trace() / len(factor)))
    gamma_a, gamma_g = pi * math.sqrt(DAMPING), math.sqrt(DAMPING) / pi
    inverse_a = torch.linalg.inv(a + gamma_a * torch.eye(len(a), dtype=a.dtype))
    inverse_g = torch.linalg.inv(factor + gamma_g * torch.eye(len(factor), dtype=a.dtype))
    weights = torch.einsum("op,pck,cd->odk", inverse_g, gradient, inverse_a)
    bias = inverse_g @ g.sum((0, 1)) / (1 + gamma_a)
    return torch.cat([weights.flatten(1), bias[:, None]], 1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("channels", [3, 40])
def test_receptive_field_sums_precondition_the_channels(channels: int, sharing: str) -> None:
    conv = nn.Conv2d(channels, 5, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(20, 4)).double()
    x, y = doubles(4, channels, 4, 4), torch.randint(4, (4,))
    found, step = run(model, skfac(strategy="receptive_field"), [(x, y)], sharing=sharing)
    out = conv(x)
    (g,) = torch.autograd.grad(F.cross_entropy(model[2](out.flatten(1)), y), out)
    expected = by_field(conv, x, g.flatten(2).mT, sharing=sharing, num_terms=4)
    assert relative_error(found["0.weight"].flatten(1), expected[:, :-1].detach()) < TOLERANCE
    assert relative_error(found["0.bias"], expected[:, -1].detach()) < TOLERANCE
    state = step.state_dict()["curvature"]["0.weight"]
    assert ("A_z" in state) == (channels == 40)
    assert max(t.shape[-1] for n, t in state.items() if n.startswith("A") and t.dim() > 1) == channels


def test_receptive_fields_of_one_pixel_are_ordinary_convolutions() -> None:
    model, batch = nn.Sequential(nn.Conv2d(2, 9, 1), nn.Flatten(), nn.Linear(441, 4)).double(), images(3)
    found, _ = run(model, skfac(strategy="receptive_field"), [batch])
    assert_equal(found, run(model, kfac(), [batch])[0])


def test_grouped_receptive_fields_are_the_single_groups_side_by_side() -> None:
    whole = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 4)).double()
    x, y = doubles(5, 4, 5, 5), torch.randint(4, (5,))
    found, _ = run(whole, skfac(strategy="receptive_field", damping_rule="sqrt"), [(x, y)])

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Conv2d(2, 3, 3).double() for _ in range(2))
            self.head = twin(whole[2])
            for i, half in enumerate((self.left, self.right)):
                half.weight.data = whole[0].weight.data[3 * i : 3 * i + 3].clone()
                half.bias.data = whole[0].bias.data[3 * i : 3 * i + 3].clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x[:, :2]), self.right(x[:, 2:])], 1).flatten(1))

    apart, _ = run(Halves(), skfac(strategy="receptive_field", damping_rule="sqrt"), [(x, y)])
    joined = torch.cat([apart["left.weight"], apart["right.weight"]])
    assert relative_error(found["0.weight"], joined) < TOLERANCE


def test_the_compiled_graph_draws_the_same_positions_and_grows_alike() -> None:
    method = skfac(strategy="subsample", positions=3, window=2, inverse_every=2)
    model = Sampled().double()
    batches = [(doubles(size, 3, 6, 6), torch.randint(4, (size,))) for size in (2, 3)]
    ends = []
    for backend in ("eager", "inductor"):
        copy = twin(model)
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.01)
        step = kfac_fx.compile(copy, F.cross_entropy, method=method, optimizer=optimizer, backend=backend)
        run_step(step, batches)
        ends.append(snapshot(copy, step))
    assert ends[0]["state.curvature.conv.weight.A_rows"].shape == (1, 18, 28)
    assert int(ends[0]["state.curvature.conv.weight.A_draws"]) == 2
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], rtol=1e-9, atol=1e-9), name
