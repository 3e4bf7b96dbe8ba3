"""`statistics_precision="bfloat16"`: statistics are those of rows rounded to bfloat16, summed in float32.

The oracle rounds explicit rows, from plain PyTorch or by hand, and sums their products in float64.
"""

import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kfac_fx
from kfac_fx import gram
from kfac_fx.forms import preferred
from kfac_fx.methods import METHODS
from kfac_fx.report.document import to_json
from tests.test_verify import Transformer, seeded, token_loss

ROUNDED = kfac_fx.KFAC(statistics_precision="bfloat16", decay=0.0)
FULL = kfac_fx.KFAC(decay=0.0)
Moments = dict[str, Tensor]


def nearest(rows: Tensor) -> Tensor:
    """The nearest numbers with 8 bits of significand, ties to even, without torch's own type."""
    fraction, exponent = torch.frexp(rows.double())
    return torch.ldexp((fraction * 2**8).round(), exponent - 8)


def test_the_oracle_rounds_as_torch_does() -> None:
    rows = torch.cat([torch.randn(1000), 1 + torch.arange(64) / 2**9, torch.zeros(1)])
    assert torch.equal(nearest(rows), rows.bfloat16().double())


def factors(model: nn.Module, method: Any, x: Tensor, y: Tensor, **options: Any) -> dict[str, Moments]:
    step = kfac_fx.compile(
        model,
        method=method,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        backend="eager",
        **options,
    )
    step(x, y)
    return step.state_dict()["curvature"]


def gradient_at(model: nn.Module, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Input of the module, and gradient of the mean loss by its output times the number of examples."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, given, output: seen.extend((given[0], output)))
    loss = F.cross_entropy(model(x), y)
    handle.remove()
    (g,) = torch.autograd.grad(loss, seen[1])
    return seen[0].detach(), g


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6, error


def conv(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Conv2d(4, 6, 3, padding=1, stride=1, groups=groups)
    return nn.Sequential(first, nn.Flatten(), nn.Linear(6 * 36, 3))


@pytest.mark.parametrize(
    ("form", "groups", "sharing"),
    [
        ("patches", 2, "expand"),
        ("shifts", 2, "expand"),
        ("transform", 1, "expand"),
        ("convolution", 2, "expand"),
        ("patches", 2, "reduce"),
    ],
)
def test_every_form_of_a_convolution_and_a_linear_layer_have_factors_of_rounded_rows(
    form: str, groups: int, sharing: str
) -> None:
    model, x, y = conv(groups), torch.randn(5, 4, 6, 6), torch.randint(3, (5,))
    geometry = kfac_fx.inspect(model, None, x, y).matched[0].uses[0].geometry
    assert geometry is not None
    with preferred({(geometry, 5, 4, "cpu"): form}):  # type: ignore[dict-item]
        found = factors(model, ROUNDED, x, y, sharing=sharing)
    _, g = gradient_at(model, model[0], x, y)
    rows = F.unfold(nearest(x), 3, padding=1).mT.unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
    ones = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    g_rows = nearest(g).flatten(2).mT.unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
    if sharing == "reduce":
        ones, g_rows = ones.mean(2, keepdim=True), g_rows.sum(2, keepdim=True)
    count = ones.shape[1] * ones.shape[2]
    close(found["0.weight"]["A"], torch.einsum("gnti,gntj->gij", ones, ones) / count)
    close(found["0.weight"]["G"], torch.einsum("gnti,gntj->gij", g_rows, g_rows) * 5)
    a, g = gradient_at(model, model[2], x, y)
    a = torch.cat([nearest(a), torch.ones(5, 1)], 1)
    close(found["2.weight"]["A"][0], a.mT @ a / 5)
    close(found["2.weight"]["G"][0], nearest(g).mT @ nearest(g) * 5)


def test_they_differ_from_full_statistics_by_the_rounding_of_rows_and_no_more() -> None:
    model, x, y = conv(), torch.randn(5, 4, 6, 6), torch.randint(3, (5,))
    full, rounded = factors(model, FULL, x, y), factors(model, ROUNDED, x, y)
    for key, name in itertools.product(full, "AG"):
        scale = full[key][name].diagonal(dim1=1, dim2=2)
        bound = (scale.unsqueeze(1) * scale.unsqueeze(2)).sqrt()  # Cauchy-Schwarz: of the sums of |a_i a_j|
        error = ((rounded[key][name] - full[key][name]).abs() / bound.clamp(min=1e-20)).max()
        assert 2**-14 < error <= 2.01 * 2**-8


def upwards() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(3 * 49, 3))


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_lookups_tied_heads_experts_and_transposed_convolutions_pass_the_independent_check(name: str) -> None:
    """`verify` rounds the rows of its own: patches by their definition, one-hot rows, rows per expert."""
    kind = METHODS[name]
    method = kind(statistics_precision="bfloat16")  # type: ignore[call-arg]
    make = {
        "kfac": lambda: (Transformer(), token_loss, torch.randint(9, (5, 4)), torch.randint(9, (5, 4))),
        "ekfac": lambda: (upwards(), F.cross_entropy, torch.randn(6, 2, 3, 3), torch.randint(3, (6,))),
    }[name]
    found = kfac_fx.verify(*seeded(make), method=method)
    assert found.ok and found.precision == "float32" and "rounded to bfloat16" in found.note
    checks = {check.name: check for check in found.layers[0].checks}
    assert checks["statistics"].status == "ok" and checks["statistics"].error < 1e-6  # type: ignore[operator]


def test_the_check_tells_rounded_rows_from_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "rounded", gram.wide)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    found = kfac_fx.verify(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), None, x, y, method=ROUNDED)
    statuses = {check.name: check.status for check in found.layers[0].checks}
    assert statuses["statistics"] == "violated" and statuses["gradient"] == "ok"


