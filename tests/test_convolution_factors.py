"""Convolution factors against rows gathered by index, against equivalent layers and against `einconv`.

S1 to S6 are the extraction oracles of the specification. Many layers share one model, so that one captured
step covers many geometries.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from einconv.expressions import convNd_kfc
from torch import Tensor, nn

import kfac_fx
from tests.equivalents import CLASSES, Branches, Lifted, Padded, Pointwise, Split, Whole
from tests.helpers import batch_factors, one_step
from tests.oracles import (
    input_rows,
    kronecker_block,
    output_rows,
    record_uses,
    reference_factors,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (6, 5, 5)
MODES = ("zeros", "reflect", "replicate", "circular")
TOLERANCE = 1e-10
BATCH = 4  # a power of two: einconv rounds 1 / batch to float32


def data(rank: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    x = torch.randn(BATCH, channels, *SIZES[:rank], dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,))


def geometries() -> Iterator[dict[str, object]]:
    """Stride, padding, dilation, groups and kernel in every combination that PyTorch allows."""
    for stride, padding, dilation, groups, kernel in itertools.product(
        (1, 2), (0, 1, "same"), (1, 2), (1, 2, 4), (2, 3)
    ):
        if padding != "same" or stride == 1:
            yield {
                "kernel_size": kernel,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
            }


def some_geometries(rank: int, mode: str) -> list[nn.Module]:
    """A tenth of the geometries; all ranks and modes together visit every one, with bias and without."""
    offset = (4 * rank + MODES.index(mode)) % 10
    return [
        CONV[rank](4, 8 if index % 2 else 4, bias=bool(index % 3), padding_mode=mode, **geometry)
        for index, geometry in enumerate(geometries())
        if index % 10 == offset
    ]


def assert_factors_match(model: nn.Module, x: Tensor, y: Tensor, *, fisher: str, sharing: str) -> None:
    loss_fn = nn.CrossEntropyLoss()
    found = batch_factors(model, loss_fn, x, y, fisher=fisher, sharing=sharing)
    wanted = reference_factors(model, loss_fn, x, y, fisher=fisher, sharing=sharing)
    assert set(found) == set(wanted)
    for name, state in wanted.items():
        for factor, value in state.items():
            assert relative_error(found[name][factor], value) < TOLERANCE, f"{factor} of {name}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", CONV)
def test_s1_reference_rows_reproduce_the_gradient_for_every_geometry(rank: int, mode: str) -> None:
    x, _ = data(rank)
    for geometry in geometries():
        conv = CONV[rank](4, 8, padding_mode=mode, **geometry).double()
        outputs = conv(x)
        g = torch.randn_like(outputs)
        weight, bias = torch.autograd.grad(outputs, [conv.weight, conv.bias], g)
        total = torch.einsum("ngti,ngtj->gij", output_rows(conv, g), input_rows(conv, x)).flatten(0, 1)
        assert relative_error(total, torch.cat([weight.flatten(1), bias[:, None]], dim=1)) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", CONV)
def test_factors_equal_those_of_gathered_rows(rank: int, mode: str) -> None:
    x, y = data(rank)
    model = Branches(some_geometries(rank, mode), x)
    sharing = "expand" if (rank + MODES.index(mode)) % 2 else "reduce"
    assert_factors_match(model, x, y, fisher="empirical", sharing=sharing)


@pytest.mark.parametrize(
    ("fisher", "sharing"), [("type2", "expand"), ("type2", "reduce"), ("empirical", "reduce")]
)
def test_depthwise_and_asymmetric_kernels_have_exact_factors(fisher: str, sharing: str) -> None:
    x, y = data(2)
    layers = [
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.Conv2d(4, 8, 3, groups=4, padding="same", dilation=2, bias=False),
        nn.Conv2d(4, 6, (1, 4), groups=2, stride=(2, 1), padding=(0, 3)),
        nn.Conv2d(4, 5, (3, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1)),
        nn.Conv2d(4, 4, (2, 4), padding="same", groups=4),
        nn.Conv2d(4, 3, 1, stride=2),
        nn.Conv2d(4, 3, (6, 5)),
    ]
    assert_factors_match(Branches(layers, x), x, y, fisher=fisher, sharing=sharing)


def test_memory_format_does_not_change_the_factors() -> None:
    x, y = data(2)
    model = Branches([nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 3, 2, stride=2)], x)
    wanted = reference_factors(model, nn.CrossEntropyLoss(), x, y, fisher="empirical", sharing="expand")
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    found = batch_factors(model, nn.CrossEntropyLoss(), x, y, fisher="empirical", sharing="expand")
    for name, state in wanted.items():
        assert relative_error(found[name]["A"], state["A"]) < TOLERANCE
        assert relative_error(found[name]["G"], state["G"]) < TOLERANCE


@pytest.mark.parametrize("rank", CONV)
def test_s2_published_normalisations_agree_in_the_product(rank: int) -> None:
    x, y = data(rank)
    model = Branches([CONV[rank](4, 4, 3, padding=1, bias=False)], x)
    loss_fn, name = nn.CrossEntropyLoss(), "layers.0.weight"
    state = batch_factors(model, loss_fn, x, y, fisher="empirical", sharing="expand")[name]
    outputs, uses = record_uses(model, x)
    (mean_gradient,) = torch.autograd.grad(loss_fn(outputs, y), uses[name][0].output)
    a = uses[name][0].rows[:, 0].flatten(0, 1)
    ghat = output_rows(uses[name][0].module, mean_gradient)[:, 0].flatten(0, 1)
    g, positions = BATCH * ghat, len(a) // BATCH
    splits = {
        "kfc": (a.T @ a / BATCH, g.T @ g / len(a)),
        "kfac-jax": (a.T @ a / len(a), positions * (g.T @ g / len(a))),
        "repeated-dense": (a.T @ a / BATCH, g.T @ g / BATCH / positions),
        "batch-averaged": (
            (a / positions).T @ (a / positions) / len(a) * positions,
            (ghat * len(a)).T @ (ghat * len(a)) / len(a),
        ),
    }
    for left, right in splits.values():
        assert relative_error(kronecker_block(state["A"], state["G"]), torch.kron(right, left)) < TOLERANCE
    tiny_a = (a / positions).T @ (a / positions) / len(a)
    tiny_g = (ghat / positions).T @ (ghat / positions) / len(a)
    kaisa = torch.kron(tiny_g, tiny_a) * BATCH**2 * positions**5
    assert relative_error(kaisa, kronecker_block(state["A"], state["G"])) < TOLERANCE


def branch_factors(
    layers: list[nn.Module], x: Tensor, y: Tensor, *, sharing: str, keys: list[int] | None = None
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Factors and step of every weight in order; layers of one key (by default all) are driven alike."""
    keys = [0 for _ in layers] if keys is None else keys
    model = Branches(layers, x, keys=keys)
    for layer, key in zip(model.layers, keys, strict=True):
        outputs = model.layers[keys.index(key)](x)
        assert relative_error(layer(x).view_as(outputs), outputs) < 1e-12
    method = kfac_fx.KFAC(damping=1e-2, kl_clip=None)
    result = one_step(model, nn.CrossEntropyLoss(), x, y, method=method, fisher="empirical", sharing=sharing)
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    return [result.curvature[name] for name in names], [result.change[name] for name in names]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for factor in ("A", "G"):
        assert relative_error(found[factor], wanted[factor]) < 1e-12


