"""Saving the folder: where it can be written, and what a part that fails leaves to the others."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_fx
from kfac_fx import export
from kfac_fx.errors import ExportWarning, KfacFxError
from kfac_fx.export import folder as folder_module
from kfac_fx.export import subject as subject_module
from kfac_fx.export.subject import Subject
from kfac_fx.planned import Plan
from kfac_fx.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    return Target(
        model=nn.Linear(3, 2), loss_fn=nn.MSELoss(), inputs=inputs, targets=targets, label="small.py"
    )


@pytest.fixture(scope="module")
def plan(target: Target) -> Plan:
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets)


def files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_file_a_place_under_one_and_a_dead_link_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, problem in (
        (tmp_path / "taken", "it is a file, not a folder"),
        (tmp_path / "taken" / "deep" / "er", f"{tmp_path / 'taken'} is a file, not a folder"),
        (tmp_path / "link", "it is a link to nothing, not a folder"),
    ):
        with pytest.raises(KfacFxError) as raised:
            export.check_folder(folder)
        assert str(raised.value) == f"cannot write to {folder}: {problem}. Choose another folder."


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(KfacFxError, match="no permission to write in"):
        export.check_folder(tmp_path / "new" / "deep")


def test_checking_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("new/deep"), Path("."), tmp_path / "other", Path("..") / tmp_path.name / "x"):
        export.check_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_is_raised_when_the_other_parts_are_written(
    plan: Plan, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(subject: Subject) -> dict[str, str]:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(folder_module, "PARTS", (broken, *folder_module.PARTS[1:]))
    with pytest.raises(ZeroDivisionError, match="ours"):
        export.save(plan, target, tmp_path)
    assert {"index.html", "train_step.py", "environment.json", "passes/0-captured.py"} <= files_in(tmp_path)


def test_of_several_parts_that_fail_each_is_named(
    plan: Plan, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(subject: Subject) -> dict[str, str]:
        raise ZeroDivisionError("ours")

    def second(subject: Subject) -> dict[str, str]:
        raise KfacFxError("it holds a surprise.")

    monkeypatch.setattr(folder_module, "PARTS", (first, *folder_module.PARTS[1:2], second))
    named = r"^second was not written either: KfacFxError: it holds a surprise\.$"
    with pytest.warns(RuntimeWarning, match=named), pytest.raises(ZeroDivisionError, match="ours"):
        export.save(plan, target, tmp_path)
    assert files_in(tmp_path) == {"environment.json"}


def test_a_step_that_cannot_be_a_file_of_its_own_is_a_warning_and_the_others_are_written(
    target: Target, tmp_path: Path
) -> None:
    method = kfac_fx.KFAC(quadratic_model=True)
    plan = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method=method)
    with pytest.warns(ExportWarning, match=r"^train_step\.py was not written: ") as warned:
        export.save(plan, target, tmp_path)
    assert [w.message.file for w in warned if isinstance(w.message, ExportWarning)] == ["train_step.py"]
    assert {"index.html", "report.json", "passes/0-captured.py"} <= files_in(tmp_path)


def test_the_parts_share_one_statistics_step(
    plan: Plan, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    write = subject_module.statistics_step

    def counted(plan: Plan) -> subject_module.StatisticsStep:
        nonlocal count
        count += 1
        return write(plan)

    monkeypatch.setattr(subject_module, "statistics_step", counted)
    export.save(plan, target, tmp_path)
    assert count == 1
