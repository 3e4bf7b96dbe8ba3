"""`step.report()`: its figures against NumPy and dense algebra, its counts against schedules, its silence."""

import copy
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import host
from kfac_fx.errors import KfacFxError, UnknownNameError
from kfac_fx.live import StepReport
from kfac_fx.live.health import effective_rank
from kfac_fx.methods import METHODS
from tests.test_every_method import method_of, step_of
from tests.training import Batch, snapshot

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


class Blocks(nn.Module):
    """Two layers that are alike and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def batches(count: int, size: int = 24) -> list[Batch]:
    return [(torch.randn(size, 6), torch.randint(4, (size,))) for _ in range(count)]


def trained(
    method: Any, steps: int, *, lr: float = 0.1, **options: Any
) -> tuple[kfac_fx.TrainStep, list[float]]:
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"backend": "eager", "optimizer": optimizer} | options
    step = kfac_fx.compile(model, F.cross_entropy, method=method, **options)
    return step, [float(step(*batch)) for batch in batches(steps)]


def factor(report: StepReport, layer: str, side: str) -> Any:
    (found,) = [entry for entry in report.layers if entry.name == layer]
    return next(entry for entry in found.factors if entry.side == side)


@pytest.fixture(scope="module")
def shared() -> tuple[kfac_fx.TrainStep, list[float]]:
    """A step that is trained once; the tests that use it only read."""
    torch.manual_seed(0)
    return trained(kfac_fx.KFAC(damping=0.01, damping_rule="full", inverse_every=2), 5)


def test_conditions_and_effective_ranks_are_those_of_numpy_s_eigenvalues(shared: Any) -> None:
    (step, _), damping = shared, 0.01
    report, state = step.report(), step.state_dict()["curvature"]
    assert [layer.name for layer in report.layers] == ["blocks.0", "blocks.1", "head"]
    for layer in report.layers:
        for found in layer.factors:
            values = numpy.linalg.eigvalsh(state[layer.key][found.side].double().numpy())[0]
            shares = values.clip(0) / values.clip(0).sum()
            entropy = -sum(p * math.log(p) for p in shares if p > 0)
            assert found.eigenvalues.numpy() == pytest.approx(values, rel=1e-9, abs=1e-12)
            assert (found.dim, found.count) == (len(values), 1)
            assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-9)
            assert found.largest == pytest.approx(values[-1]) and found.damping == pytest.approx(damping)
            expected = (values[-1] + damping) / (values[0] + damping)
            assert found.damped_condition == pytest.approx(expected, rel=1e-6)
    # Inputs with a constant column have full rank; the gradients of a softmax sum to zero.
    a = numpy.linalg.eigvalsh(state["blocks.0.weight"]["A"].double().numpy())[0]
    assert factor(report, "blocks.0", "A").condition == pytest.approx(a[-1] / a[0], rel=1e-9)
    assert factor(report, "head", "G").condition == math.inf
    assert "singular" in str(report) and 1 <= factor(report, "head", "G").effective_rank <= 3


def test_the_effective_rank_counts_equal_eigenvalues() -> None:
    assert effective_rank(torch.tensor([0.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)) == pytest.approx(3)
    assert effective_rank(torch.zeros(3, dtype=torch.float64)) == 0


@pytest.mark.parametrize("rule", ["factored", "relative"])
def test_the_residual_is_that_of_the_stored_inverse_against_the_present_damped_factor(rule: str) -> None:
    damping = 0.05
    step, _ = trained(kfac_fx.KFAC(damping=damping, damping_rule=rule, inverse_every=3), 6)
    state = step.state_dict()["curvature"]["blocks.1.weight"]
    a, g = (state[side][0].double() for side in ("A", "G"))
    if rule == "relative":
        added = [max(1e-4, damping * float(torch.linalg.matrix_norm(factor, 2))) for factor in (a, g)]
    else:
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        added = [pi * math.sqrt(damping), math.sqrt(damping) / pi]
    for side, matrix, extra in zip("AG", (a, g), added, strict=True):
        eye = torch.eye(len(matrix), dtype=torch.float64)
        error = state[f"{side}_inverse"][0].double() @ (matrix + extra * eye) - eye
        expected = float(torch.linalg.matrix_norm(error)) / math.sqrt(len(matrix))
        found = factor(step.report(), "blocks.1", side)
        assert found.residual == pytest.approx(expected, rel=1e-3) and expected > 1e-3
        assert found.damping == pytest.approx(extra, rel=1e-4)


@pytest.mark.parametrize("name", ["kfac", "nkfac", "foof", "skfac"])
def test_after_a_refresh_without_new_statistics_the_residual_is_rounding(name: str) -> None:
    step, _ = trained(method_of(name, inverse_every=1, statistics_every=1), 3)
    residuals = [f.residual for layer in step.report().layers for f in layer.factors]
    assert residuals and all(r is not None and r < 1e-4 for r in residuals)


def test_counts_follow_the_schedule() -> None:
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=5)
    step, losses = trained(method, 13)
    report = step.report()
    assert report.steps == 13 and list(report.losses) == losses
    for layer in report.layers:
        # Statistics at 1, 3, .., 13 and refreshes, which collect none by themselves, at 1, 6, 11.
        assert (layer.statistics, layer.refreshes, layer.since_refresh) == (7, 3, 2)
    kinds = {kind.name: kind.count for kind in report.kinds}
    assert sum(kinds.values()) == 13 and kinds["first run"] >= 2
    assert all(kind.median > 0 for kind in report.kinds)
    phases = {phase.name: len(phase.seconds) for phase in report.phases}
    assert all(phase.median > 0 for phase in report.phases)
    assert phases["update"] == 13 and phases["refresh"] == phases["precondition"] > 0
    assert "ms  refresh" in str(report) and "phase/refresh_ms" in report.scalars()
    assert report.state_bytes == sum(layer.state_bytes for layer in report.layers)
    tensors = {id(t): t for s in step.state_dict()["curvature"].values() for t in s.values()}
    assert report.state_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_counts_go_on_where_times_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_fx.live.journal.KEPT", 2)
    report = trained(kfac_fx.KFAC(statistics_every=2, inverse_every=4), 9)[0].report()
    assert sum(kind.count for kind in report.kinds) == 9
    update = next(phase for phase in report.phases if phase.name == "update")
    assert update.count == 9 and len(update.seconds) == 2 and len(report.losses) == 2
    written = report.document()["phases"]["update"]
    assert written == {"count": 9, "milliseconds": [1e3 * seconds for seconds in update.seconds]}
    assert update.median == pytest.approx(sum(update.seconds) / 2)


def test_the_document_has_every_field_of_the_report(shared: Any) -> None:
    report = shared[0].report()
    document = report.document(eigenvalues=True)
    assert document.keys() == {f.name for f in fields(report)} - {"render"} | {"schema"}
    for written, layer in zip(document["layers"], report.layers, strict=True):
        assert written.keys() == {f.name for f in fields(layer)}
        assert (written["group"], document["max_dim"]) == (layer.group, report.max_dim)
        for factor_written, found in zip(written["factors"], layer.factors, strict=True):
            assert factor_written.keys() == {f.name for f in fields(found)}
    assert document["kl"].keys() == {f.name for f in fields(report.kl)}


def test_the_text_counts_one_and_escapes_what_a_terminal_acts_on(shared: Any) -> None:
    report = shared[0].report()
    layers = tuple(replace(layer, group=f"odd\x1b[31m{layer.group}") for layer in report.layers)
    text = str(replace(report, steps=1, left_out=("head",), layers=layers))
    assert "kfac  1 step " in text and "of 1 layer with factors beyond" in text
    assert all(line.isprintable() for line in text.split("\n")) and r"odd\x1b[31mhead" in text


def test_staggered_layers_have_ages_of_their_own() -> None:
    method = kfac_fx.KFAC(statistics_every=1, inverse_every=6)
    step, _ = trained(method, 1, refresh="staggered")
    last: dict[str, int] = {}
    counts: dict[str, int] = {}
    for number, batch in enumerate(batches(9), start=1):
        now = step.state_dict()["counts"]["refreshes"]
        last |= {key: number for key, count in now.items() if counts.get(key) != count}
        counts = dict(now)
        step(*batch)
    now = step.state_dict()["counts"]["refreshes"]
    last |= {key: 10 for key, count in now.items() if counts.get(key) != count}
    ages = {layer.key: layer.since_refresh for layer in step.report().layers}
    assert ages == {key: 10 - number for key, number in last.items()} and len(set(ages.values())) == 3


def test_accumulated_batches_are_one_step_with_a_loss_each() -> None:
    step, losses = trained("kfac", 1)
    for batch in batches(2):
        losses.append(float(step.accumulate(*batch)))
    assert step.report().steps == 1 and list(step.report().losses) == losses
    step.update()
    report = step.report()
    assert report.steps == 2 and list(report.losses) == losses
    assert sum(kind.count for kind in report.kinds) == 2


def test_a_factor_that_is_not_positive_definite_shows_in_the_counts() -> None:
    step, _ = trained(kfac_fx.KFAC(inverse_every=2, statistics_every=1), 2)
    assert (step.report().retried, step.report().kept_last) == (0, 0)
    state = step.state_dict()
    state["curvature"]["head.weight"]["G"] = -1e6 * torch.eye(4)[None]
    step.load_state_dict(state)
    step(*batches(1)[0])
    report = step.report()
    # Of no precision and with no tenfold damping it can be inverted: retried, raised, and kept.
    assert report.kept_last == 1 and report.retried >= 1
    assert report.scalars()["refresh/kept_last"] == 1 and "kept last 1" in str(report)


def test_the_returned_loss_may_be_changed_by_the_user() -> None:
    step, _ = trained("kfac", 0)
    loss = step(*batches(1)[0])
    before = float(loss)
    loss.add_(1.0)
    assert step.report().losses == (before,)


def test_a_step_that_fails_leaves_no_note() -> None:
    step, losses = trained("kfac", 2)
    x, y = batches(1)[0]
    with pytest.raises(KfacFxError):
        step(x * math.nan, y)
    report = step.report()
    assert list(report.losses) == losses and report.steps == 2
    assert sum(kind.count for kind in report.kinds) == 2


@pytest.mark.parametrize("bound", [1e-7, 1e3])
def test_kl_is_the_product_of_the_update_with_the_gradient(bound: float) -> None:
    """With plain SGD the change of the parameters is -lr nu V, and autograd gives the gradient."""
    lr, model, (x, y) = 0.1, Blocks(), batches(1)[0]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = kfac_fx.compile(model, F.cross_entropy, method=kfac_fx.KFAC(kl_clip=bound), optimizer=optimizer)
    step(x, y)
    change = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    clipped = -lr * sum(float((c * g).sum()) for c, g in zip(change, gradients, strict=True))
    kl = step.report().kl
    assert kl is not None and kl.step == 1
    assert kl.clip == pytest.approx(min(1.0, bound / clipped), rel=1e-3)
    assert kl.value == pytest.approx(kl.clip * clipped, rel=1e-3)
    assert (kl.value == pytest.approx(bound, rel=1e-3)) == (bound < 1e-3) and kl.clip <= 1
    assert kl.value <= bound * 1.001


def plain_gradients(model: nn.Module, *given: Batch) -> list[Tensor]:
    """Autograd's, of the mean over batches of one size, for a copy of the model."""
    twin = copy.deepcopy(model)
    loss = sum(F.cross_entropy(twin(x), y) for x, y in given) / len(given)
    return list(torch.autograd.grad(loss, list(twin.parameters())))