def test_blocks_of_scales_and_shifts_and_counts_of_words_stay_full() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randint(9, (5, 4)), torch.randint(3, (5,))
    full, rounded = factors(model, FULL, x, y), factors(model, ROUNDED, x, y)
    assert torch.equal(full["1.weight"]["F"], rounded["1.weight"]["F"])
    assert torch.equal(full["0.weight"]["A"], rounded["0.weight"]["A"])
    assert not torch.equal(full["0.weight"]["G"], rounded["0.weight"]["G"])


def test_box_sums_and_the_column_of_ones_are_summed_in_float32() -> None:
    """257 ones are not a number of bfloat16, nor is 1 + 1/257."""
    model = nn.Linear(1, 3)
    x, y = torch.ones(257, 1), torch.zeros(257, dtype=torch.long)
    assert torch.equal(factors(model, ROUNDED, x, y)["weight"]["A"], torch.ones(1, 2, 2))


def test_a_model_in_float64_is_refused_by_the_name_of_a_parameter() -> None:
    with pytest.raises(
        kfac_fx.KfacFxError, match=r"statistics_precision='bfloat16': parameter '0.weight' is"
    ):
        kfac_fx.inspect(
            nn.Sequential(nn.Linear(4, 3)).double(),
            None,
            torch.randn(5, 4).double(),
            torch.randint(3, (5,)),
            method=ROUNDED,
        )


def test_reports_say_it() -> None:
    plan = kfac_fx.inspect(nn.Linear(4, 3), None, torch.randn(5, 4), torch.randint(3, (5,)), method=ROUNDED)
    assert "statistics of bfloat16 rows" in str(plan).splitlines()[0]
    assert json.loads(to_json(plan))["method"]["hyperparameters"]["statistics_precision"] == "bfloat16"


def narrow_products(*shape: int) -> list[str]:
    """What `gram` of rounded rows of float32 calls where bfloat16 is multiplied, without a device."""
    graph = make_fx(lambda x: gram.gram(gram.rounded(x)))(torch.empty(shape, device="meta")).graph
    products = [n for n in graph.nodes if str(n.target).startswith(("aten.mm", "aten.bmm", "aten.matmul"))]
    assert all(a.meta["val"].dtype == torch.bfloat16 for n in products for a in n.all_input_nodes)
    assert graph.output_node().all_input_nodes[0].meta["val"].dtype == torch.float32
    return [str(n.target) for n in products]


def test_on_cuda_rows_are_multiplied_as_they_are_with_a_result_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode():
        assert gram.rounded(torch.empty(3, device="cuda")).dtype == torch.bfloat16
        assert gram.rounded(torch.empty(3)).dtype == torch.float32
    monkeypatch.setattr(gram, "_multiplied_narrow", lambda rows: rows.dtype == torch.bfloat16)
    assert narrow_products(1, 8, 2, 5) == ["aten.mm.dtype"]
    assert narrow_products(3, 8, 2, 5) == ["aten.bmm.dtype"]
    assert narrow_products(1, 8, 2, 600) == ["aten.mm.dtype"] * 4


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_products_of_cuda_are_those_of_the_rounded_rows(
    groups: int, images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU lacks them: stand-ins multiply in float32."""
    rows = torch.randn(groups, 4, 5, 30).permute(0, 1, 3, 2) if images else torch.randn(groups, 4, 30, 520)
    wide = {"mm": torch.mm, "bmm": torch.bmm}
    for name in wide:

        def product(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, name: str = name) -> Tensor:
            assert left.dtype == right.dtype == torch.bfloat16
            return wide[name](left.to(out_dtype), right.to(out_dtype))

        monkeypatch.setattr(torch, name, product)
    monkeypatch.setattr(gram, "_multiplied_narrow", lambda rows: rows.dtype == torch.bfloat16)
    found = gram.gram(gram.rounded(rows))
    exact = nearest(rows).flatten(1, 2)
    close(found, exact.mT @ exact)
