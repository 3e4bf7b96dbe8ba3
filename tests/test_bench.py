"""`kfac_fx.bench`: what is run as which kind of step, and the figures that follow from the times."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.bench import BenchReport, ContenderReport, bench, kinds_of
from kfac_fx.bench.clock import in_turns, num_bytes, num_threads, peak_bytes
from kfac_fx.bench.contender import FIRST_ORDER, Contender, FirstOrder
from kfac_fx.bench.measure import phases_of
from kfac_fx.bench.records import Kind, Memory, Phase
from kfac_fx.bench.second_order import SecondOrder
from kfac_fx.errors import KfacFxError, UnknownNameError

CPU = torch.device("cpu")
Data = tuple[nn.Module, nn.Module, Tensor, Tensor]


def convolutional() -> Data:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), *layers, nn.Flatten(), nn.Linear(4 * 36, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(8, 2, 6, 6), torch.randint(3, (8,))


@pytest.fixture(scope="module")
def report() -> BenchReport:
    methods = ("kfac", kfac_fx.KFAC(statistics_every=2, inverse_every=4), "nkfac", "singd")
    return bench(*convolutional(), methods=methods, steps=3, warmup=1)


def test_every_contender_is_timed_and_sgd_comes_first(report: BenchReport) -> None:
    assert [entry.label for entry in report.contenders] == [
        "sgd",
        "adamw",
        "kfac",
        "kfac 2",
        "nkfac",
        "singd",
    ]
    assert all(len(entry.seconds) == 3 and min(entry.seconds) > 0 for entry in report.contenders)
    assert all(len(kind.seconds) == 5 for entry in report.contenders for kind in entry.kinds)
    assert report.baseline is report.contenders[0]
    assert report.batch == ((8, 2, 6, 6), (8,)) and report.model == "Sequential" and report.backend == "eager"


def test_kinds_of_steps_are_as_frequent_as_the_schedule_says(report: BenchReport) -> None:
    counts = {e.label: {kind.name: kind.per_period for kind in e.kinds} for e in report.contenders}
    assert counts["sgd"] == counts["adamw"] == {"plain": 1}
    assert counts["kfac"] == {"statistics": 9, "refresh": 1}
    assert counts["kfac 2"] == {"plain": 2, "statistics": 1, "refresh": 1}
    assert counts["nkfac"] == {"plain": 190, "statistics": 9, "refresh": 1}
    assert counts["singd"] == {"plain": 9, "statistics": 1}
    assert [report.contender("nkfac").every, report.contender("singd").every] == [(20, 200), (10, 0)]


def test_schedules_that_do_not_divide_have_refreshes_alone() -> None:
    found = kinds_of(lambda index: (index % 2 == 0, index % 3 == 0), 6)
    assert found == {"plain": (1, 5), "statistics": (2, 4), "refresh": (0,), "refresh alone": (3,)}


def test_a_step_run_as_some_number_does_what_the_schedule_has_there() -> None:
    model, *data = convolutional()
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=4)
    contender = SecondOrder(model, (*data,), method=method, backend="eager", options={})
    for kind, expected in {"plain": (0, 0), "statistics": (1, 0), "refresh": (1, 1)}.items():
        for index in contender.kinds[kind]:
            before = contender._progress.state_dict()["counts"]
            contender.run(index)
            after = contender._progress.state_dict()["counts"]
            for name, number in zip(("statistics", "refreshes"), expected, strict=True):
                assert {after[name][key] - before[name][key] for key in after[name]} == {number}


@pytest.mark.parametrize("label", ["sgd", "kfac"])
def test_parts_do_their_work_also_after_a_whole_step(label: str) -> None:
    model, *data = convolutional()
    contender: Contender = (
        FirstOrder(model, (*data,), optimizer=FIRST_ORDER["sgd"], mode=None)
        if label == "sgd"
        else SecondOrder(model, (*data,), method=kfac_fx.KFAC(), backend="eager", options={})
    )
    parts = contender.parts()
    for _ in range(2):
        contender.run(1)
        before = [p.detach().clone() for p in model.parameters()]
        parts["gradients"]()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        contender.run(1)
        before = [p.detach().clone() for p in model.parameters()]
        parts["update"]()
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_model_is_copied_and_copies_stay_where_they_are() -> None:
    model, *data = convolutional()
    before = copy.deepcopy(model.state_dict())
    contender = SecondOrder(
        twin := copy.deepcopy(model), (*data,), method=kfac_fx.KFAC(), backend="eager", options={}
    )
    for index in range(20):
        contender.run(index)
    bench(model, *data, methods=["kfac"], steps=1, warmup=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in twin.state_dict().items():
        assert not torch.equal(value, before[name]) and float((value - before[name]).abs().max()) < 1e-3


def entry_of(seconds: tuple[float, ...], kinds: tuple[Kind, ...], **rest: Any) -> ContenderReport:
    settings = {"label": "x", "every": (2, 10), "compile_seconds": 1.0, "phases": (), "memory": None} | rest
    return ContenderReport(seconds=seconds, kinds=kinds, **settings)


def report_of(*contenders: ContenderReport) -> BenchReport:
    run = {"model": "m", "batch": (), "device": "cpu", "backend": "eager", "threads": 1, "warmup": 1}
    return BenchReport(contenders=contenders, refresh="together", left_out={}, tuned=None, **run)


def test_figures_follow_from_the_times() -> None:
    plain = Kind(name="plain", per_period=7, seconds=(1.0, 9.0, 2.0))
    rare = Kind(name="refresh", per_period=3, seconds=(12.0, 10.0, 11.0))
    entry = entry_of((1.0, 2.0, 6.0, 3.0), (rare, plain))
    assert (entry.mean, entry.median, entry.slowest, entry.period) == (3.0, 2.5, 6.0, 10)
    assert entry.amortised == pytest.approx((7 * 2.0 + 3 * 11.0) / 10)
    assert (entry.period_median, entry.stall, entry.of_phases) == (2.0, 5.5, None)
    phases = Phase(name="update", seconds=3.0, share=1.0), Phase(name="refresh", seconds=8.0, share=0.25)
    assert entry_of((1.0,), (plain,), phases=phases).of_phases == 5.0
    sgd = entry_of((1.0, 1.0, 2.0), (Kind(name="plain", per_period=1, seconds=(0.5,)),), label="sgd")
    found = report_of(sgd, entry)
    expected = {"mean": 3.0 / (4 / 3), "median": 2.5, "slowest": 6.0, "amortised": entry.amortised / 0.5}
    assert found.ratios(entry) == pytest.approx(expected)


def test_a_statistics_step_may_hold_the_state_beside_what_sgd_needs() -> None:
    kinds = (Kind(name="plain", per_period=1, seconds=(1.0,)),)
    sgd = entry_of((1.0,), kinds, label="sgd", memory=Memory(held=20, peaks={"plain": 80}))
    peaks = {"plain": 85, "statistics": 105, "refresh": 400}
    entry = entry_of((1.0,), kinds, memory=Memory(held=500, peaks=peaks))
    assert report_of(sgd, entry).memory_ratio(entry) == 1.25
    assert report_of(sgd, entry).memory_ratio(sgd) == 1
    unknown = entry_of((1.0,), kinds)
    assert report_of(sgd, unknown).memory_ratio(unknown) is None


def test_phases_are_differences_of_programs() -> None:
    parts = {"gradients": 4.0, "plain": 6.0, "statistics": 11.0, "refresh": 20.0, "update": 1.0}
    found = {phase.name: (phase.seconds, phase.per_step) for phase in phases_of(parts, (2, 10))}
    assert found == {
        "forward+backward": (4.0, 4.0),
        "statistics": (5.0, 2.5),
        "refresh": (20.0, 2.0),
        "precondition": (2.0, 2.0),
        "update": (1.0, 1.0),
    }
    assert phases_of({}, (1, 1)) == ()
    assert phases_of({"gradients": 4.0, "update": 1.0}, None)[-1] == Phase(
        name="update", seconds=1.0, share=1.0
    )


def test_every_contender_has_the_phases_that_it_runs(report: BenchReport) -> None:
    names = {entry.label: [phase.name for phase in entry.phases] for entry in report.contenders}
    assert names["sgd"] == ["forward+backward", "update"]
    assert names["kfac"] == ["forward+backward", "statistics", "refresh", "precondition", "update"]
    assert names["singd"] == ["forward+backward", "statistics", "precondition", "update"]


def test_a_method_with_the_quadratic_model_is_timed_without_phases() -> None:
    method = kfac_fx.KFAC(quadratic_model=True, statistics_every=1, inverse_every=2)
    entry = bench(*convolutional(), methods=[method], steps=1, warmup=1).contender("kfac")
    assert entry.phases == () and {kind.name for kind in entry.kinds} == {"statistics", "refresh"}


def test_turns_alternate_and_go_backwards_every_other_round() -> None:
    seen: list[tuple[str, int]] = []
    runs = {name: lambda turn, name=name: seen.append((name, turn)) for name in "ab"}
    seconds = in_turns(runs, 3, CPU)
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_peak_counts_what_lives_at_once_and_not_what_was_there() -> None:
    held = torch.zeros(1000)

    def run() -> None:
        first = held + 1
        del first
        second = held + 2
        third = torch.cat([second, second])
        del second, third

    assert peak_bytes(run, CPU) == 12_000


def test_memory_counts_every_storage_once() -> None:
    base = torch.zeros(10)
    assert num_bytes([base, base[:5], base.view(2, 5), torch.zeros(3, dtype=torch.float64)]) == 40 + 24


def test_held_memory_is_that_of_model_optimizer_and_curvature(report: BenchReport) -> None:
    parameters = num_bytes(convolutional()[0].parameters())
    sgd, adamw, kfac = (report.contender(label).memory for label in ("sgd", "adamw", "kfac"))
    assert sgd is not None and adamw is not None and kfac is not None
    assert sgd.held == 2 * parameters
    assert 3 * parameters <= adamw.held <= 3 * parameters + 64
    model, loss_fn, inputs, targets = convolutional()
    plan = kfac_fx.inspect(model, loss_fn, inputs, targets, method="kfac")
    state = sum(factor.bytes for factor in plan.factors)
    assert 2 * parameters + state <= kfac.held <= 2 * parameters + state + 64
    assert kfac.peak == kfac.held + max(kfac.peaks.values())
    assert kfac.peaks["refresh"] > sgd.peaks["plain"] > parameters


def test_without_a_number_of_steps_the_longest_period_is_timed() -> None:
    report = bench(*convolutional(), methods=["kfac", "singd"], inverse_every=12, steps=None, warmup=1)
    assert report.steps == 12 and all(len(entry.seconds) == 12 for entry in report.contenders)


def test_a_staggered_refresh_spreads_over_the_period() -> None:
    model, *data = convolutional()
    method, options = kfac_fx.NKFAC(statistics_every=2, inverse_every=8), {"refresh": "staggered"}
    contender = SecondOrder(model, (*data,), method=method, backend="eager", options=options)
    assert sum(map(len, contender.kinds.values())) == 8
    refreshed = [name for name in contender.kinds if name.startswith("refresh")]
    assert sum(len(contender.kinds[name]) for name in refreshed) == 4  # one slot for each layer
    total = 0
    for name, steps in contender.kinds.items():
        for index in steps:
            before = sum(contender._progress.state_dict()["counts"]["refreshes"].values())
            contender.run(index)
            number = sum(contender._progress.state_dict()["counts"]["refreshes"].values()) - before
            assert (number > 0) is (name in refreshed)
            total += number
    assert total == 4


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with num_threads(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_settings_without_meaning_are_errors() -> None:
    data = convolutional()
    for name in ("steps", "warmup", "threads"):
        with pytest.raises(KfacFxError, match=f"{name}=0: must be at least 1"):
            bench(*data, **{name: 0})
    with pytest.raises(UnknownNameError, match="Did you mean 'nkfac'"):
        bench(*data, methods=["nkfak"])
    with pytest.raises(KfacFxError, match=r"KFAC\(statistics_every=0\)"):
        bench(*data, methods=["kfac"], statistics_every=0)
    with pytest.raises(UnknownNameError, match="backend='eagre'"):
        bench(*data, backend="eagre")


def test_what_a_step_frees_of_before_is_no_warning_and_does_not_count(
    capfd: pytest.CaptureFixture[str],
) -> None:
    held = [torch.ones(1000)]

    def step() -> None:
        held[0] = held[0].clone()

    assert peak_bytes(step, CPU) == 4000
    assert "Memory block" not in capfd.readouterr().err


def test_what_the_user_froze_stays_out_of_garbage_collections() -> None:
    before = gc.get_freeze_count()
    gc.unfreeze()
    in_turns({"nothing": lambda turn: None}, 2, torch.device("cpu"))
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        in_turns({"nothing": lambda turn: None}, 2, torch.device("cpu"))
        assert gc.get_freeze_count() == frozen > 0
    finally:
        if not before:
            gc.unfreeze()