def kl_of(change: list[Tensor], gradients: list[Tensor], names: list[str]) -> float:
    """Sum of <-change, lr grad> with the rates of `of_two_rates`; its middle layer has no preconditioner."""
    return -sum(
        (0.02 if "head" in name else 0.1) * float((c * g).sum())
        for name, c, g in zip(names, change, gradients, strict=True)
        if "blocks.1" not in name
    )


def of_two_rates(name: str, **options: Any) -> kfac_fx.TrainStep:
    """Plain SGD in float64 with schedules on which steps 2, 3, 5 and 6 have no new inverses."""
    model = Blocks().double()
    groups = [{"params": model.blocks.parameters()}, {"params": model.head.parameters(), "lr": 0.02}]
    schedule = {"statistics_every": 2} | ({"inverse_every": 3} if METHODS[name].inverse_every else {})
    settings = {"method": method_of(name, **schedule), "exclude": ("blocks.1.*",)} | options
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return kfac_fx.compile(model, F.cross_entropy, optimizer=optimizer, backend="eager", **settings)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_of_every_method_has_a_kl(name: str) -> None:
    """The change of the parameters is -lr V; autograd gives the gradient: lr^2 <V, grad> for each layer.

    The last update is of two accumulated batches. A clip that is active gives its bound.
    """
    step = of_two_rates(name)
    names, data = [n for n, _ in step.model.named_parameters()], batches(6)
    for number, (x, y) in enumerate(data[:5], start=1):
        given = [(x.double(), y)] if number < 5 else [(x.double(), y), (data[5][0].double(), data[5][1])]
        gradients = plain_gradients(step.model, *given)
        before = [p.detach().clone() for p in step.model.parameters()]
        if number < 5:
            step(*given[0])
        else:
            for batch in given:
                step.accumulate(*batch)
            step.update()
        change = [p.detach() - old for p, old in zip(step.model.parameters(), before, strict=True)]
        report, moved = step.report(), kl_of(change, gradients, names)
        assert report.kl is not None and report.kl.step == number and report.kl_note == ""
        clip, bound = report.kl.clip, step.method.kl_clip  # type: ignore[attr-defined]
        assert moved > 0 and (clip is None) == (bound is None) and "at step" not in str(report)
        assert report.kl.value == pytest.approx((clip or 1.0) * moved, rel=1e-9)
        if clip is not None and clip < 1:  # nu^2 T is the bound, where nu T is what the parameters show
            assert report.kl.value == pytest.approx(bound, rel=1e-9)


