"""`load_target`: the three ways to name a model, and one clear message for each way to get it wrong."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_fx.errors import TargetError
from kfac_fx.target import load_target

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Linear(3, 2), nn.functional.cross_entropy, torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

def build_wide():
    return nn.Linear(3, 20), nn.functional.mse_loss, torch.ones(4, 3), torch.zeros(4, 20)
"""


def write(folder: Path, content: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(content)
    return str(path)


def message(text: str) -> str:
    with pytest.raises(TargetError) as caught:
        load_target(text)
    return str(caught.value)


def test_a_file_uses_its_build_function(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, FACTORY))
    assert isinstance(target.model, nn.Linear) and target.model.out_features == 2
    assert target.loss_fn is nn.functional.cross_entropy
    assert target.inputs.shape == (4, 3) and target.targets.dtype == torch.long


def test_a_factory_can_be_named(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, FACTORY) + ":build_wide")
    assert target.model.out_features == 20
    assert target.label.endswith("net.py:build_wide")


def test_a_package_module_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_targets").mkdir()
    write(tmp_path / "zoo_of_targets", FACTORY, "nets.py")
    monkeypatch.chdir(tmp_path)
    assert load_target("zoo_of_targets.nets:build_wide").model.out_features == 20
    assert load_target("zoo_of_targets.nets").model.out_features == 2


def test_a_plain_file_gives_its_module_level_names(tmp_path: Path) -> None:
    plain = "import torch\nmodel = torch.nn.Linear(3, 2)\ninputs = torch.ones(4, 3)\n"
    target = load_target(write(tmp_path, plain))
    assert target.loss_fn is None and target.targets is None and target.inputs.shape == (4, 3)
    more = plain + "targets = torch.zeros(4, 2)\nloss_fn = torch.nn.functional.mse_loss\n"
    target = load_target(write(tmp_path, more, "more.py"))
    assert target.loss_fn is nn.functional.mse_loss and target.targets.shape == (4, 2)


def test_a_file_can_import_its_neighbours_and_the_path_is_restored(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 7\n", "neighbour_of_net.py")
    late = "def build():\n    from neighbour_of_net import WIDTH\n    import torch\n"
    late += "    return torch.nn.Linear(3, WIDTH), None, torch.ones(4, 3), torch.zeros(4, WIDTH)\n"
    before = list(sys.path)
    assert load_target(write(tmp_path, late)).model.out_features == 7
    assert sys.path == before


def test_a_file_may_hold_dataclasses_and_the_name_of_a_standard_module(tmp_path: Path) -> None:
    content = "from __future__ import annotations\nimport dataclasses\n"
    content += "@dataclasses.dataclass\nclass Config:\n    width: int\n"
    target = load_target(write(tmp_path, content + FACTORY, "types.py"))
    assert target.model.out_features == 2


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, FACTORY, "network.py")
    text = message(str(tmp_path / "netwrok.py"))
    assert "netwrok.py does not exist" in text and "Did you mean 'network.py'?" in text


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    assert "is a folder; name a file in it" in message(str(tmp_path))


