"""The table of `kfac-fx methods`: complete, true to dataclasses and plan, readable at 80 columns."""

import dataclasses
import io
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import kfac_fx
from kfac_fx.methods import METHODS
from kfac_fx.report import methods_json
from kfac_fx.report.methods import MethodRow, method_rows
from kfac_fx.report.table import show_methods, unbroken
from kfac_fx_cli.main import app

ROWS = {row.name: row for row in method_rows(METHODS)}
ALL = pytest.mark.parametrize("name", METHODS)


def shown(width: int, *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, highlight=False)
    show_methods(METHODS, console)
    return stream.getvalue()


def words(text: str) -> str:
    """The text without white space, as wrapped cells cannot be compared otherwise."""
    return re.sub(r"\s+", "", text)


def column_of(printed: str, header: str) -> dict[str, str]:
    """Cells of one column by method, unwrapped."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method") and header in line)
    left = lines[start].index(header)
    later = re.search(r"\s{2,}\S", lines[start][left:])
    right = None if later is None else left + later.end() - 1
    cells: dict[str, str] = {}
    name = ""
    for line in lines[start + 2 :]:
        if not line.strip():
            break
        name = line.split()[0] if not line.startswith(" ") else name
        cells[name] = cells.get(name, "") + words(line[left:right])
    return cells


@ALL
def test_every_method_says_what_it_is_stores_and_costs(name: str) -> None:
    row = ROWS[name]
    for text in (row.summary, row.paper, row.stored, row.statistics, row.refresh, row.apply, row.optimizer):
        assert text.strip()
    assert re.search(r"(19|20)\d\d", row.paper), "a paper has a year"
    assert row.summary.endswith(".") and "\n" not in row.summary
    assert METHODS[name].name == name


@ALL
def test_defaults_are_those_of_the_dataclass(name: str) -> None:
    method = METHODS[name]()
    assert ROWS[name].defaults == dataclasses.asdict(method)
    assert {"statistics_every", "inverse_every", "damping"} <= set(ROWS[name].defaults)


@ALL
def test_the_base_optimizer_is_the_one_that_a_step_gets(name: str) -> None:
    step = kfac_fx.compile(nn.Linear(2, 3), method=name, backend="eager")
    row, group = ROWS[name], step.optimizer.param_groups[0]
    assert row.optimizer == type(step.optimizer).__name__
    assert row.optimizer_settings["lr"] == group["lr"]
    for setting, value in row.optimizer_settings.items():
        assert group[setting] == value
    for setting in ("momentum", "weight_decay"):
        assert row.optimizer_settings.get(setting, 0) == group.get(setting, 0)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_lines_fit_the_terminal_and_no_cell_is_cut(width: int) -> None:
    printed = shown(width, terminal=True)
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    assert "\u2026" not in printed
    check_contents(printed)


def test_output_to_a_pipe_is_complete_and_plain() -> None:
    result = CliRunner().invoke(app, ["methods", "--no-color"])
    assert result.exit_code == 0 and "\x1b[" not in result.stdout
    check_contents(result.stdout)


def check_contents(printed: str) -> None:
    """Every method with all its cells; every value that it prints is the default."""
    summaries, papers = column_of(printed, "what it is"), column_of(printed, "paper")
    stored, settings = column_of(printed, "stored"), column_of(printed, "other settings")
    optimizers = column_of(printed, "base optimizer")
    for name, row in ROWS.items():
        assert summaries[name] == words(row.summary) and papers[name] == words(row.paper)
        assert words(row.stored.partition(":")[0]) in stored[name]
        for header, formula in (("statistics", row.statistics), ("apply", row.apply)):
            assert column_of(cost_table(printed), header)[name] == words(unbroken(formula))
        assert optimizers[name].startswith(words(f"{row.optimizer}: lr {row.optimizer_settings['lr']}"))
        for setting, value in row.others.items():
            assert words(f"{setting} {value}") in settings[name]
    for setting in ("statistics_every", "inverse_every", "damping", "decay"):
        check_schedule(printed, setting)


def cost_table(printed: str) -> str:
    """From the header of the costs on, since `statistics` heads two columns."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if "stored" in line)
    return "\n".join(lines[start:])