def test_the_kl_of_staggered_steps_is_that_of_the_change() -> None:
    schedule = kfac_fx.KFAC(statistics_every=1, inverse_every=3, kl_clip=None)
    step = of_two_rates("kfac", method=schedule, refresh="staggered")
    names = [n for n, _ in step.model.named_parameters()]
    for x, y in batches(4):
        gradients = plain_gradients(step.model, (x.double(), y))
        before = [p.detach().clone() for p in step.model.parameters()]
        step(x.double(), y)
        change = [p.detach() - old for p, old in zip(step.model.parameters(), before, strict=True)]
        assert step.report().kl.value == pytest.approx(kl_of(change, gradients, names), rel=1e-9)


@pytest.mark.parametrize("off", ["precondition", "products", "lengths"])
def test_kl_without_a_pass(off: str) -> None:
    """Without products the weights are the same bits; without lengths there is no clip to report."""
    data, steps = batches(3), []
    for names in ([], [off]):
        torch.manual_seed(1)
        with kfac_fx.without_passes(*names):
            step, _ = trained(kfac_fx.KFAC(kl_clip=1e-7, inverse_every=5), 0)
        for batch in data:
            step(*batch)
        steps.append(step)
    whole, without = (step.report() for step in steps)
    weights = [torch.cat([p.flatten() for p in step.model.parameters()]) for step in steps]
    assert torch.equal(*weights) == (off == "products")
    assert whole.kl.clip < 1 and whole.kl.value == pytest.approx(1e-7)
    if off == "lengths":
        assert without.kl.clip is None and without.kl.value > 1e-6
    else:
        assert without.kl is None and without.kl_note == f"the pass {off!r} is off"
        assert "kl/value" not in without.scalars() and f"not known: the pass '{off}' is off" in str(without)


