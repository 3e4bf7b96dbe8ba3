"""No method writes what dwarfs the activations, and what it reads in parts is what it would read at once.

The rule, on the graph without data: a tensor that is inserted is at most 2.5 times as large as the largest
tensor of the model's own forward and backward (its input included), or as large as a tensor of the state or a
weight at most. Views make no tensor. Nothing else is left out.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import KFC, SKFAC, Diagonal
from kfac_fx.forms import LARGEST_PATCHES
from kfac_fx.gram import InputRows
from kfac_fx.instrument import instrument
from kfac_fx.layout import Geometry
from kfac_fx.rows import channel_moments, field_rows
from kfac_fx.squares import (
    parts_of_patches,
    parts_of_rows,
    squared_projections,
    squared_projections_of_indices,
)
from kfac_fx.windows import patch_parts, patches_at, patches_by_lines, position_sums, window_sums
from tests.test_statistics_memory import made

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

METHODS = {
    "kfac": "kfac",
    "ekfac": "ekfac",
    "diagonal": "diagonal",
    "reduce": "skfac",
    "subsample": SKFAC(strategy="subsample"),
    "receptive field": SKFAC(strategy="receptive_field"),
    "uncorrelated": KFC(spatially_uncorrelated_activations=True),
}
FEW = ("diagonal", "subsample", "receptive field")


class Recurrent(nn.Module):
    """A weight that is used once per word, and words that repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.into, self.over = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        state = torch.zeros(words.shape[0], 8)
        for word in words.unbind(1):
            state = torch.tanh(self.into(self.words(word)) + self.over(state))
        return state


def segmentation() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
    )


def stem() -> nn.Sequential:
    stem, depthwise = nn.Conv2d(3, 8, 7, 2, 3), nn.Conv2d(8, 8, 5, padding=2, groups=8)
    return nn.Sequential(
        stem, nn.ReLU(), depthwise, nn.ReLU(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(8, 5)
    )


def volumes() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 4, 3, padding=1))


