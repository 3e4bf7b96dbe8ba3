"""`kfac-fx bench`: tables, JSON, plot, options and errors of the command."""

import json
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from kfac_fx import bench as benchmark
from kfac_fx.bench import BenchReport, bench
from kfac_fx.errors import KfacFxError
from kfac_fx_cli.main import app

TARGET = """
import torch
from torch import nn

def build():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(8, 2, 8, 8), torch.randint(3, (8,))
"""


@pytest.fixture(scope="module")
def report() -> BenchReport:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 3, padding=1)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * 36, 3))
    data = torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    return bench(model, None, *data, methods=("kfac", "nkfac", "singd"), steps=3, warmup=1, tune=True)


def test_the_document_is_json_and_says_what_the_report_says(report: BenchReport) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(benchmark.to_json(report), parse_constant=refuse)
    assert content["schema"] == "kfac_fx.bench/1" and len(content["autotune"]) == 2
    for found, entry in zip(content["contenders"], report.contenders, strict=True):
        assert found["label"] == entry.label and len(found["steps"]) == 3
        assert found["mean"] == pytest.approx(1e3 * statistics.fmean(entry.seconds))
        assert found["ratios"] == pytest.approx(report.ratios(entry))
        assert sum(kind["per_period"] for kind in found["kinds"].values()) == found["period"]
        assert found["memory"]["peak"] >= found["memory"]["held"] > 0
    assert content["contenders"][0]["ratios"]["mean"] == 1


def test_tables_show_every_contender_kind_phase_and_form(report: BenchReport) -> None:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        benchmark.show(report, console)
    printed = captured.get()
    for entry in report.contenders:
        assert printed.count(f"\n{entry.label} ") >= 3
        assert all(f" x {kind.per_period}" in printed for kind in entry.kinds)
    assert "COMPUTED" in printed and "20/200" in printed and "10/-" in printed
    assert "8x2x6x6 k3x3 p1" in printed and "pixels^T pixels" in printed


def test_results_are_saved_as_json_and_as_a_plot(report: BenchReport, tmp_path: Path) -> None:
    saved = benchmark.save(report, tmp_path / "deep" / "times.png")
    assert [file.name for file in saved] == ["times.json", "times.png"]
    assert saved[0].read_text() == benchmark.to_json(report) + "\n"
    assert saved[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("kfac_fx.outfile.importlib.util.find_spec", lambda name: None)
    yield


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_there_is_no_plot_and_asking_for_one_is_an_error(
    report: BenchReport, tmp_path: Path
) -> None:
    assert benchmark.save(report, tmp_path / "times.json") == (tmp_path / "times.json",)
    with pytest.raises(KfacFxError, match='pip install "matplotlib'):
        benchmark.check_files(tmp_path / "times.png")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def target(tmp_path: Path) -> str:
    file = tmp_path / "target.py"
    file.write_text(TARGET)
    return str(file)


def test_the_command_prints_json_alone_and_saves_it(target: str, tmp_path: Path) -> None:
    options = ("--method", "kfac", "--steps", "1", "--warmup", "1", "--threads", "1")
    every = ("--statistics-every", "2", "--inverse-every", "4")
    result = run(target, *options, *every, "--json", "-o", str(tmp_path / "times.json"))
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert [entry["label"] for entry in content["contenders"]] == ["sgd", "adamw", "kfac"]
    assert (content["contenders"][2]["statistics_every"], content["contenders"][2]["inverse_every"]) == (2, 4)
    assert content["threads"] == 1 and content["autotune"] is None
    assert json.loads((tmp_path / "times.json").read_text()) == content
    assert "compiling kfac" in result.stderr and "saved" in result.stderr


def test_the_command_prints_tables_with_the_methods_asked_for(target: str) -> None:
    result = run(target, "-m", "skfac", "-m", "foof", "--steps", "1", "--warmup", "1", "--autotune")
    assert result.exit_code == 0 and "skfac" in result.stdout and "foof" in result.stdout
    assert "nkfac" not in result.stdout and "8x2x8x8 k3x3 s2" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "kfacs"), "Did you mean 'kfac'?"),
        (("--steps", "0"), "steps=0: must be at least 1"),
        (("--output", "times.txt"), "must end in .json or .png"),
        (("--exclude", "nothing"), "nothing"),
        (("--fisher", "nonsense"), "'nonsense' does not exist"),
    ],
)
def test_errors_of_the_user_are_one_line(target: str, options: tuple[str, ...], message: str) -> None:
    result = run(target, *options)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_measurement_that_fails_leaves_no_file_and_keeps_an_old_one(target: str, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("kept")
    for file in (tmp_path / "new.json", tmp_path / "deep" / "new.json", old):
        assert run(target, "--steps", "0", "-o", str(file)).exit_code == 1
    assert not (tmp_path / "new.json").exists() and old.read_text() == "kept"
    assert not (tmp_path / "deep").exists()


def test_a_model_that_cannot_be_copied_is_one_error_with_a_remedy() -> None:
    model = nn.Linear(3, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(KfacFxError, match="bench changes nothing of yours: .* Pass a model that was built"):
        bench(model, None, torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), methods=("foof",))