def test_where_kl_is_not_known_the_report_says_why() -> None:
    step, _ = trained(kfac_fx.KFAC(quadratic_model=True), 2, optimizer=None)
    assert step.report().kl is None and "quadratic model" in str(step.report())
    step, _ = trained("kfac", 2, exclude=("*",))
    assert step.report().kl is None and step.report().kl_note == "no layer is preconditioned"
    assert "next step" in trained("kfac", 0)[0].report().kl_note


def test_the_text_says_of_which_step_an_older_kl_is(shared: Any) -> None:
    report = shared[0].report()
    assert "   at step" not in str(report)
    assert "   at step 4, the last" in str(replace(report, kl=replace(report.kl, step=4)))


def test_an_update_that_fails_leaves_the_kl_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = trained("kfac", 2)
    before = step.report().kl

    def refuse() -> None:
        raise RuntimeError("no update")

    monkeypatch.setattr(step.optimizer, "step", refuse)
    with pytest.raises(RuntimeError, match="no update"):
        step(*batches(1)[0])
    assert step.report().kl == before and before.step == 2


def test_a_batch_that_is_not_finite_and_reported_later_has_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients count as zero, as on CUDA."""
    monkeypatch.setattr(host, "waits", lambda device: True)
    step, _ = trained(kfac_fx.KFAC(inverse_every=4), 2)
    assert step.report().kl.value > 0
    x, y = batches(1)[0]
    step(x * math.nan, y)
    assert (step.report().kl.step, step.report().kl.value) == (3, 0.0)


def run_on(step: kfac_fx.TrainStep, *, reports: bool) -> tuple[Any, ...]:
    """What three more steps leave, the numbers drawn included."""
    torch.manual_seed(4)
    for batch in batches(3, size=8):
        step(*batch)
        if reports:
            assert step.report().layers and str(step.report()) and step.report().scalars()
    state = step.state_dict()
    curvature = {f"{k}.{n}": t.clone() for k, s in state["curvature"].items() for n, t in s.items()}
    return snapshot(step.model), curvature, state["counts"], torch.get_rng_state()


@pytest.mark.parametrize("name", METHODS)
def test_a_report_changes_nothing(name: str) -> None:
    """Weights, buffers, state and the generator are the same bits with a report after each step.

    A model with dropout and batch norm; labels are drawn for the Fisher.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 4))
    step = step_of(model, name, fisher="mc")
    step(*batches(1, size=8)[0])
    start = copy.deepcopy((model.state_dict(), step.state_dict()))
    second = run_on(step, reports=False)
    model.load_state_dict(start[0])
    step.load_state_dict(start[1])
    first = run_on(step, reports=True)
    for one, other in zip(first[:2], second[:2], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert first[2] == second[2] and torch.equal(first[3], second[3])
    assert any(not torch.equal(first[0][k], tensor) for k, tensor in start[0].items())


def test_of_groups_the_worst_one_is_shown() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4 * 9, 3))
    step = kfac_fx.compile(model, method=kfac_fx.KFAC(damping=0.01, damping_rule="full"))
    step(torch.randn(16, 2, 4, 4) * torch.tensor([1.0, 9.0])[:, None, None], torch.randint(3, (16,)))
    values = numpy.linalg.eigvalsh(step.state_dict()["curvature"]["0.weight"]["A"].double().numpy())
    assert values.shape == (2, 5)
    found = factor(step.report(), "0", "A")
    expected = [(row[-1] + 0.01) / (row[0] + 0.01) for row in values]
    assert (found.dim, found.count) == (5, 2) and expected[1] > 2 * expected[0]
    assert found.damped_condition == pytest.approx(expected[1], rel=1e-6)
    assert found.eigenvalues.numpy() == pytest.approx(values[1], rel=1e-9)