@pytest.mark.parametrize(("rank", "sharing"), [(1, "expand"), (2, "reduce"), (2, "expand"), (3, "reduce")])
def test_s3_each_group_is_a_convolution_of_its_own(rank: int, sharing: str) -> None:
    x, y = data(rank)
    grouped = CONV[rank](4, 6, 3, groups=2, stride=2, padding=1).double()
    (together, *apart), _ = branch_factors([grouped, Split(grouped)], x, y, sharing=sharing)
    for group in range(2):
        assert_same({key: together[key][group : group + 1] for key in "AG"}, apart[group])
    averaged = input_rows(Split(grouped).halves[0], (x[:, :2] + x[:, 2:]) / 2)
    crude = torch.einsum("ngti,ngtj->gij", averaged, averaged) / (BATCH * averaged.shape[2])
    assert relative_error(crude[0], together["A"][0]) > 1e-1


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("written", [Pointwise, Whole])
@pytest.mark.parametrize("rank", CONV)
def test_s4_convolution_that_is_a_linear_layer_has_its_factors_and_its_step(
    rank: int, written: type[nn.Module], sharing: str
) -> None:
    x, y = data(rank)
    conv = CONV[rank](4, 3, 1 if written is Pointwise else SIZES[:rank]).double()
    (wanted, found), changes = branch_factors([conv, written(conv)], x, y, sharing=sharing)
    assert_same(found, wanted)
    assert relative_error(changes[1], changes[0].flatten(1)) < TOLERANCE


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_s5_missing_axes_are_axes_of_length_one(sharing: str) -> None:
    x, y = data(1)
    narrow = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2).double()
    layers = [narrow, Lifted(narrow, nn.Conv2d, 1), Lifted(narrow, nn.Conv3d, 2)]
    (wanted, *found), _ = branch_factors(layers, x, y, sharing=sharing)
    for state in found:
        assert_same(state, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", CONV)
def test_s6_padding_modes_and_same_equal_explicit_padding(rank: int, mode: str) -> None:
    x, y = data(rank)
    name = "constant" if mode == "zeros" else mode
    sharing = "expand" if (rank + MODES.index(mode)) % 2 else "reduce"
    even = CONV[rank](4, 3, 4, padding="same", padding_mode=mode).double()
    plain = CONV[rank](4, 3, 3, padding=1, dilation=2, padding_mode=mode).double()
    written = [Padded(even, (1, 2) * rank, name), Padded(plain, (1, 1) * rank, name)]
    states, _ = branch_factors([even, plain, *written], x, y, sharing=sharing, keys=[0, 1, 0, 1])
    assert_same(states[2], states[0])
    assert_same(states[3], states[1])


@pytest.mark.parametrize("rank", CONV)
def test_input_factor_equals_einconv_group_by_group(rank: int) -> None:
    """KFC's input factor sums over positions, ours is their mean: multiply by the number of positions."""
    x, y = data(rank)
    settings = [
        {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 4},
        {"kernel_size": 2, "stride": 1, "padding": 0, "dilation": 2, "groups": 1},
        {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "groups": 2},
        {"kernel_size": 3, "stride": 1, "padding": "same", "dilation": 1, "groups": 4},
    ]
    model = Branches([CONV[rank](4, 4, bias=False, **geometry) for geometry in settings], x)
    found = batch_factors(model, nn.CrossEntropyLoss(), x, y, fisher="empirical", sharing="expand")
    for index, geometry in enumerate(settings):
        equation, operands, shape = convNd_kfc.einsum_expression(x, **geometry)
        peer = torch.einsum(equation, *operands).reshape(shape)
        positions = model.layers[index](x)[0, 0].numel()
        assert relative_error(positions * found[f"layers.{index}.weight"]["A"], peer) < TOLERANCE
