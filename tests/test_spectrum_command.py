"""`kfac-fx spectrum`: the plot's curves, JSON, options and errors of the command."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import kfac_fx
from kfac_fx import spectra
from kfac_fx.live import StepReport
from kfac_fx.spectra.plot import drawn
from kfac_fx.target import load_target
from kfac_fx_cli.main import app

TARGET = """
import torch
from torch import nn

torch.manual_seed(0)

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(16, 7), torch.randint(3, (16,))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("target") / "target.py"
    file.write_text(TARGET)
    return str(file)


@pytest.fixture(scope="module")
def report(target: str) -> StepReport:
    method = kfac_fx.KFAC(damping=0.01)
    options = {"method": method, "steps": 2, "layers": "*", "max_dim": 64, "options": {}}
    return spectra.collect(load_target(target), **options)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["spectrum", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_json_has_the_eigenvalues_of_the_factors_after_these_steps(target: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "spectrum.json"
    result = run(target, "--method", "kfac", "--steps", "2", "--json", "-o", str(file))
    assert result.exit_code == 0 and json.loads(file.read_text())["layers"]
    content = json.loads(result.stdout)
    loaded = load_target(target)
    step = kfac_fx.compile(loaded.model, loaded.loss_fn, method="kfac")
    for _ in range(2):
        step(loaded.inputs, loaded.targets)
    state = step.state_dict()["curvature"]
    assert content["steps"] == 2 and [layer["key"] for layer in content["layers"]] == list(state)
    for layer in content["layers"]:
        for found in layer["factors"]:
            values = numpy.linalg.eigvalsh(state[layer["key"]][found["side"]].double().numpy())[0]
            assert found["eigenvalues"] == pytest.approx(values, rel=1e-9, abs=1e-12)


def test_the_target_s_own_model_is_not_trained(target: str) -> None:
    loaded = load_target(target)
    before = [p.detach().clone() for p in loaded.model.parameters()]
    spectra.collect(loaded, method="foof", steps=1, layers="*", max_dim=64, options={})
    assert all(torch.equal(p, old) for p, old in zip(loaded.model.parameters(), before, strict=True))


def test_a_plot_is_saved_as_png_and_as_svg_with_names_ranks_and_dampings(
    report: StepReport, tmp_path: Path
) -> None:
    spectra.save(report, tmp_path / "a.png", title="net")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    spectra.save(report, tmp_path / "a.svg", title="net")
    drawing = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawing and drawing.count("#1b7f79") >= 4 and drawing.count("#b8741a") >= 4
    # matplotlib writes texts of an SVG as outlines, with the text itself in a comment.
    first = report.layers[0].factors[0]
    for text in (f"A 8: eff. rank {first.effective_rank:.1f}", "G 3: eff. rank", "dashed: the damping"):
        assert text in drawing


def test_curves_leave_out_what_is_zero_up_to_rounding(report: StepReport) -> None:
    head = report.layers[1].factors[1]
    assert head.side == "G" and head.dim == 3
    assert len(drawn(head)) == 2, "the gradients of a softmax sum to zero"
    assert drawn(head)[0] >= drawn(head)[1] > 0


def test_without_output_the_plot_is_spectrum_png_here(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(target, "--steps", "1", "--layer", "0")
    assert result.exit_code == 0 and "saved spectrum.png" in result.stdout
    assert (tmp_path / "spectrum.png").exists() and "eff. rank" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "spectrum.pdf"], "must end in .png, .svg or .json"),
        (["--steps", "0", "--json"], "use at least 1"),
        (["--method", "kfca", "--json"], "Did you mean"),
        (["--layer", "nothing", "--steps", "1", "--json"], "no layer fits 'nothing'"),
    ],
)
def test_an_error_is_one_message(target: str, options: list[str], message: str) -> None:
    result = run(target, *options)
    assert result.exit_code == 1 and result.stdout == "" and message in result.stderr


def test_a_target_that_fails_leaves_no_file_and_no_folder(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def build():\n    return 1 / 0\n")
    for file in ("new.svg", "deep/deeper/new.svg", "deep/new.json"):
        assert run(str(bad), "-o", str(tmp_path / file)).exit_code == 1
    assert [found.name for found in tmp_path.iterdir() if found.name != "__pycache__"] == ["bad.py"]


def test_a_model_that_cannot_be_copied_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "locked.py"
    own = "    model[0].lock = threading.Lock()\n    return model, "
    file.write_text("import threading\n" + TARGET.replace("    return model, ", own))
    result = run(str(file), "--json")
    assert (
        result.exit_code == 1 and result.stdout == "" and "Pass a model that was built anew" in result.stderr
    )


def test_without_matplotlib_a_plot_is_refused_before_the_training(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfac_fx.outfile.importlib.util.find_spec", lambda name: None)
    result = run(target, "-o", str(tmp_path / "spectrum.png"))
    assert result.exit_code == 1 and 'pip install "matplotlib' in result.stderr
    assert not (tmp_path / "spectrum.png").exists()