def test_before_the_first_step_and_after_loading_there_is_a_report() -> None:
    step, _ = trained("kfac", 0)
    report = step.report()
    assert report.steps == 0 and report.layers == () and report.losses == () and report.kinds == ()
    assert "no step has run" in str(report) and report.scalars()["damping/lambda"] == 0.03
    other, _ = trained("kfac", 3)
    step.load_state_dict(other.state_dict())
    assert step.report().steps == 3 and step.report().losses == ()
    assert step.report().state_bytes == other.report().state_bytes > 0
    assert "factors  of the loaded state are known from the next step" in str(step.report())
    step(*batches(1)[0])
    assert step.report().steps == 4 and len(step.report().losses) == 1
    assert [layer.since_refresh for layer in step.report().layers] == [None] * 3


def test_layers_are_chosen_by_pattern_and_large_factors_left_out(shared: Any) -> None:
    step, _ = shared
    assert [layer.name for layer in step.report(layers="blocks.*").layers] == ["blocks.0", "blocks.1"]
    with pytest.raises(UnknownNameError, match="head"):
        step.report(layers="heda")
    report = step.report(max_dim=6)
    assert list(report.left_out) == ["blocks.0", "blocks.1", "head"]
    assert factor(report, "head", "A").condition is None and factor(report, "head", "G").condition
    assert "beyond max_dim=6" in str(report)


