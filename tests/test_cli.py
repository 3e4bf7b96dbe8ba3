"""The command `kfac-fx`: exit codes, what goes to stdout, one clean message per error."""

import ast
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import kfac_fx
from kfac_fx.report import render
from kfac_fx.target import load_target
from kfac_fx_cli.main import app

TARGET = str(Path(__file__).parent / "golden" / "tiny_gpt.py")
COVERED = f"{TARGET}:build_covered"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def error_of(*arguments: str) -> str:
    """The one line on stderr of a command that ends with 1 and prints nothing else."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    line = result.stderr.strip()
    assert line.startswith("error: ") and "Traceback" not in line and "\n" not in line
    return line


def test_inspect_prints_the_report() -> None:
    target = load_target(TARGET)
    plan = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="kfac")
    result = run("inspect", TARGET)
    assert result.exit_code == 0 and result.stdout == render(plan) + "\n"


def test_options_reach_the_library() -> None:
    options = ("--fisher", "type2", "--sharing", "reduce", "--exclude", "2.*", "--json")
    content = json.loads(run("inspect", COVERED, *options).stdout)
    assert (content["fisher"], content["sharing"]) == ("type2", "reduce")
    reasons = {skip["parameter"]: skip["reason"] for skip in content["skips"]}
    assert reasons["2.weight"] == "excluded"


def test_json_is_all_of_stdout_even_if_the_target_prints(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text("print('loading')\n" + Path(TARGET).read_text())
    result = run("inspect", f"{noisy}:build_covered", "--json")
    assert json.loads(result.stdout)["schema"] == "kfac_fx.report/1"
    assert "loading" in result.stderr


def test_json_says_that_it_ignores_the_layer_option() -> None:
    assert "no effect" in run("inspect", COVERED, "--json", "--layer", "2").stderr


def test_strict_ends_with_2_if_something_trainable_is_skipped() -> None:
    assert run("inspect", TARGET, "--strict").exit_code == 2
    assert run("inspect", COVERED, "--strict", "--json", "--exclude", "2.weight").exit_code == 2


def test_strict_does_not_count_frozen_parameters() -> None:
    result = run("inspect", COVERED, "--strict")
    assert result.exit_code == 0 and "frozen  1 tensor" in result.stdout


def test_layer_and_skipped_narrow_and_widen_the_report() -> None:
    only = run("inspect", TARGET, "--layer", "blocks.1.*").stdout
    assert "blocks.1.q" in only and "blocks.0.q" not in only and "filters" not in only
    assert "-> the loss does not depend on it" in run("inspect", TARGET, "--skipped").stdout


def test_output_that_is_no_terminal_has_no_colour() -> None:
    assert "\x1b[" not in run("inspect", COVERED).stdout


def test_a_terminal_gets_colour_unless_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in run("methods").stdout
    assert "\x1b[" not in run("methods", "--no-color").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in run("methods").stdout


def test_transform_writes_the_folder_and_says_so(tmp_path: Path) -> None:
    result = run("transform", TARGET, "--method", "kfac", "-o", str(tmp_path / "deep" / "out"))
    assert result.exit_code == 0
    folder = tmp_path / "deep" / "out"
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    *_, saved, page, programs, step, report = result.stdout.splitlines()
    assert saved == f"saved {len(written)} files in {folder}"
    for line, name in zip(
        (page, programs, step, report), ("index.html", "passes/", "train_step.py", "report.json"), strict=True
    ):
        assert line.startswith(f"  {folder}/{name}  ") and (folder / name).exists()
    assert written >= {"summary.txt", "report.json", "passes/0-captured.py", "passes/0-1.diff"}
    assert result.stdout.startswith((folder / "summary.txt").read_text())
    assert json.loads((folder / "report.json").read_text())["model"] == "TinyGPT"
    sizes = {}
    for name in ("0-captured", "step-without-statistics", "8-cleaned"):
        program = (folder / "passes" / f"{name}.py").read_text()
        ast.parse(program)
        sizes[name] = len(program)
    assert sizes["0-captured"] < sizes["step-without-statistics"] < sizes["8-cleaned"]


def test_transform_without_a_pass_says_in_one_line_that_there_is_no_training_step(tmp_path: Path) -> None:
    result = run("transform", COVERED, "--without", "statistics", "-o", str(tmp_path))
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: train_step.py was not written: passes are switched off: statistics")
    assert "train_step.py" not in result.stdout and f"  {tmp_path}/index.html" in result.stdout
    with pytest.raises(SystemExit, match="statistics"):
        exec((tmp_path / "train_step.py").read_text(), {})


def test_transform_writes_to_kfac_fx_out_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("transform", COVERED).exit_code == 0
    assert (tmp_path / "kfac_fx_out" / "report.json").exists()


def test_methods_lists_every_method_with_its_schedule() -> None:
    result = run("methods")
    assert result.exit_code == 0
    for name in kfac_fx.methods():
        assert name in result.stdout
    assert str(kfac_fx.KFAC().damping) in result.stdout and "arXiv:1503.05671" in result.stdout


def test_an_unknown_method_gets_a_proposal() -> None:
    assert "Did you mean 'kfac'?" in error_of("inspect", COVERED, "--method", "kfacs")


@pytest.mark.parametrize("option", ["--fisher", "--sharing"])
def test_an_unknown_setting_is_an_error(option: str) -> None:
    assert "'nonsense' does not exist" in error_of("inspect", COVERED, option, "nonsense")


def test_an_unknown_layer_pattern_is_an_error() -> None:
    assert "no layer or parameter fits 'encoder.*'" in error_of("inspect", COVERED, "--layer", "encoder.*")


def test_an_exclude_pattern_that_fits_nothing_is_an_error() -> None:
    assert "nothing_like_this" in error_of("inspect", COVERED, "--exclude", "nothing_like_this")


def test_a_missing_target_is_an_error() -> None:
    assert "does not exist" in error_of("inspect", "no_such_file.py")
    assert "does not exist" in error_of("transform", "no_such_file.py", "--method", "kfac")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    message = error_of("transform", COVERED, "-o", str(tmp_path / "taken"))
    assert "cannot write to" in message and "it is a file" in message
    assert "cannot write to" in error_of("transform", "no_such_file.py", "-o", str(tmp_path / "taken"))


def test_a_missing_argument_shows_the_usage() -> None:
    result = run("inspect")
    assert result.exit_code == 2 and "TARGET" in result.stderr
