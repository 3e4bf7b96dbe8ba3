"""`kfac_fx.verify`: ok on sound models, a violation at the right layer for each defect put into the library.

The defects are the negative controls: a verdict that cannot fail says nothing.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import kfac_fx
from kfac_fx import autocorrelation, collect, functions, gram, passes
from kfac_fx.layers.convolution import Convolution
from kfac_fx.layers.linear import Linear
from kfac_fx.methods import kfac as kfac_method
from kfac_fx.verification import Verification, document, update, whole
from kfac_fx_cli.main import app

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

Example = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor] | None, Any, Any]


class ConvNet(nn.Module):
    """Groups, stride, dilation, padding modes, a transposed convolution, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 2, padding="same", dilation=2, bias=False, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        return self.head(self.drop(self.up(torch.tanh(self.second(x)))).flatten(1))


class Transformer(nn.Module):
    """q, k and v of one input, batched experts, a position table and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(9, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(4, 6))
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(2, 6, 6) * 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        rows = x.flatten(0, 1).expand(2, -1, -1)
        x = x + torch.bmm(rows, self.experts).mean(0).unflatten(0, tokens.shape)
        return F.linear(x, self.token.weight)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def seeded(make: Callable[[], Example]) -> Example:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def mlp() -> Example:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3)


def conv_net() -> Example:
    return ConvNet(), nn.CrossEntropyLoss(), torch.randn(4, 2, 6, 6), torch.randint(0, 3, (4,))


def transformer() -> Example:
    targets = torch.randint(0, 9, (3, 4))
    targets[0, :2] = -100
    return Transformer(), token_loss, torch.randint(0, 9, (3, 4)), targets


def check_all_ok(found: Verification, *, but: tuple[str, ...] = ()) -> None:
    """Every check of every layer is ok; `but`: names of layers that are not checked in every part."""
    assert found.ok and found.layers, str(found)
    assert {v.layer.name for v in found.layers if v.status != "ok"} == set(but), str(found)


def violated(found: Verification) -> dict[str, set[str]]:
    """Names of violated checks of the first step by layer; the whole model's under its own name."""
    names = {v.layer.name: {c.name for c in v.checks if c.status == "violated"} for v in found.layers}
    names["whole"] = {check.name for check in found.whole if check.status == "violated"}
    names = {name: checks - {"later steps"} for name, checks in names.items()}
    return {name: checks for name, checks in names.items() if checks}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"fisher": "type2"}),
        (conv_net, {}),
        (conv_net, {"method": "skfac"}),
        (conv_net, {"fisher": "mc", "sharing": "reduce"}),
        (conv_net, {"float64": False}),
        (transformer, {"fisher": "mc"}),
        (transformer, {"method": "ekfac", "sharing": "reduce"}),
        (transformer, {"fisher": "type2", "exclude": ("experts",)}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_sound_models_are_ok_in_every_part(make: Callable[[], Example], options: dict[str, Any]) -> None:
    found = kfac_fx.verify(*seeded(make), **options)
    check_all_ok(found)
    assert found.precision == ("float64" if options.get("float64", True) else "float32")


def test_the_report_of_a_verification_is_in_words() -> None:
    lines = str(kfac_fx.verify(*seeded(mlp))).splitlines()
    header = next(line for line in lines if line.startswith("layer "))
    assert "seen at" in header and "rows" not in header
    assert any(line.startswith("scale of the loss (1/R_)") for line in lines)
    (others,) = [line for line in lines if line.startswith("update of other parameters")]
    assert others.split("parameters")[1].split()[0] == "none" and "ok" not in others


@pytest.mark.parametrize("method", kfac_fx.methods())
def test_every_method_has_directions_from_dense_algebra(method: str) -> None:
    check_all_ok(kfac_fx.verify(*seeded(mlp), method=method))


@pytest.mark.parametrize("rule", ["tikhonov", "sqrt", "full", "relative"])
def test_every_damping_rule_is_checked(rule: str) -> None:
    check_all_ok(kfac_fx.verify(*seeded(mlp), method=kfac_fx.KFAC(damping_rule=rule, damping=0.01)))


def test_what_has_no_formula_is_not_checked_and_says_why() -> None:
    found = kfac_fx.verify(*seeded(mlp), method=kfac_fx.KFAC(damping=0.0))
    assert found.ok
    reasons = {c.reason for v in found.layers for c in v.checks if c.status == "not checked"}
    assert reasons == {"without damping singular factors have no unique inverse"}
    assert "not checked  direction: without damping" in str(found)
    assert "3 not checked in every part" in str(found)


def test_nothing_of_the_user_is_changed() -> None:
    model, loss_fn, inputs, targets = seeded(conv_net)
    loss_fn(model(inputs), targets).backward()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    generator, batch = torch.get_rng_state(), inputs.clone()
    modes = [module.training for module in model.modules()]
    kfac_fx.verify(model, loss_fn, inputs, targets)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(inputs, batch)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_knows_float32_alone_is_verified_in_it() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    found = kfac_fx.verify(Narrow(), nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 3))
    check_all_ok(found)
    assert found.precision == "float32" and "does not run in float64" in found.note