def test_the_text_fits_a_screen_in_forward_order_with_alike_layers_in_one_line(shared: Any) -> None:
    step, _ = shared
    text = str(step.report())
    assert "blocks.[0-1]  x2" in text and "largest over smallest" in text
    assert shown_layers(text) == ["blocks.[0-1]", "head"]
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 120


def test_of_more_layers_than_fit_the_worst_are_shown_in_forward_order(shared: Any) -> None:
    report = shared[0].report()
    first = report.layers[0]
    numbers = [3, 40, 7, 21, 90, 1, 60, 30, 11, 50, 80, 5, 70]
    factors = [
        tuple(replace(f, condition=float(n), damped_condition=float(n)) for f in first.factors)
        for n in numbers
    ]
    layers = tuple(
        replace(first, name=f"l{n}", group=f"l{n}", key=f"l{n}", factors=of_one)
        for n, of_one in zip(numbers, factors, strict=True)
    )
    text = str(replace(report, layers=layers))
    assert shown_layers(text) == [f"l{n}" for n in numbers if n > 5]  # ten layers of two factors
    assert "and 3 more lines of layers, better conditioned" in text


def shown_layers(text: str) -> list[str]:
    """Names at the start of the table's lines."""
    table = text.split("\n\n")[1].split("\nand ")[0].split("\nOf alike")[0].splitlines()[1:]
    return [line.split()[0] for line in table if line[0] != " "]


def test_scalars_are_flat_floats_and_json_has_no_other_constants(shared: Any) -> None:
    step, losses = shared
    report = step.report()
    scalars = report.scalars()
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert scalars["loss/last"] == losses[-1] and scalars["loss/mean"] == pytest.approx(sum(losses) / 5)
    assert scalars["damping/lambda"] == 0.01
    head = factor(report, "head", "A")
    assert scalars["damped_condition/head.A"] == head.damped_condition
    assert scalars["effective_rank/head.A"] == head.effective_rank
    assert "condition/head.G" not in scalars  # infinite

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(report.to_json(), parse_constant=refuse)
    assert content["steps"] == 5 and content["losses"] == losses and content["schema"] == "kfac_fx.live/1"
    found = content["layers"][2]["factors"][1]
    assert found["side"] == "G" and found["condition"] == "inf" and "eigenvalues" not in found
    full = json.loads(report.to_json(eigenvalues=True))["layers"][2]["factors"][1]["eigenvalues"]
    assert full == factor(report, "head", "G").eigenvalues.tolist()


def test_the_tensorboard_example_writes_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import digits_tensorboard

    scalars = digits_tensorboard.train(tmp_path, epochs=1, every=6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars) and "residual/conv1.A" in scalars
    for name, value in scalars.items():
        assert events.Scalars(name)[-1].step == 12
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6)
    sys.modules.pop("digits_tensorboard")
