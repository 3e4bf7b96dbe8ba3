"""Every pass is named, timed and logged, and the result of a step without a pass is what its name says."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import kfac_fx
from kfac_fx import stages
from kfac_fx.errors import CaptureError, UnknownNameError
from kfac_fx_cli.main import app

PIPELINE = (
    "capture",
    "match",
    "plan",
    "guard",
    "statistics",
    "averages",
    "precondition",
    "lengths",
    "products",
    "cleanup",
)
TARGET = f"{Path(__file__).parent / 'golden' / 'tiny_gpt.py'}:build"


class Net(nn.Module):
    """A convolution that has a fast form of A, and three linear layers, two of them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, padding=1)
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.avg_pool2d(self.conv(x), 8)).flatten(1)
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(3)
    draw = [torch.randn(8, 8, 16, 16, generator=source) for _ in range(4)]
    return [(x, torch.randint(0, 8, (8,), generator=source)) for x in draw]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return Net()


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither variable is set, and what a test changes on the logger is undone."""
    monkeypatch.delenv(stages.LOGS_VARIABLE, raising=False)
    monkeypatch.delenv(stages.WITHOUT_VARIABLE, raising=False)
    handlers, level, propagate = list(stages.LOGGER.handlers), stages.LOGGER.level, stages.LOGGER.propagate
    yield
    stages.LOGGER.handlers[:] = handlers
    stages.LOGGER.setLevel(level)
    stages.LOGGER.propagate = propagate


def compiled(model: nn.Module, *without: str, method: object = None) -> kfac_fx.TrainStep:
    """A step with statistics at each second step and inverses at each fourth."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    chosen = method or kfac_fx.KFAC(statistics_every=2, inverse_every=4, damping=0.1)
    with kfac_fx.without_passes(*without):
        return kfac_fx.compile(model, LOSS, method=chosen, optimizer=optimizer, backend="eager")


def trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], *without: str, method: object = None
) -> nn.Module:
    twin = copy.deepcopy(model)
    step = compiled(twin, *without, method=method)
    for inputs, targets in batches:
        step(inputs, targets)
    return twin


