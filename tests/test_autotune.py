"""`kfac-fx bench --autotune`: every form of a convolution's A is measured as plans run it and can be used."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx import bench as benchmark
from kfac_fx.bench import autotune, bench, measured_forms, run
from kfac_fx.bench.autotune import programs
from kfac_fx.bench.records import Tuned
from kfac_fx.errors import KfacFxError
from kfac_fx.forms import preferred
from kfac_fx.types import Use
from tests.oracles import relative_error

Data = tuple[nn.Module, nn.Module, Tensor, Tensor]


def convolutional() -> Data:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), *layers, nn.Flatten(), nn.Linear(4 * 9, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(8, 2, 6, 6), torch.randint(3, (8,))


def uses(data: Data) -> dict[str, Use]:
    return {m.name: m.uses[0] for m in kfac_fx.inspect(*data).matched if m.uses[0].geometry is not None}


def forms(data: Data) -> dict[str, str]:
    return {name: use.options["form"] for name, use in uses(data).items()}


@pytest.fixture(scope="module")
def tuned() -> tuple[Tuned, ...]:
    return autotune(*convolutional())


def test_every_form_of_every_geometry_is_measured(tuned: tuple[Tuned, ...]) -> None:
    assert [(entry.layers, entry.channels) for entry in tuned] == [(("0",), 2), (("1",), 2), (("3",), 4)]
    for entry in tuned:
        assert set(entry.seconds) == set(entry.estimates) and entry.loss >= 1
        assert entry.best == min(entry.seconds, key=lambda form: entry.seconds[form])
    assert set(tuned[0].seconds) == {"pixels"} and len(tuned[1].seconds) > 1


def test_equal_geometries_are_measured_once() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)))
    x = torch.randn(2, 2, 5, 5)
    (entry,) = autotune(model, nn.MSELoss(), x, x)
    assert entry.layers == ("0", "1", "2")


def test_layers_whose_positions_are_reduced_have_no_forms() -> None:
    assert autotune(*convolutional(), options={"sharing": "reduce"}) == ()


def test_measured_programs_compute_a_without_computing_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    (use,) = uses((layer, nn.MSELoss(), x, torch.randn(8, 3, 6, 6, dtype=torch.float64))).values()
    monkeypatch.setattr(Tensor, "normal_", lambda empty: empty.copy_(x))
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    found = programs(use, backend="eager")
    assert set(found) == {"patches", "shifts", "transform", "convolution"}
    for compute in found.values():
        with torch.profiler.profile() as profile:
            (moment,) = compute(0)
        assert relative_error(moment[0], rows.T @ rows) < 1e-12
        assert not {event.key for event in profile.key_averages()} & {"aten::arange", "aten::cos", "aten::eq"}


def test_preferred_forms_are_taken_inside_and_where_they_are_possible(tuned: tuple[Tuned, ...]) -> None:
    estimated = forms(convolutional())
    assert estimated == {"0": "pixels", "1": tuned[1].chosen, "3": tuned[2].chosen}
    for form in ("patches", "shifts", "transform", "convolution"):
        with preferred({entry.case: form for entry in tuned}):
            assert forms(convolutional()) == {"0": "pixels", "1": form, "3": form}
    with preferred({tuned[1].case: "convolution"}):
        assert forms(convolutional()) == estimated | {"1": "convolution"}
    assert forms(convolutional()) == estimated


def slowest_of(tuned: tuple[Tuned, ...]) -> tuple[Tuned, ...]:
    """As if the form that the cost model likes least had been the fastest."""
    return tuple(
        Tuned(**{**vars(entry), "seconds": {form: 1 / t for form, t in entry.estimates.items()}})
        for entry in tuned
    )


def test_the_bench_times_methods_with_the_measured_forms_and_a_step_can_have_them(
    tuned: tuple[Tuned, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = {name: entry.best for entry in slowest_of(tuned) for name in entry.layers}
    assert expected != forms(convolutional())
    seen: list[dict[str, str]] = []
    made = run.SecondOrder

    def watched(twin: nn.Module, data: tuple, **settings: object) -> object:
        seen.append(forms((twin, *data)))
        return made(twin, data, **settings)

    monkeypatch.setattr(run, "autotune", lambda *data, **settings: slowest_of(tuned))
    monkeypatch.setattr(run, "SecondOrder", watched)
    report = bench(*convolutional(), methods=["kfac"], steps=1, warmup=1, tune=True)
    assert seen == [expected]
    (file, *_) = benchmark.save(report, tmp_path / "times.json")
    model, loss_fn, *batch = convolutional()
    step = kfac_fx.compile(model, loss_fn)
    with measured_forms(file):
        step(*batch)
    found = {m.name: m.uses[0].options["form"] for m in step.plan.matched if m.uses[0].geometry is not None}
    assert found == expected
    step(*batch)


def test_a_file_without_measured_forms_is_an_error(tmp_path: Path) -> None:
    for content in ("{", json.dumps({"autotune": None}), "[]"):
        (tmp_path / "times.json").write_text(content)
        with pytest.raises(KfacFxError, match="--autotune"):
            measured_forms(tmp_path / "times.json")
    with pytest.raises(KfacFxError, match="missing.json"):
        measured_forms(tmp_path / "missing.json")
