"""KFC: the paper's factors and names, and spatially uncorrelated activations against the dense matrix."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import Reason
from kfac_fx.layout import Geometry
from kfac_fx.rows import channel_moments
from tests.damped import added, eye
from tests.helpers import gradients, one_step
from tests.oracles import record_uses, relative_error

TOLERANCE = 1e-10
DAMPING = 0.02
RULES = ("factored", "sqrt", "full", "relative")


def by_channel(**changes: object) -> dict:
    """Settings of the method with the option."""
    return {"damping": DAMPING, "kl_clip": None, "spatially_uncorrelated_activations": True, **changes}


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, *shape, dtype=torch.float64) + 0.5, torch.randint(3, (6,))


def net(
    *, groups: int = 1, bias: bool = True, kernel: int = 2, padding: int = 1, stride: int = 2
) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    size = (4 + 2 * padding - kernel) // stride + 1
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(8 * size * size, 3)).double()


def joint(tensors: dict[str, Tensor], name: str, rows: slice = slice(None)) -> Tensor:
    """[d_out, d_in (+1)] of some output channels."""
    matrix, bias = tensors[name][rows].flatten(1), name.replace("weight", "bias")
    return torch.cat([matrix, tensors[bias][rows, None]], 1) if bias in tensors else matrix


def uncorrelated(x: Tensor, volume: int, *, bias: bool) -> Tensor:
    """Sigma (x) I_K + m m^T of channels x: [N, C, *space], already padded; last the 1 of the bias."""
    pixels = x.movedim(1, -1).flatten(0, -2)
    mean, covariance = pixels.mean(0), torch.cov(pixels.T, correction=0).view(x.shape[1], -1)
    m = mean.repeat_interleave(volume)
    block = torch.kron(covariance, eye(volume))
    if bias:
        m = torch.cat([m, torch.ones(1, dtype=x.dtype)])
        block = torch.block_diag(block, torch.zeros(1, 1, dtype=x.dtype))
    return block + torch.outer(m, m)


def dense(rule: str, damping: float, a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    to_a, to_g = added(rule, damping, a, g)
    block = torch.kron(g + to_g * eye(len(g)), a + to_a * eye(len(a)))
    return torch.linalg.solve(block, gradient.flatten()).view_as(gradient)


def stepped(model: nn.Module, x: Tensor, y: Tensor, method: kfac_fx.KFC) -> tuple[dict, dict[str, Tensor]]:
    """(curvature, what was subtracted from each parameter at learning rate 1) of one step."""
    result = one_step(model, F.cross_entropy, x, y, method=method, fisher="type2")
    return result.curvature, {name: -change for name, change in result.change.items()}


@pytest.mark.parametrize(
    ("groups", "bias", "rule"),
    [
        *((1, True, rule) for rule in RULES),
        (2, True, "factored"),
        (4, False, "factored"),
        (1, False, "relative"),
    ],
)
def test_uncorrelated_activations_step_by_the_dense_inverse(groups: int, bias: bool, rule: str) -> None:
    model, (x, y) = net(groups=groups, bias=bias), images(4, 4, 4)
    curvature, change = stepped(model, x, y, kfac_fx.KFC(**by_channel(damping_rule=rule)))
    state, grads = curvature["0.weight"], gradients(model, F.cross_entropy, x, y)
    width = 4 // groups
    assert state["A_inverse"].shape == (groups, width, width) and "A" not in state
    for group in range(groups):
        channels, rows = (
            slice(width * group, width * (group + 1)),
            slice(8 // groups * group, 8 // groups * (group + 1)),
        )
        a = uncorrelated(F.pad(x, (1, 1, 1, 1))[:, channels], 4, bias=bias)
        wanted = dense(rule, DAMPING, a, state["G"][group], joint(grads, "0.weight", rows))
        assert relative_error(joint(change, "0.weight", rows), wanted) < TOLERANCE


def test_the_patches_of_these_images_are_correlated() -> None:
    """The control: with correlated pixels the option changes A and the step."""
    model, (x, y) = net(padding=0, stride=1), images(4, 4, 4)
    x = x + x.roll(1, 2) + x.roll(1, 3)
    curvature, plain = stepped(model, x, y, kfac_fx.KFC(damping=DAMPING, kl_clip=None))
    _, change = stepped(model, x, y, kfac_fx.KFC(**by_channel()))
    assert relative_error(uncorrelated(x, 4, bias=True), curvature["0.weight"]["A"][0]) > 1e-1
    assert relative_error(joint(change, "0.weight"), joint(plain, "0.weight")) > 1e-2


@pytest.mark.parametrize("damping", [DAMPING, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions_lose_nothing(bias: bool, damping: float) -> None:
    model, (x, y) = net(kernel=1, padding=0, stride=1, bias=bias), images(4, 4, 4)
    _, plain = stepped(model, x, y, kfac_fx.KFC(damping=damping, kl_clip=None))
    _, change = stepped(model, x, y, kfac_fx.KFC(**by_channel(damping=damping)))
    assert relative_error(joint(change, "0.weight"), joint(plain, "0.weight")) < 1e-9


def test_without_damping_it_is_the_inverse_of_the_whole_matrix() -> None:
    model, (x, y) = net(), images(4, 4, 4)
    curvature, change = stepped(model, x, y, kfac_fx.KFC(**by_channel(damping=0.0)))
    g = torch.linalg.pinv(curvature["0.weight"]["G"][0], rtol=1e-10, hermitian=True)
    gradient = joint(gradients(model, F.cross_entropy, x, y), "0.weight")
    wanted = g @ gradient @ torch.linalg.inv(uncorrelated(F.pad(x, (1, 1, 1, 1)), 4, bias=True))
    assert relative_error(joint(change, "0.weight"), wanted) < TOLERANCE


def test_a_transposed_convolution_counts_the_zeros_between_its_pixels() -> None:
    torch.manual_seed(1)
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    model, (x, y) = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)).double(), images(3, 3, 3)
    wide = torch.zeros(6, 3, 5, 5, dtype=torch.float64)
    wide[..., ::2, ::2] = x
    curvature, change = stepped(model, x, y, kfac_fx.KFC(**by_channel()))
    a = uncorrelated(F.pad(wide, (1, 1, 1, 1)), 9, bias=True)

    def canonical(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors["0.weight"].movedim(1, 0).flatten(1), tensors["0.bias"][:, None]], 1)

    gradient = canonical(gradients(model, F.cross_entropy, x, y))
    wanted = dense("factored", DAMPING, a, curvature["0.weight"]["G"][0], gradient)
    assert relative_error(canonical(change), wanted) < TOLERANCE


def test_moments_are_averaged_before_they_are_centred() -> None:
    model, batches = net(), [images(4, 4, 4) for _ in range(2)]
    method = kfac_fx.KFC(**by_channel(decay=0.5, statistics_every=1, inverse_every=1, damping_rule="full"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    pixels = []
    for x, y in batches:
        step(x, y)
        pixels.append(F.pad(x, (1, 1, 1, 1)).movedim(1, -1).flatten(0, -2))
    second, mean = (
        (0.5 * of(pixels[0]) + of(pixels[1])) / 1.5
        for of in (lambda p: p.T @ p / len(p), lambda p: p.mean(0))
    )
    wanted = torch.linalg.inv(second - torch.outer(mean, mean) + DAMPING * eye(4))
    assert relative_error(step.state_dict()["curvature"]["0.weight"]["A_inverse"][0], wanted) < TOLERANCE


def test_layers_that_read_one_image_keep_its_moments_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(2, 3, 2), nn.Conv2d(2, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.left(x) * self.right(x)).mean((2, 3))

    model, (x, y) = Branches().double(), images(2, 3, 3)
    curvature, change = stepped(model, x, y, kfac_fx.KFC(**by_channel()))
    left, right = curvature["left.weight"], curvature["right.weight"]
    for name in ("A_channels", "A_mean"):
        assert left[name].data_ptr() == right[name].data_ptr()
    gradient = joint(gradients(model, F.cross_entropy, x, y), "right.weight")
    wanted = dense("factored", DAMPING, uncorrelated(x, 4, bias=True), right["G"][0], gradient)
    assert relative_error(joint(change, "right.weight"), wanted) < TOLERANCE


def test_its_state_is_what_the_plan_says_and_smaller() -> None:
    model, (x, y) = net(), images(4, 4, 4)
    sizes = {}
    for option in (True, False):
        method = kfac_fx.KFC(spatially_uncorrelated_activations=option)
        plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method=method)
        state = stepped(model, x, y, method)[0]["0.weight"]
        sizes[option] = sum(t.numel() * 8 for t in state.values())
        assert sum(f.bytes for f in plan.factors if f.owner == "0.weight") == sizes[option]
    assert sizes[True] < 0.5 * sizes[False]


def test_reduce_and_damping_of_the_whole_block_are_refused() -> None:
    x, y = images(4, 4, 4)
    method = kfac_fx.KFC(**by_channel())
    plan = kfac_fx.inspect(net(), F.cross_entropy, x, y, method=method, sharing="reduce")
    assert {s.parameter: s.reason for s in plan.skipped} == dict.fromkeys(
        ("0.weight", "0.bias"), Reason.METHOD
    )
    with pytest.raises(ValueError, match=r"KFC\(damping_rule='tikhonov'\)"):
        kfac_fx.KFC(**by_channel(damping_rule="tikhonov"))


def test_the_papers_split_of_the_block_gives_the_same_step_and_the_report_names_it() -> None:
    """Omega sums over positions and Gamma averages over them; pi is that of their traces."""
    model, (x, y) = net(), images(4, 4, 4)
    curvature, change = stepped(model, x, y, kfac_fx.KFC(damping=DAMPING, kl_clip=None))
    patches = record_uses(model, x)[1]["0.weight"][0].rows[:, 0]
    omega = torch.einsum("nti,ntj->ij", patches, patches) / len(x)
    gamma = curvature["0.weight"]["G"][0] / patches.shape[1]
    assert abs(float(omega[-1, -1]) - patches.shape[1]) < 1e-12
    gradient = joint(gradients(model, F.cross_entropy, x, y), "0.weight")
    assert (
        relative_error(joint(change, "0.weight"), dense("factored", DAMPING, omega, gamma, gradient))
        < TOLERANCE
    )
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method="kfc")
    forms = {f.side: f.form for f in plan.factors if f.owner == "0.weight"}
    assert forms == {"A": "Omega / |T|: patches^T patches", "G": "|T| Gamma: rows^T rows"}


def test_channel_moments_count_padded_pixels() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    geometry = Geometry(kernel=(3,), stride=(1,), padding=(2,), dilation=(1,), groups=2)
    mean, second = channel_moments(x, geometry)
    for group in range(2):
        part = x[:, 2 * group : 2 * group + 2]
        assert relative_error(mean[group], part.sum((0, 2)) / (3 * 9)) < 1e-12
        assert relative_error(second[group], torch.einsum("ncp,ndp->cd", part, part) / (3 * 9)) < 1e-12