def check_schedule(printed: str, setting: str) -> None:
    """The column of one setting, read from the right end of its header since it is aligned there."""
    lines, header = printed.splitlines(), setting.replace("_", " ")
    start = next(i for i, line in enumerate(lines) if "statistics every" in line)
    right = lines[start].index(header) + len(header)
    for line in lines[start + 2 :]:
        if not line.strip():
            return
        if line.startswith(" "):
            continue
        default = ROWS[line.split()[0]].defaults.get(setting)
        assert line[:right].split()[-1] == (str(default) if default else "-")


def test_json_is_all_of_stdout_and_says_the_same() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0 and result.stdout == methods_json(METHODS) + "\n"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(result.stdout, parse_constant=refuse)
    assert content["schema"] == "kfac_fx.methods/1"
    assert [entry["name"] for entry in content["methods"]] == list(METHODS)
    for entry in content["methods"]:
        row = ROWS[entry["name"]]
        assert (entry["paper"], entry["stored"], entry["apply"]) == (row.paper, row.stored, row.apply)
        assert set(entry["defaults"]) == set(row.defaults)
        assert entry["defaults"]["damping"] == row.defaults["damping"]
        assert entry["optimizer_settings"]["lr"] == row.optimizer_settings["lr"]


def evaluated(formula: str, sizes: dict[str, int]) -> int:
    """The value of a formula of the table; a space between two factors is a product."""
    if formula == "none":
        return 0
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula).replace("^", "**")
    assert re.fullmatch(r"[\w\s*+()]+", product) and set(re.findall(r"[A-Za-z_]+", product)) <= set(sizes)
    return eval(product, {"__builtins__": {}}, dict(sizes))


@ALL
def test_the_formulas_are_the_costs_that_the_plan_counts(name: str) -> None:
    """On a linear layer with distinct sizes; what grows slower than the formula stays below one per cent."""
    d_in, d_out, num_rows = 300, 200, 16
    model, x = nn.Linear(d_in - 1, d_out), torch.randn(num_rows, d_in - 1)
    plan = kfac_fx.inspect(model, inputs=x, targets=torch.randint(d_out, (num_rows,)), method=name)
    sizes = {"d_A": d_in, "d_G": d_out, "n": num_rows, "m": num_rows}
    row, factors = ROWS[name], plan.factors
    formula = row.stored.partition(": ")[2].partition(";")[0]
    counted = {
        formula: sum(factor.bytes for factor in factors) // 4,
        row.statistics: sum(factor.flops_statistics for factor in factors),
        row.refresh: sum(factor.flops_refresh for factor in factors),
        row.apply: sum(factor.flops_apply for factor in factors),
    }
    for text, number in counted.items():
        assert number == pytest.approx(evaluated(text, sizes), rel=0.01), text


def test_a_formula_is_read_as_it_is_written() -> None:
    sizes: dict[str, Any] = {"d_A": 5, "d_G": 3, "n": 7, "m": 2}
    assert evaluated("2 n (d_A^2 + d_G^2) + 8 m d_A d_G", sizes) == 2 * 7 * (25 + 9) + 8 * 2 * 15
    assert unbroken("2 n (d_A^2 + d_G^2) + 8 m d_A d_G") == "2n(d_A^2+d_G^2) + 8m*d_A*d_G"
    assert unbroken("4 d_A d_G (d_A + d_G)") == "4d_A*d_G(d_A+d_G)"
    assert unbroken("2 d_A^2 d_G") == "2d_A^2*d_G"


def test_settings_without_effect_are_a_dash_and_absent_from_the_others() -> None:
    row = ROWS["singd"]
    assert "decay" not in row.defaults and row.defaults["inverse_every"] == 0
    assert isinstance(row, MethodRow) and set(row.others).isdisjoint({"damping", "statistics_every"})