def damage(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by a function that changes its result."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def test_a_wrong_stride_of_one_layer_is_a_violation_of_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(product: Any) -> Any:
        geometry = getattr(product, "geometry", None)
        if geometry is None or geometry.stride != (2, 2) or geometry.transposed:
            return product
        return replace(product, geometry=replace(geometry, padding=(0, 0)))

    damage(monkeypatch, Convolution, "match", shifted)
    monkeypatch.setattr(autocorrelation, "input_moment", lambda a, g, *, form, ones: _zero_moment(a, g, ones))
    found = violated(kfac_fx.verify(*seeded(conv_net), exclude=("second.*", "up.*")))
    assert found["first"] >= {"gradient", "statistics", "direction"}
    assert set(found) == {"first"}


def _zero_moment(a: Tensor, geometry: Any, ones: bool) -> gram.InputMoment:
    size = a.shape[1] // geometry.groups * 9
    shape = (geometry.groups, size)
    return gram.InputMoment(
        moment=a.new_zeros(*shape, size), total=a.new_zeros(shape), count=len(a) * 9, ones=ones
    )


def test_a_missing_scale_of_the_loss_is_a_violation_of_every_g(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gram.output_moment
    monkeypatch.setattr(gram, "output_moment", lambda uses, scale, **k: original(uses, scale * 0 + 1, **k))
    found = kfac_fx.verify(*seeded(mlp))
    assert violated(found) == {name: {"statistics", "direction"} for name in ("0", "2", "4")}
    assert "statistics (G)" in str(found)


def test_a_transposed_factor_pair_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kfac_method.two_sided

    def swapped(g: Tensor, gradient: Tensor, a: Tensor) -> Tensor:
        return original(a, gradient, g) if a.shape == g.shape else original(g, gradient, a)

    monkeypatch.setattr(kfac_method, "two_sided", swapped)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    found = kfac_fx.verify(model, nn.MSELoss(), torch.randn(6, 4), torch.randn(6, 3))
    assert violated(found) == {"0": {"direction"}}


def test_positions_taken_for_examples_are_seen_at_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def flattened(product: Any) -> Any:
        if getattr(product, "a", None) is None or product.d_in != 5:
            return product
        num, positions, _ = product.options["split"]
        return replace(product, options={**product.options, "split": (num * positions, 1, True)})

    damage(monkeypatch, Linear, "match", flattened)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = kfac_fx.verify(model, nn.MSELoss(), torch.randn(6, 7, 4), torch.randn(6, 7, 3), sharing="reduce")
    assert violated(found) == {"2": {"statistics", "direction"}}
    assert all(v.rows == "module" for v in found.layers)


def test_swapped_layers_are_a_violation_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    original = functions.use_nodes
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(6, 4), torch.randn(6, 3)
    plan = kfac_fx.inspect(model, nn.MSELoss(), *batch)
    assert [m.key for m in plan.matched] == ["0.weight", "2.weight", "4.weight"]
    twins: dict[str, Any] = {}

    def exchanged(match: Any) -> Any:
        twins.setdefault(match.key, match)
        other = twins.get({"0.weight": "2.weight", "2.weight": "0.weight"}.get(match.key, match.key), match)
        return original(other)

    monkeypatch.setattr(collect, "use_nodes", exchanged)
    found = violated(kfac_fx.verify(model, nn.MSELoss(), *batch))
    assert found and set(found) <= {"0", "2"} and all("statistics" in checks for checks in found.values())


def test_a_wrong_damping_is_a_violation_of_directions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, kfac_method, "paired_dampings", lambda pair: (pair[0], pair[1] * 1.001))
    found = kfac_fx.verify(*seeded(mlp))
    assert violated(found) == {name: {"direction"} for name in ("0", "2", "4")}


def test_a_wrong_length_of_the_update_is_a_violation_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, kfac_fx.KFAC, "rescale", lambda directions: [v * 1.01 for v in directions])
    found = violated(kfac_fx.verify(*seeded(mlp)))
    assert found == {name: {"update"} for name in ("0", "2", "4")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_rounding_of_a_parameter_is_no_error_of_the_update_and_two_more_are(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps  # the step of this dtype from 1 on
    old, wanted = torch.tensor([1.0, 0.25], dtype=dtype), torch.tensor([1 + eps, 0.25], dtype=dtype)
    assert update._error(old, wanted, old) == 0
    assert update._error(old + torch.tensor([0, 2 * eps], dtype=dtype), old, old) > 0  # eight of its steps
    assert update._error(old + 4 * eps, wanted, old) > 0


def test_flags_and_complex_numbers_are_compared_beside_buffers_that_differ() -> None:
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    plan = kfac_fx.inspect(nn.Linear(3, 2), F.cross_entropy, x, y)
    expected = {
        "mask": torch.tensor([True, False]),
        "mean": torch.tensor([1.0, 2.0]),
        "phase": torch.tensor([1 + 1j, 2 - 1j]),
        "count": torch.tensor(3),
    }

    def error(**changed: Tensor) -> float | None:
        return whole._all("buffers", {**expected, **changed}, expected, plan, tolerance=1e-6).error

    assert error(mean=torch.tensor([1.0, 2.5])) == pytest.approx(0.25)
    assert error(phase=expected["phase"] + 1j) == pytest.approx(0.5)
    assert error(phase=expected["phase"].conj()) == pytest.approx(1.0)
    assert error(mask=~expected["mask"], mean=expected["mean"] + 1e-9) == 1
    assert error(count=torch.tensor(6)) == 1


def test_a_wrong_root_of_the_hessian_is_a_violation_of_the_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    original = passes.root_cotangents
    monkeypatch.setattr(passes, "root_cotangents", lambda *a: (1.1 * c for c in original(*a)))
    found = violated(kfac_fx.verify(*seeded(mlp), fisher="type2"))
    assert found == {"whole": {"Fisher"}}


TARGET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(6, 4), torch.randint(0, 3, (6,))
"""


def test_the_command_exits_with_0_and_prints_json_alone(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text(TARGET)
    result = CliRunner().invoke(app, ["verify", str(file), "--json", "-m", "foof", "--own-dtype"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == "kfac_fx.verify/1" and report["ok"] and report["precision"] == "float32"
    assert [layer["key"] for layer in report["layers"]] == ["0.weight", "2.weight"]
    assert {check["status"] for layer in report["layers"] for check in layer["checks"]} == {"ok"}


def test_the_command_exits_with_4_and_names_layer_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "small.py"
    file.write_text(TARGET)
    damage(monkeypatch, kfac_method, "paired_dampings", lambda pair: (pair[0] * 2, pair[1]))
    result = CliRunner().invoke(app, ["verify", str(file), "--no-color"])
    assert result.exit_code == 4
    assert "VIOLATED  0  direction: error" in result.stdout and "2 VIOLATED" in result.stdout


def test_the_command_ends_with_1_for_an_unknown_method(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text(TARGET)
    result = CliRunner().invoke(app, ["verify", str(file), "-m", "kfak"])
    assert result.exit_code == 1 and "Did you mean 'kfac'?" in result.stderr and not result.stdout


def test_an_error_that_is_no_number_is_a_violation_and_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, kfac_fx.KFAC, "precondition", lambda v: v * float("nan"))
    found = kfac_fx.verify(*seeded(mlp))
    assert violated(found)["0"] >= {"direction"}
    json.dumps(document(found), allow_nan=False)