@pytest.fixture(scope="module")
def whole(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Trained with all passes."""
    torch.manual_seed(2)
    return trained(Net(), batches)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(map(torch.equal, first.parameters(), second.parameters()))


# --- the log ---


def test_nothing_is_printed_unless_asked_for(
    model: nn.Module, batches: list, capfd: pytest.CaptureFixture
) -> None:
    kfac_fx.inspect(model, LOSS, *batches[0])
    assert capfd.readouterr() == ("", "")


def test_every_pass_of_a_step_is_logged_in_order_with_seconds_and_nodes(
    model: nn.Module, batches: list, caplog: pytest.LogCaptureFixture
) -> None:
    method = kfac_fx.SINGD(statistics_every=1)  # has no refresh: the first step is one program
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        compiled(model, method=method)(*batches[0])
    records = [r.args[0] for r in caplog.records if r.args and isinstance(r.args[0], stages.PassRecord)]
    assert [record.name for record in records] == [*PIPELINE, "lower"]
    assert all(record.seconds >= 0 and record.did for record in records)
    for before, after in zip(records, records[1:], strict=False):
        assert before.after == after.before
    by_name = {record.name: record for record in records}
    assert by_name["capture"].before == 0 and by_name["match"].before == by_name["match"].after
    assert "4 layers" in by_name["match"].did and by_name["statistics"].after > by_name["statistics"].before
    assert "1 of them like another" in by_name["statistics"].did  # third, like second
    assert f"{by_name['plan'].before:>6} -> " in str(by_name["plan"])


def test_the_level_debug_adds_a_line_for_each_layer(
    model: nn.Module, batches: list, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "kfac_fx.passes"):
        compiled(model)(*batches[0])
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    for layer in ("conv", "first", "second", "third"):
        assert any(line.startswith(f"statistics   {layer}: A 1x") for line in lines)


def test_the_nodes_of_a_program_add_up_until_it_is_lowered(
    model: nn.Module, batches: list, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        step = compiled(model)
        step(*batches[0])  # a refresh step: its program reads no state
    records = [r.args[0] for r in caplog.records if r.args and isinstance(r.args[0], stages.PassRecord)]
    assert records[-1].name == "lower" and records[-1].did.startswith("batch_statistics")
    for before, after in zip(records, records[1:], strict=False):
        assert before.after == after.before
    assert records[-1].after == len(step.graphs["batch_statistics"].graph.nodes)


def test_a_pass_that_fails_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with caplog.at_level(logging.INFO, "kfac_fx.passes"), pytest.raises(CaptureError):
        kfac_fx.inspect(Branches(2, 2), nn.MSELoss(), torch.ones(2, 2), torch.ones(2, 2))
    assert "capture" in caplog.text and "failed: CaptureError" in caplog.text


@pytest.mark.parametrize(("wanted", "detailed"), [("passes", False), ("+passes", True)])
def test_the_environment_turns_the_log_on(
    wanted: str, detailed: bool, batches: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KFAC_FX_LOGS", wanted)
    stages.log_as_asked()
    stages.log_as_asked()  # a second time changes nothing
    compiled(nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(8, 8)))(*batches[0])
    out, err = capsys.readouterr()
    assert out == "" and err.count("[kfac_fx] capture ") == 1 and "[kfac_fx] plan " in err
    assert ("statistics   2: A 1x9x9" in err) is detailed


def test_an_unknown_log_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_FX_LOGS", "pases")
    with pytest.warns(UserWarning, match="there is no log 'pases'. Did you mean 'passes'"):
        stages.log_as_asked()
    assert not stages.LOGGER.handlers


# --- names ---


def test_an_unknown_pass_gets_a_proposal() -> None:
    with pytest.raises(UnknownNameError, match="'precond'. Did you mean 'precondition'"):
        kfac_fx.without_passes("precond").__enter__()


@pytest.mark.parametrize("name", ["capture", "match", "plan", "guard", "cleanup"])
def test_a_pass_that_all_others_need_says_so(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{name!r} cannot be switched off: .* These can: statistics"):
        kfac_fx.without_passes(name).__enter__()


def test_the_environment_switches_passes_off(
    model: nn.Module, batches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFAC_FX_WITHOUT", "forms, lengths")
    with kfac_fx.without_passes("equal-layers"):
        plan = kfac_fx.inspect(model, LOSS, *batches[0])
    assert plan.without == {"forms", "lengths", "equal-layers"}
    monkeypatch.setenv("KFAC_FX_WITHOUT", "from")
    with pytest.raises(UnknownNameError, match="KFAC_FX_WITHOUT: there is no pass 'from'"):
        kfac_fx.inspect(model, LOSS, *batches[0])


def test_a_step_remembers_what_was_off_when_it_was_compiled(model: nn.Module, batches: list) -> None:
    with kfac_fx.without_passes("lengths"):
        step = kfac_fx.compile(model, LOSS)
    step(*batches[0])
    assert step.plan.without == {"lengths"}
    assert kfac_fx.inspect(model, LOSS, *batches[0]).without == frozenset()


def test_the_command_line_switches_passes_off() -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["inspect", TARGET, *arguments])
        return result.exit_code, result.output

    assert run("--without", "forms", "--without", "lengths")[0] == 0
    code, output = run("--without", "length")
    assert code == 1 and "Did you mean 'lengths'?" in output


# --- what a step is without a pass ---


def plainly_trained(model: nn.Module, batches: list) -> nn.Module:
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for inputs, targets in batches:
        optimizer.zero_grad()
        LOSS(twin(inputs), targets).backward()
        optimizer.step()
    return twin


@pytest.mark.parametrize("method", [None, "nkfac"])
def test_without_precondition_a_step_is_the_optimizers(
    model: nn.Module, whole: nn.Module, batches: list, method: str | None
) -> None:
    found = trained(model, batches, "precondition", method=method)
    assert same(found, plainly_trained(model, batches))
    assert not same(found, whole)


def test_without_precondition_accumulated_batches_are_the_optimizers_step(
    model: nn.Module, batches: list
) -> None:
    twin = copy.deepcopy(model)
    step = compiled(twin, "precondition")
    step.accumulate(*batches[0])
    step.update()
    assert same(twin, plainly_trained(model, batches[:1]))


def test_without_lengths_directions_are_unscaled(model: nn.Module, whole: nn.Module, batches: list) -> None:
    """Refresh steps scale eagerly, others in the graph: the oracle is the method that has no clip."""
    unclipped = kfac_fx.KFAC(statistics_every=2, inverse_every=4, damping=0.1, kl_clip=None)
    found = trained(model, batches, "lengths")
    assert same(found, trained(model, batches, method=unclipped))
    assert not same(found, whole)


@pytest.mark.parametrize("name", ["statistics", "averages"])
def test_without_statistics_or_averages_factors_keep_their_state(
    model: nn.Module, batches: list, name: str
) -> None:
    whole = compiled(model)
    whole(*batches[0])
    saved = copy.deepcopy(whole.state_dict())
    step = compiled(model, name)
    step.load_state_dict(saved)
    for inputs, targets in batches[1:]:  # a step with statistics due, in one graph
        step(inputs, targets)
    step.accumulate(*batches[0])  # and one by accumulation
    step.update()
    after = step.state_dict()["curvature"]
    for layer, state in saved["curvature"].items():
        for factor in ("A", "G"):
            assert torch.equal(after[layer][factor], state[factor])
    whole(*batches[1])
    whole(*batches[2])
    assert not torch.equal(whole.state_dict()["curvature"]["first.weight"]["A"], after["first.weight"]["A"])


def test_a_fresh_step_without_statistics_has_initial_factors(model: nn.Module, batches: list) -> None:
    step = compiled(model, "statistics", "lengths")
    twin = copy.deepcopy(model)
    for inputs, targets in batches:
        step(inputs, targets)
    assert not step.state_dict()["curvature"]["conv.weight"]["A"].any()
    for found, wanted in zip(
        model.parameters(), plainly_trained(twin, batches).parameters(), strict=True
    ):  # inverses start as the identity
        torch.testing.assert_close(found, wanted)


def test_without_forms_patches_give_the_same_to_rounding(model: nn.Module, batches: list) -> None:
    model = model.double()
    doubles = [(inputs.double(), targets) for inputs, targets in batches]
    fast = kfac_fx.inspect(model, LOSS, *doubles[0])
    with kfac_fx.without_passes("forms"):
        plain = kfac_fx.inspect(model, LOSS, *doubles[0])
    forms = [plan.matched[0].uses[0].options["form"] for plan in (fast, plain)]
    assert forms[0] != "patches" and forms[1] == "patches"
    whole = trained(model, doubles)
    for found, wanted in zip(trained(model, doubles, "forms").parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_without_equal_layers_each_layer_is_traced_and_results_are_the_same_bits(
    model: nn.Module, whole: nn.Module, batches: list, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        found = trained(model, batches, "equal-layers")
    assert "like another" not in caplog.text
    assert same(found, whole)


def test_without_lower_nothing_is_compiled(
    model: nn.Module, batches: list, caplog: pytest.LogCaptureFixture
) -> None:
    with kfac_fx.without_passes("lower"):
        step = kfac_fx.compile(model, LOSS, backend="inductor")
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        step(*batches[0])
    lowered = [line for line in caplog.text.splitlines() if "with its first run" in line]
    assert lowered and all("eager" in line for line in lowered)


def test_two_passes_that_are_off_are_both_off(model: nn.Module, batches: list) -> None:
    found = trained(model, batches, "statistics", "precondition")
    assert same(found, plainly_trained(model, batches))