def dilated() -> nn.Sequential:
    """A branch of an atrous pyramid: the padding is larger than the image."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=30, dilation=30), nn.ReLU(), nn.Conv2d(8, 5, 1))


def sparse() -> nn.Sequential:
    wide = nn.Conv2d(2, 5, 3, stride=5, padding=30)
    return nn.Sequential(wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "segmentation": (segmentation, (8, 3, 32, 32), (8, 32, 32)),
    "two large images": (segmentation, (2, 3, 32, 32), (2, 32, 32)),
    "stem": (stem, (16, 3, 32, 32), (16,)),
    "dilated": (dilated, (1, 8, 27, 27), (1, 27, 27)),
    "sparse": (sparse, (8, 2, 24, 24), (8,)),
    "two volumes": (volumes, (2, 2, 10, 10, 10), (2, 10, 10, 10)),
}
CASES = [("two large images", method, {}) for method in METHODS]
CASES += [(model, method, {}) for model in ("segmentation", "stem") for method in FEW]
CASES += [("two volumes", "diagonal", {})]
CASES += [(model, method, {}) for model in ("dilated", "sparse") for method in ("kfac", *FEW)]
CASES += [("stem", method, {"fisher": "type2"}) for method in ("diagonal", "receptive field")]
CASES += [("segmentation", "diagonal", {"fisher": "mc"})]


def violations(model: nn.Module, x: Tensor, y: Tensor, method: object, **options: str) -> list[str]:
    """Of the rule, in all that a statistics step inserts."""
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method=method, **options)  # type: ignore[arg-type]
    module = instrument(plan, "statistics").module
    nodes = list(made(module))
    largest = max(x.nbytes, *(value.nbytes for _, inserted, value in nodes if not inserted))
    states = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder") if str(n.target)[:2] == "s_"]
    exempt = max(tensor.nbytes for tensor in [*states, *model.parameters()])
    limit = max(LARGEST_PATCHES * largest, exempt)
    assert exempt < LARGEST_PATCHES * largest, "the state would hide what the rule is about"
    return [
        f"{value.nbytes / largest:.2f} {node.format_node()}"
        for node, inserted, value in nodes
        if inserted and value.nbytes > limit
    ]


@pytest.mark.parametrize(("model", "method", "options"), CASES)
def test_no_method_writes_a_tensor_that_dwarfs_the_activations(
    model: str, method: str, options: dict[str, str]
) -> None:
    make, sizes, labels = MODELS[model]
    torch.manual_seed(0)
    x, y = torch.randn(sizes), torch.randint(4, labels)
    assert not violations(make(), x, y, METHODS[method], **options)


@pytest.mark.parametrize("method", ["ekfac", "diagonal"])
def test_uses_of_a_recurrent_weight_are_not_brought_together(method: str) -> None:
    x, y = torch.randint(20, (64, 8)), torch.randint(8, (64,))
    assert not violations(Recurrent(), x, y, method)


# ------------------------------------------------------------ parts against the whole, in float64

SPACE = (9, 8, 7)


def geometry(kernel: str, stride: str, padding: str, dilation: str, groups: int, more: str = "") -> Geometry:
    sizes = [tuple(map(int, text)) for text in (kernel, stride, padding, dilation)]
    names = ("kernel", "stride", "padding", "dilation")
    return Geometry(
        **dict(zip(names, sizes, strict=True)),  # type: ignore[arg-type]
        groups=groups,
        transposed=bool(more),
        output_padding=tuple(map(int, more)),
        space=SPACE[: len(kernel)],
    )


GEOMETRIES = [
    geometry("3", "1", "1", "1", 2),
    geometry("33", "11", "11", "11", 1),
    geometry("52", "21", "20", "12", 2),
    geometry("223", "122", "101", "111", 2),
    geometry("4", "2", "1", "1", 1, "0"),
    geometry("2", "3", "0", "1", 2, "1"),
    geometry("32", "23", "10", "12", 2, "10"),
    geometry("22", "44", "00", "11", 1, "00"),
    geometry("14", "13", "03", "11", 2, "00"),
    geometry("213", "122", "101", "111", 1, "011"),
]


def rows_by_convolution(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches [groups, N, T, features], each feature copied by a convolution of torch."""
    rank, groups = len(geometry.kernel), geometry.groups
    channels, volume = x.shape[1] // groups, math.prod(geometry.kernel)
    copies = torch.eye(channels * volume, dtype=x.dtype).reshape(-1, channels, *geometry.kernel)
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    name = f"conv_transpose{rank}d" if geometry.transposed else f"conv{rank}d"
    if geometry.transposed:
        copies, options = copies.transpose(0, 1), options | {"output_padding": geometry.output_padding}
    parts = [getattr(F, name)(part, copies, **options) for part in x.chunk(groups, 1)]
    return torch.stack([part.flatten(2).mT for part in parts])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_parts_draws_and_sums_of_patches_are_those_of_a_convolution(geometry: Geometry) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, *geometry.space, dtype=torch.float64)
    rows, exact = rows_by_convolution(x, geometry), {"rtol": 1e-12, "atol": 1e-12}
    for examples in (1, 3):
        found = torch.full_like(rows[:, :examples], float("nan"))
        for batch, positions, part in patch_parts(x[:examples], geometry):
            found[:, batch, positions] = part
        torch.testing.assert_close(found, rows[:, :examples], **exact)
    for parts in (2, 50):
        found = [part for _, part in patches_by_lines(x, geometry, parts)]
        assert len(found) > 1
        torch.testing.assert_close(torch.cat(found, 2), rows, **exact)
    drawn = torch.randperm(rows.shape[2])[:5]
    torch.testing.assert_close(patches_at(x, geometry, drawn), rows[:, :, drawn], **exact)
    torch.testing.assert_close(position_sums(x, geometry, ones=True).sums, rows.sum(2), **exact)
    sums = rows.unflatten(-1, (-1, math.prod(geometry.kernel))).sum(-1)
    found = window_sums(x, geometry).unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2)
    torch.testing.assert_close(found, sums, **exact)


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("examples", [1, 9])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_squares_of_gradients_in_a_basis_are_those_of_rows_that_are_all_there(
    geometry: Geometry, examples: int
) -> None:
    """Two passes and two uses; positions do not count where they are marked so, in one use without a bias."""
    torch.manual_seed(0)
    images = [draw(examples, 4, *geometry.space) for _ in range(2)]
    rows = [rows_by_convolution(x, geometry) for x in images]
    groups, _, positions, features = rows[0].shape
    passes = [[draw(groups, examples, positions, 3) for _ in range(2)] for _ in images]
    kept, ones = torch.rand(examples, positions) < 0.6, (True, False)
    q_a, q_g = draw(groups, features + 1, features + 1), draw(groups, 3, 3)
    pairs = zip(images, passes, ones, strict=True)
    uses = [parts_of_patches(x, geometry, g, ones=one, kept=kept) for x, g, one in pairs]
    found = squared_projections(uses, q_a, q_g, bias=True, examples=examples)
    expected = torch.zeros_like(found)
    for group, one_pass in ((group, one_pass) for group in range(groups) for one_pass in range(2)):
        for n in range(examples):
            gradient = torch.zeros(3, features + 1, dtype=torch.float64)
            for a, g, one in zip(rows, passes, ones, strict=True):
                counted = kept[n].nonzero().flatten()
                column = torch.full((len(counted), 1), float(one), dtype=torch.float64)
                gradient += g[one_pass][group, n, counted].T @ torch.cat([a[group, n, counted], column], 1)
            expected[group] += (q_g[group].T @ gradient @ q_a[group]) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_squares_of_many_uses_and_of_words_are_those_of_single_examples() -> None:
    torch.manual_seed(0)
    a, g = [draw(1, 6, 1, 5) for _ in range(9)], [draw(1, 6, 1, 4) for _ in range(9)]
    uses = [parts_of_rows([(InputRows(rows=x, ones=False), y)]) for x, y in zip(a, g, strict=True)]
    found = squared_projections(uses, None, None, bias=False, examples=6)
    whole = torch.cat(g, 2).mT @ torch.cat(a, 2)
    torch.testing.assert_close(found, (whole**2).sum(1))
    words, rows = torch.randint(7, (5, 40)), draw(1, 5, 40, 2)  # more positions than features, in parts
    found = squared_projections_of_indices([(words, rows)], None, size=7, padding_idx=3)
    hot = F.one_hot(words, 7).double() * (torch.arange(7) != 3)
    torch.testing.assert_close(found, ((rows.mT @ hot) ** 2).sum(1))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sums_over_the_receptive_field_and_traces_are_those_of_the_patches_that_count(
    geometry: Geometry,
) -> None:
    torch.manual_seed(0)
    x, volume = draw(3, 4, *geometry.space), math.prod(geometry.kernel)
    rows = rows_by_convolution(x, geometry)
    kept = torch.rand(rows.shape[1:3]) < 0.6
    summed, trace, corner = field_rows([(x, geometry, True, kept), (2 * x, geometry, False, None)])
    left = torch.cat([rows[:, kept], 2 * rows.flatten(1, 2)], 1)
    count, sums = left.shape[1], left.unflatten(-1, (-1, volume)).sum(-1)
    torch.testing.assert_close(summed.mT @ summed, sums.mT @ sums / count)
    torch.testing.assert_close(trace, (left**2).sum((1, 2)) / count)
    torch.testing.assert_close(corner, torch.full_like(corner, float(kept.sum()) / count))


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g.transposed], ids=str)
def test_channel_moments_of_a_transposed_convolution_count_the_zeros_between_pixels(
    geometry: Geometry,
) -> None:
    """Those that the kernel reads: outputs and its reach, along each axis."""
    torch.manual_seed(0)
    x = draw(3, 4, *geometry.space)
    mean, second = channel_moments(x, geometry)
    axes = zip(geometry.space, geometry.stride, geometry.kernel, geometry.dilation, strict=True)
    widths = [(n - 1) * s + 1 + 2 * d * (k - 1) for n, s, k, d in axes]
    trims = zip(widths, geometry.padding, geometry.output_padding, strict=True)
    pixels = 3 * math.prod(width - 2 * p + more for width, p, more in trims)
    read = x.unflatten(1, (geometry.groups, -1)).flatten(3)
    covers = zip(geometry.padding, geometry.dilation, geometry.kernel, strict=True)
    if all(p <= d * (k - 1) for p, d, k in covers):  # else pixels that nothing reads are left out
        torch.testing.assert_close(mean, read.sum((0, 3)) / pixels)
        torch.testing.assert_close(second, torch.einsum("ngcp,ngdp->gcd", read, read) / pixels)