def test_a_missing_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no module named 'no_such_package'" in message("no_such_package.nets:build")
    write(tmp_path, FACTORY, "alone.py")
    monkeypatch.setitem(sys.modules, "alone", None)
    assert "Did you mean 'alone.py'?" in message("alone")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("printing.sub.model:prints", "printing.sub.models"),
        ("printing.subs.models", "printing.sub.models"),
        ("printin.sub.models", "printing.sub.models"),
        ("printing.sub.elsewhere", None),
        ("printing.sub.models.deep", None),
    ],
)
def test_a_module_gets_a_proposal_from_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, meant: str | None
) -> None:
    (tmp_path / "printing" / "sub").mkdir(parents=True)
    for folder in (tmp_path / "printing", tmp_path / "printing" / "sub"):
        write(folder, "", "__init__.py")
    write(tmp_path / "printing" / "sub", FACTORY, "models.py")
    monkeypatch.chdir(tmp_path)
    for name in ("printing", "printing.sub", "printing.sub.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = message(typed)
    for name in ("printing", "printing.sub", "printing.sub.models"):
        sys.modules.pop(name, None)
    assert f"Did you mean {meant!r}?" in text if meant else "Did you mean" not in text


def test_a_message_of_the_users_code_gets_one_full_stop(tmp_path: Path) -> None:
    text = message(write(tmp_path, "raise ValueError('wrong.')\n"))
    assert "wrong." in text and ".." not in text


def test_a_failing_import_names_the_users_line(tmp_path: Path) -> None:
    text = message(write(tmp_path, "import torch\nimport a_module_that_is_not_there\n"))
    assert "ModuleNotFoundError" in text and "net.py:2: import a_module_that_is_not_there" in text
    assert "\n" not in text


def test_a_syntax_error_names_the_users_line(tmp_path: Path) -> None:
    text = message(write(tmp_path, "import torch\ndef build(:\n    pass\n"))
    assert "SyntaxError" in text and "net.py:2: def build(:" in text


def test_a_failed_import_leaves_no_module_behind(tmp_path: Path) -> None:
    before = set(sys.modules)
    message(write(tmp_path, "1 / 0\n", "divides.py"))
    assert set(sys.modules) == before


def test_a_script_that_exits_is_an_error(tmp_path: Path) -> None:
    assert "SystemExit" in message(write(tmp_path, "import sys\nsys.exit(0)\n"))


def test_a_failing_factory_names_the_users_line(tmp_path: Path) -> None:
    content = "import torch\ndef build():\n    return torch.ones(2) @ torch.ones(3)\n"
    text = message(write(tmp_path, content))
    assert "cannot call" in text and "net.py:3: return torch.ones(2) @ torch.ones(3)" in text


def test_a_factory_that_needs_arguments_is_an_error(tmp_path: Path) -> None:
    assert "missing 1 required positional argument" in message(
        write(tmp_path, "def build(width):\n    pass\n")
    )


def test_no_factory_and_no_model_says_what_to_define(tmp_path: Path) -> None:
    text = message(write(tmp_path, "x = 1\n"))
    assert "no factory 'build' and no `model`" in text and "(model, loss_fn, inputs, targets)" in text


def test_a_model_without_inputs_says_so(tmp_path: Path) -> None:
    text = message(write(tmp_path, "import torch\nmodel = torch.nn.Linear(3, 2)\n"))
    assert "no `inputs`" in text


def test_an_unknown_factory_gets_a_proposal_from_the_users_own_functions(tmp_path: Path) -> None:
    text = message(write(tmp_path, FACTORY + "from torch import save\n") + ":biuld_wide")
    assert "no factory 'biuld_wide'" in text and "Did you mean 'build_wide'?" in text and "save" not in text


def test_a_factory_that_is_no_function_is_an_error(tmp_path: Path) -> None:
    assert "build is not a function" in message(write(tmp_path, "build = 3\n"))


@pytest.mark.parametrize(
    ("returned", "said"), [("1, 2, 3", "returns 3 values"), ("nn.Linear(2, 2)", "returns one Linear")]
)
def test_a_factory_with_other_than_four_values_is_an_error(tmp_path: Path, returned: str, said: str) -> None:
    text = message(write(tmp_path, f"from torch import nn\ndef build():\n    return {returned}\n"))
    assert said in text and "four (model, loss_fn, inputs, targets)" in text


@pytest.mark.parametrize(
    ("model", "said"), [("'net'", "the model is a str"), ("nn.Linear", "make an instance: Linear()")]
)
def test_a_model_that_is_no_module_is_an_error(tmp_path: Path, model: str, said: str) -> None:
    content = f"from torch import nn\ndef build():\n    return {model}, None, None, None\n"
    assert said in message(write(tmp_path, content))