# ------------------------------------------------------------ whole steps, where the loss ignores pixels

IGNORED = -100


def masked_example(transposed: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 4, 3, 2, 1) if transposed else nn.Conv2d(2, 4, 3, 2, 1)
    model = nn.Sequential(layer).double()
    x = draw(3, 2, 9, 8)
    y = torch.randint(4, model(x)[:, 0].shape)
    return model, x, torch.where(torch.rand(y.shape) < 0.4, IGNORED, y)


def state_after_a_step(model: nn.Module, x: Tensor, y: Tensor, method: object) -> dict[str, Tensor]:
    rate_zero = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=rate_zero, backend="eager")  # type: ignore[arg-type]
    step(x, y)
    return step.state_dict()["curvature"]["0.weight"]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_diagonal_of_a_segmentation_model_is_that_of_the_gradients_of_its_examples(
    transposed: bool,
) -> None:
    model, x, y = masked_example(transposed)
    found = state_after_a_step(model, x, y, Diagonal(decay=0.0))["S"][0]
    pixels, expected = (y != IGNORED).sum(), torch.zeros_like(found)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(model(one), label, reduction="sum") / pixels
        weight, bias = torch.autograd.grad(loss, [model[0].weight, model[0].bias])
        weight = weight.transpose(0, 1) if transposed else weight
        expected += pixels * torch.cat([weight.flatten(1), bias.unsqueeze(1)], 1) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_rows_of_skfac_on_a_segmentation_model_are_those_that_count(transposed: bool) -> None:
    model, x, y = masked_example(transposed)
    layer, kept = model[0], (y != IGNORED).flatten(1)
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    text = ["".join(map(str, size)) for size in sizes]
    of_layer = geometry(*text, 1, "00" if transposed else "")  # type: ignore[arg-type]
    rows = rows_by_convolution(x, of_layer)[0][kept]
    every = SKFAC(strategy="subsample", positions=10_000, statistics_every=1, inverse_every=1)
    whole = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    found = state_after_a_step(model, x, y, every)
    torch.testing.assert_close(found["A"][0], whole.T @ whole / len(rows))
    by_field = SKFAC(strategy="receptive_field", statistics_every=1, inverse_every=1)
    found = state_after_a_step(model, x, y, by_field)
    sums = rows.unflatten(-1, (-1, 9)).sum(-1)
    moment = sums.T @ sums / len(rows)
    share = (rows**2).sum() / len(rows) / (9 * moment.trace())
    torch.testing.assert_close(found["A"][0], share * moment)
    torch.testing.assert_close(found["A_bias"], torch.ones_like(found["A_bias"]))
