"""The reports of a plan agree with each other, with the plan and with the saved text.

`python -m tests.test_report --overwrite` saves text and JSON anew after a change that is meant.
"""

import ast
import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn
from torch.fx import GraphModule

import kfac_fx
from kfac_fx import report
from kfac_fx.errors import Reason, UnknownNameError
from kfac_fx.instrument import instrument
from kfac_fx.planned import Plan
from kfac_fx.report import cells, rows, table, text
from kfac_fx.report.difference import difference
from kfac_fx.report.difference_text import difference_lines
from kfac_fx.report.lines import plain_text
from kfac_fx.report.program import WIDTH, wrapped
from kfac_fx.target import load_target
from kfac_fx.types import LayerMatch
from tests.oracles import flop_counter

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (80, 100, 120, 200)
NARROW = 120
COSTS = {"state": "bytes", "stats": "flops_statistics", "refresh": "flops_refresh", "apply": "flops_apply"}


def make_plan(name: str = "tiny_gpt") -> Plan:
    target = load_target(str(GOLDEN / f"{name}.py"))
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="kfac")


def stable(rendered: str) -> str:
    """Without the number of nodes, which is torch's own affair."""
    return re.sub(r"[\d,]+ nodes captured", "N nodes captured", rendered) + "\n"


def stable_json(plan: Plan) -> str:
    """The document without versions and without the names of nodes, which are torch's."""
    document = report.document(plan)
    del document["versions"], document["environment"], document["totals"]["nodes"]
    for layer in document["layers"]:
        layer["uses"] = len(layer["uses"])
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def narrow(plan: Plan) -> str:
    """As a terminal of `NARROW` characters shows it, advice included."""
    return stable(shown(plan, width=NARROW, terminal=True, skipped=True).rstrip("\n"))


def shown(plan: Plan, *, width: int = 200, terminal: bool = False, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    table.show(plan, console, **options)
    return stream.getvalue()


def parsed_rows(rendered: str) -> list[dict[str, str]]:
    """The lines of the table as dicts by column: a column is where no line has anything but blanks around."""
    lines = rendered.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    stop = next(i for i, line in enumerate(lines) if line.startswith("total "))
    table_lines = [line.ljust(max(map(len, lines))) for line in lines[start : stop + 1]]
    before_source = table_lines[0].find("source") if "source" in table_lines[0] else len(table_lines[0])
    blank = [all(line[i] == " " for line in table_lines) for i in range(before_source)]
    marks = "".join(" " if is_blank else "x" for is_blank in blank)
    spans = [found.span() for found in re.finditer(r"x+( x+)*", marks)]
    names = [table_lines[0][first:last].strip() for first, last in spans]
    return [
        {name: line[first:last].strip() for name, (first, last) in zip(names, spans, strict=True)}
        for line in table_lines[1:]
    ]


@pytest.fixture(scope="module")
def plan(gpt_plan: Plan) -> Plan:
    return gpt_plan


@pytest.fixture(scope="module")
def others() -> dict[str, Plan]:
    return {name: make_plan(name) for name in ("tiny_resnet", "tiny_moe")}


@pytest.fixture(scope="module")
def document(plan: Plan) -> dict[str, Any]:
    return json.loads(report.to_json(plan))


def renamed(plan: Plan, names: list[str]) -> Plan:
    """The plan with as many copies of its `blocks.0.out` as there are names, and nothing else."""
    layer = next(match for match in plan.matched if match.name == "blocks.0.out")
    factors = [factor for factor in plan.factors if factor.owner == layer.key]
    layers = tuple(dataclasses.replace(layer, name=name, key=name) for name in names)
    copies = tuple(dataclasses.replace(factor, owner=name) for name in names for factor in factors)
    matches = dataclasses.replace(plan.matches, matched=layers)
    return dataclasses.replace(plan, matches=matches, factors=copies)


def labels(plan: Plan) -> list[str]:
    return [row.label for row in rows.layer_rows(plan, plan.matched, collapse=True)]


# --- the text ---


def test_the_text_is_the_saved_one(plan: Plan) -> None:
    assert stable(report.render(plan)) == (GOLDEN / "tiny_gpt.txt").read_text()


def test_the_document_is_the_saved_one(plan: Plan) -> None:
    assert stable_json(plan) == (GOLDEN / "tiny_gpt.json").read_text()


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_moe"])
def test_a_terminal_shows_the_saved_text(name: str, others: dict[str, Plan]) -> None:
    assert narrow(others[name]) == (GOLDEN / f"{name}.txt").read_text()


def dense(n: int, size: int, other: int, *, count: int = 1, borrowed: bool = False) -> tuple[int, ...]:
    """Of a square factor: dim, count, bytes of float32, FLOPs of statistics, inverse and product.

    It is stored with its inverse; another layer's A is neither stored nor computed again. A multiply-add
    counts 2. other: width of the gradient's other side.
    """
    stored = 4 * count * size**2
    computed = 0 if borrowed else 2 * n * count * size**2
    return (
        size,
        count,
        stored * (1 if borrowed else 2),
        computed,
        count * size**3,
        2 * count * size**2 * other,
    )


def expected_factors(name: str, module: nn.Module, n: int) -> dict[str, tuple[int, ...]]:
    """The factors of a module of `golden/tiny_gpt.py`, whose batches have n positions, by hand."""
    if isinstance(module, nn.Embedding):  # A is a vector of counts, and divides the gradient entry by entry
        a, g = module.num_embeddings, module.embedding_dim
        return {"A": (a, 1, 2 * 4 * a, n, 2 * a, a * g), "G": dense(n, g, a)}
    if isinstance(module, nn.LayerNorm):  # a 2 x 2 block of scale and shift for each channel
        (c,) = module.normalized_shape
        return {"F": (2, c, 2 * 4 * 4 * c, 2 * n * 4 * c, 8 * c, 2 * 4 * c)}
    assert isinstance(module, nn.Linear | nn.Conv1d)
    count = module.groups if isinstance(module, nn.Conv1d) else 1
    bias = module.bias is not None and module.bias.requires_grad
    a, g = module.weight[0].numel() + bias, len(module.weight) // count
    shared = name.endswith((".k", ".v"))  # they read what q reads
    first = dense(n, a, g, count=count, borrowed=shared)
    if isinstance(module, nn.Conv1d):  # the column of its bias holds sums of patches, and is no product
        first = (*first[:3], 2 * n * count * (a - bias) ** 2, *first[4:])
    return {"A": first, "G": dense(n, g, a, count=count)}


def test_the_numbers_of_the_saved_document_are_those_of_the_model() -> None:
    target = load_target(str(GOLDEN / "tiny_gpt.py"))
    saved, n = json.loads((GOLDEN / "tiny_gpt.json").read_text()), target.inputs.numel()
    modules = {name: m for name, m in target.model.named_modules() if list(m.parameters(recurse=False))}
    names = ("dim", "count", "bytes", "flops_statistics", "flops_refresh", "flops_apply")
    for layer in saved["layers"]:
        module = modules.pop(layer["name"])
        found = {factor["side"]: tuple(factor[f] for f in names) for factor in layer["factors"]}
        assert found == expected_factors(layer["name"], module, n), layer["name"]
        trained = [p.numel() for p in module.parameters() if p.requires_grad]
        assert (layer["numel"], layer["rows"]) == (sum(trained), n)
        owners = {factor["shared_with"] for factor in layer["factors"]} - {None}
        assert owners == ({layer["key"][:-8] + "q.weight"} if layer["name"].endswith((".k", ".v")) else set())
    assert list(modules) == [""]  # holds the two parameters that no layer has
    with flop_counter() as counter:
        target.loss_fn(target.model(target.inputs), target.targets).backward()
    assert saved["totals"]["flops_model"] == counter.get_total_flops()
    parameters = {name: p.numel() for name, p in target.model.named_parameters() if p.requires_grad}
    numbers = saved["totals"]["parameters"]
    assert numbers["trainable"] == sum(parameters.values())
    assert numbers["skipped"] == parameters["spare"] + parameters["temperature"]
    assert {skip["parameter"] for skip in saved["skips"]} == {"spare", "temperature", "head.bias"}


ODD = "odd\x0b\x1b[31m\x07name"


@pytest.mark.parametrize("width", [None, 60, 120])
def test_nothing_that_a_terminal_would_act_on_is_printed(plan: Plan, width: int | None) -> None:
    """Names and lines of the model are its user's, and may hold any character."""
    first, *rest = plan.matched
    source = dataclasses.replace(first.source, code=f"x = self.{ODD}(x)")
    layer = dataclasses.replace(first, name=ODD, source=source)
    skip = dataclasses.replace(plan.skipped[0], parameter=f"{ODD} alone", detail=f"of {ODD}", source=source)
    matches = dataclasses.replace(plan.matches, matched=(layer, *rest), skipped=(skip,))
    subject = dataclasses.replace(plan, matches=matches)
    for options in ({"advice": True}, {"layer": "*"}):
        lines = plain_text(text.report_lines(subject, width=width, **options)).split("\n")
        assert all(line.isprintable() for line in lines)
        assert r"odd\x0b\x1b[31m\x07name" in "".join(line.strip() for line in lines)
        assert width is None or max(map(len, lines)) <= width
    changed = difference(report.document(plan), report.document(subject))
    lines = plain_text(difference_lines(changed, names=("a", "b"), width=width)).split("\n")
    assert all(line.isprintable() for line in lines) and r"\x1b[31m" in "".join(lines)


def test_norms_of_several_widths_share_a_row(others: dict[str, Plan]) -> None:
    found = {row["layer"]: row for row in parsed_rows(report.render(others["tiny_resnet"]))}
    assert found["stages.[0-1].[0-2].norm1"]["x"] == "6"
    assert found["stages.[0-1].[0-2].norm1"]["G"] == "F 4-8x2^2"


def test_experts_in_blocks_share_a_row(others: dict[str, Plan]) -> None:
    found = {row["layer"]: row for row in parsed_rows(report.render(others["tiny_moe"]))}
    assert found["blocks.[0-3].experts.[0-2].up"]["x"] == "12"
    assert len(found) == 6


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["tiny_gpt", "tiny_resnet", "tiny_moe"])
def test_nothing_is_wider_than_the_terminal(
    name: str, width: int, plan: Plan, others: dict[str, Plan]
) -> None:
    subject = others.get(name, plan)
    for options in ({}, {"skipped": True}, {"layer": "*"}):
        lines = shown(subject, width=width, terminal=True, **options).splitlines()
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize("name", ["tiny_gpt", "tiny_resnet", "tiny_moe"])
def test_one_screen_of_120_columns_says_everything(name: str, plan: Plan, others: dict[str, Plan]) -> None:
    subject = others.get(name, plan)
    screen = shown(subject, width=120, terminal=True)
    assert len(screen.splitlines()) <= 40
    assert "matched" in screen and "per step" in screen and "memory" in screen
    for skip in subject.skipped:
        assert skip.reason.value in screen and skip.detail[:40] in " ".join(screen.split())


def test_printing_a_plan_is_the_report(plan: Plan) -> None:
    assert str(plan) == report.render(plan)


def test_layers_are_in_forward_order(plan: Plan) -> None:
    names = [match.name for match in rows.forward_order(plan)]
    assert names[0] == "tokens" and names[-1] == "head"
    assert names.index("filters") < names.index("blocks.0.q") < names.index("blocks.1.q")
    assert set(names) == {match.name for match in plan.matched}


def test_repeated_layers_share_a_row(plan: Plan) -> None:
    by_label = {row["layer"]: row for row in parsed_rows(report.render(plan))}
    assert by_label["blocks.[0-2].out"]["x"] == "3"
    assert not any(label.startswith("blocks.0") for label in by_label)
    assert by_label["total"]["x"] == str(len(plan.matched))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0", "a.1", "a.2", "a.5"], ["a.[0-2,5]"]),
        (["a.9", "a.10"], ["a.[9-10]"]),
        ([f"a.{i}" for i in (0, 3, 6, 9, 10, 12)], ["a.[0-9:3,10,12]"]),
        ([f"a.{i}" for i in range(0, 300, 2)], ["a.[0-298:2]"]),
        (["a.0.w", "a.1.w", "b.2.w"], ["a.[0-1].w", "b.2.w"]),
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], ["a.[0-1].[0-1]"]),
        (["a.0.b.0", "a.1.b.0", "a.1.b.1", "a.2.b.0", "a.2.b.1"], ["a.0.b.0", "a.[1-2].b.[0-1]"]),
        (["a1", "a2"], ["a1", "a2"]),
        (["a.0", "a.1.0"], ["a.0", "a.1.0"]),
    ],
)
def test_layers_collapse_where_all_combinations_of_integers_exist(
    plan: Plan, names: list[str], expected: list[str]
) -> None:
    assert labels(renamed(plan, names)) == expected


def change_rows(match: LayerMatch) -> LayerMatch:
    return dataclasses.replace(match, rows=match.rows + 1)


def change_source(match: LayerMatch) -> LayerMatch:
    assert match.source is not None
    return dataclasses.replace(match, source=dataclasses.replace(match.source, line=match.source.line + 1))


def change_kind(match: LayerMatch) -> LayerMatch:
    return dataclasses.replace(match, kind="other")


@pytest.mark.parametrize("change", [change_rows, change_source, change_kind])
def test_layers_that_differ_in_a_fact_keep_their_own_rows(plan: Plan, change: Any) -> None:
    copies = renamed(plan, ["a.0", "a.1"])
    first, second = copies.matched
    matches = dataclasses.replace(copies.matches, matched=(first, change(second)))
    assert labels(dataclasses.replace(copies, matches=matches)) == ["a.0", "a.1"]


def test_parts_of_one_module_go_by_their_keys(plan: Plan) -> None:
    copies = renamed(plan, ["attention.q", "attention.k"])
    same = tuple(dataclasses.replace(match, name="attention") for match in copies.matched)
    matches = dataclasses.replace(copies.matches, matched=same)
    assert labels(dataclasses.replace(copies, matches=matches)) == ["attention.q", "attention.k"]


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0"), (999, "999"), (1000, "1.0K"), (999_940, "999.9K"), (999_960, "1.0M")]
)
def test_operations_are_counted_in_thousands(number: int, expected: str) -> None:
    assert text.flops_text(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(1023, "1023"), (1024, "1.0K"), (3 * 2**30, "3.0G")])
def test_bytes_are_counted_in_powers_of_two(number: int, expected: str) -> None:
    assert text.bytes_text(number) == expected


# --- text, terminal and JSON agree ---


def test_columns_add_up_to_the_totals(document: dict[str, Any]) -> None:
    for cost in COSTS.values():
        assert (
            sum(layer["cost"][cost] for layer in document["layers"]) == document["totals"]["cost"][cost] > 0
        )


def test_the_numbers_of_the_text_are_those_of_the_document(plan: Plan, document: dict[str, Any]) -> None:
    *layers, total = parsed_rows(report.render(plan))
    by_name = {layer["name"]: layer for layer in document["layers"]}
    for row in layers:
        layer = by_name[re.sub(r"\[(\d+)[^\]]*\]", r"\1", row["layer"])]
        assert row["rows"] == str(layer["rows"])
        for column, cost in COSTS.items():
            form = text.bytes_text if column == "state" else text.flops_text
            assert row[column] == form(layer["cost"][cost] * int(row["x"]))
    for column, cost in COSTS.items():
        form = text.bytes_text if column == "state" else text.flops_text
        assert total[column] == form(document["totals"]["cost"][cost])


def test_output_to_a_pipe_is_the_text(plan: Plan) -> None:
    assert shown(plan, width=20) == report.render(plan) + "\n"


def test_every_trainable_element_is_matched_or_skipped(document: dict[str, Any]) -> None:
    parameters = document["totals"]["parameters"]
    assert parameters["matched"] + parameters["skipped"] == parameters["trainable"]
    assert document["totals"]["coverage"] == parameters["matched"] / parameters["trainable"]


def test_a_shared_factor_is_counted_once(plan: Plan) -> None:
    borrowed = [factor for factor in plan.factors if factor.shared_with]
    assert len(borrowed) == 6, "k and v of three blocks read what q reads"
    sums = rows.totals(plan).cost
    whole = {factor.owner: factor.bytes for factor in plan.factors if factor.side == "A"}
    for factor in borrowed:
        assert factor.shared_with is not None and factor.flops_statistics == 0
        assert factor.bytes * 2 == whole[factor.shared_with], "A is the owner's, its inverse is each layer's"
    assert sums.state_bytes == sum(factor.bytes for factor in plan.factors)
    assert sums.apply == sum(factor.flops_apply for factor in plan.factors)
    assert text.SHARED_NOTE in report.render(plan)


def test_the_cost_line_adds_up(plan: Plan, document: dict[str, Any]) -> None:
    overhead, cost = document["totals"]["overhead"], document["totals"]["cost"]
    assert overhead["total"] == pytest.approx(sum(overhead[p] for p in ("apply", "statistics", "inversion")))
    every, model = plan.method.inverse_every, document["totals"]["flops_model"]
    assert overhead["inversion"] == pytest.approx(cost["flops_refresh"] / every / model)
    line, memory = report.render(plan).splitlines()[-2:]
    assert line.startswith(f"per step  model {text.flops_text(model)}   apply")
    assert f"every {every}" in line and line.endswith(f"total +{overhead['total']:.0%} FLOPs")
    elements = sum(parameter.numel for parameter in plan.capture.parameters)
    assert f"{cost['bytes'] / (4 * elements):.1f} times the parameters" in memory


@pytest.mark.parametrize(
    ("name", "off"),
    [("precondition", {"apply"}), ("statistics", {"statistics", "refresh"}), ("lengths", set())],
)
def test_a_pass_that_is_off_costs_nothing(plan: Plan, name: str, off: set[str]) -> None:
    plan = dataclasses.replace(plan, without=frozenset({name}))
    found, every = report.document(plan), plan.method.inverse_every
    flops = {
        phase: sum(getattr(f, f"flops_{phase}") for f in plan.factors)
        for phase in ("apply", "statistics", "refresh")
    }
    expected = {phase: 0 if phase in off else number for phase, number in flops.items()}
    bytes_kept = sum(factor.bytes for factor in plan.factors)
    assert found["totals"]["cost"] == {"bytes": bytes_kept} | {f"flops_{p}": n for p, n in expected.items()}
    per_step = sum(number / (every if phase == "refresh" else 1) for phase, number in expected.items())
    model = found["totals"]["flops_model"]
    assert found["totals"]["overhead"]["total"] == pytest.approx(per_step / model)
    for phase, number in expected.items():
        assert sum(row["cost"][f"flops_{phase}"] for row in found["rows"]) == number
        assert (f"{phase} off" in report.render(plan).splitlines()[-2]) == (phase in off)


def test_a_model_without_counted_work_has_no_percentages(plan: Plan) -> None:
    line = report.render(dataclasses.replace(plan, model_flops=0)).splitlines()[-2]
    assert "%" not in line and line.startswith("per step  model 0")


# --- skipped parameters ---


def test_every_skip_is_in_text_and_document_with_its_reason(plan: Plan, document: dict[str, Any]) -> None:
    reasons = {skip["parameter"]: skip["reason"] for skip in document["skips"]}
    assert reasons["spare"] == "unused" and reasons["head.bias"] == "frozen"
    rendered = report.render(plan)
    for name, reason in reasons.items():
        assert re.search(rf"^  {re.escape(name)} .*{reason}", rendered, flags=re.M)


def test_frozen_parameters_count_apart(plan: Plan, document: dict[str, Any]) -> None:
    assert document["totals"]["tensors"]["frozen"] == 1
    assert document["totals"]["tensors"]["skipped"] == len(plan.skipped) - 1
    assert "frozen  1 tensor" in report.render(plan)


def test_skipped_prints_what_to_do(plan: Plan) -> None:
    advised = shown(plan, skipped=True)
    for skip in plan.skipped:
        assert f"-> {skip.advice}" in advised and skip.advice not in shown(plan)


def test_skips_that_differ_in_numbers_share_a_line(plan: Plan) -> None:
    skip = plan.skipped[0]
    many = [
        dataclasses.replace(skip, parameter=f"blocks.{i}.norm{j}.scale", reason=Reason.NO_PATTERN, detail="x")
        for i in range(2)
        for j in range(2)
    ]
    only = dataclasses.replace(skip, parameter="blocks.1.other", reason=Reason.NO_PATTERN, detail="x")
    lines = plain_text(text.skip_lines([*many, only], advice=False)).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["blocks.*.norm*.scale", "x4"],
        ["blocks.1.other", "no-pattern"],
    ]


# --- one layer, and the terminal ---


def test_a_layer_pattern_shows_only_those_and_not_collapsed(plan: Plan) -> None:
    only = shown(plan, layer="blocks.*.out")
    assert [row["layer"] for row in parsed_rows(only)] == [*(f"blocks.{i}.out" for i in range(3)), "total"]
    assert text.SKIPPED_TITLE not in only


def test_a_layer_pattern_may_name_a_skipped_parameter(plan: Plan) -> None:
    assert "spare" in shown(plan, layer="spare") and "layer " not in shown(plan, layer="spare")


def test_a_pattern_that_fits_nothing_gets_a_proposal(plan: Plan) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'filters'"):
        shown(plan, layer="filter")


def test_columns_are_cut_in_order(plan: Plan) -> None:
    table_cells = cells.layer_cells(plan, rows.forward_order(plan), collapse=True)
    natural = cells.fitting_columns(table_cells, width=None)
    full = sum(natural.values()) + len(text.GAP) * (len(natural) - 1)
    dropped = []
    for width in range(full, 0, -1):
        fits = cells.fitting_columns(table_cells, width=width)
        dropped += [name for name in natural if name not in fits and name not in dropped]
        if width >= 50:
            assert sum(fits.values()) + len(text.GAP) * (len(fits) - 1) <= width
    assert dropped[:3] == ["source", "apply", "refresh"]


def test_a_narrow_terminal_gets_whole_lines(plan: Plan) -> None:
    lines = shown(plan, width=90, terminal=True).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert all(len(line) <= 90 for line in lines[start : start + 8])


def test_a_narrow_report_names_the_columns_that_it_hides(plan: Plan) -> None:
    for width in (60, 90):
        lines = shown(plan, width=width, terminal=True).splitlines()
        header = next(line.split() for line in lines if line.startswith("layer "))
        full = next(line.split() for line in report.render(plan).splitlines() if line.startswith("layer "))
        start = next(i for i, line in enumerate(lines) if line.startswith("hidden: "))
        said = " ".join(" ".join(lines[start : start + 3]).split()).partition(
            " (widen the terminal, or --json)"
        )
        assert said[1] and said[0].removeprefix("hidden: ").split(", ") == [
            n for n in full if n not in header
        ]
    assert "hidden:" not in shown(plan, width=200, terminal=True) and "hidden:" not in report.render(plan)


@pytest.mark.parametrize("columns", ["60", "", "0", "wide"])
def test_columns_sets_the_width_of_a_pipe(plan: Plan, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        table.show(plan, table.make_console())
    longest = max(map(len, stream.getvalue().splitlines()))
    assert longest <= 60 if columns == "60" else stream.getvalue().rstrip("\n") == report.render(plan)


def test_the_phase_of_the_inverses_has_one_name(plan: Plan) -> None:
    rendered = report.render(plan)
    assert "refresh" in rendered and "inver" not in rendered


# --- the document ---


def test_the_document_is_plain_sorted_and_free_of_paths(plan: Plan) -> None:
    written = report.to_json(plan)
    content = json.loads(written)
    assert content == report.document(plan) and content["schema"] == "kfac_fx.report/1"
    assert written == json.dumps(content, indent=2, sort_keys=True)
    assert list(report.document(plan)) == sorted(report.document(plan))
    assert str(GOLDEN) not in written


def test_the_document_names_settings_and_loss(plan: Plan, document: dict[str, Any]) -> None:
    settings = dataclasses.asdict(plan.method) | {"damping_bounds": [1e-8, "inf"]}
    assert document["method"] == {"name": "kfac", "hyperparameters": settings}
    assert (document["fisher"], document["sharing"]) == ("empirical", "expand")
    assert document["loss"]["kind"] == "cross_entropy" and document["model"] == "TinyGPT"


def test_the_nodes_of_a_use_are_in_the_captured_program(plan: Plan, document: dict[str, Any]) -> None:
    program = report.readable(plan.capture.graph, title="captured")
    for layer in document["layers"]:
        for use in layer["uses"]:
            for node in [use["a"], use["grad"], *use["g"]]:
                assert node is None or re.search(rf"\b{node}\b", program)


# --- the programs ---


@pytest.fixture(scope="module")
def programs(plan: Plan) -> dict[str, GraphModule]:
    variants = {name: instrument(plan, name).module for name in ("plain", "statistics")}
    return {"captured": plan.capture.graph, **variants}


@pytest.mark.parametrize("name", ["captured", "plain", "statistics"])
def test_a_program_is_python_of_all_nodes_without_paths(programs: dict[str, GraphModule], name: str) -> None:
    module = programs[name]
    program = report.readable(module, title=f"TinyGPT: {name}")
    names = {n.id for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Name)}
    assert {n.name for n in module.graph.nodes if n.op == "call_function"} <= names
    assert program.startswith(f"# TinyGPT: {name}\n# {len(module.graph.nodes)} nodes\n")
    assert str(GOLDEN) not in program and "site-packages" not in program and " = None" not in program
    assert "# tiny_gpt.py:" in program and "q = self.q(normed)" in program


def test_programs_of_the_step_carry_our_labels(programs: dict[str, GraphModule]) -> None:
    program = report.readable(programs["statistics"], title="statistics")
    marked = [line for line in program.splitlines() if line.lstrip().startswith("# kfac_fx: ")]
    assert any("blocks.0.q" in line for line in marked) and any("head" in line for line in marked)


@pytest.mark.parametrize(
    "line",
    [
        f"    x = f({', '.join(f'argument_{i}' for i in range(40))})",
        f"    return [{', '.join(f'gradient_{i}' for i in range(40))}]",
        f'    y: "f32[2, 3]" = torch.ops.{"a" * 60}.default({"b" * 40}, {"c" * 40})',
        f"    z = f('{'one, two, ' * 9}', [1, 2], {', '.join('x' for _ in range(30))})",
    ],
)
def test_a_wrapped_line_is_the_same_python(line: str) -> None:
    pieces = wrapped(line)
    assert len(pieces) > 1 and all(len(piece) <= WIDTH for piece in pieces)
    assert ast.dump(parse(" ".join(pieces))) == ast.dump(parse(line)) == ast.dump(parse("\n".join(pieces)))


def parse(line: str) -> ast.Module:
    return ast.parse(f"def f():\n{line}")


def test_a_line_without_a_bracket_stays_whole() -> None:
    assert wrapped("x = " + "y" * 200) == ["x = " + "y" * 200]


if __name__ == "__main__" and "--overwrite" in sys.argv:
    saved = make_plan()
    (GOLDEN / "tiny_gpt.txt").write_text(stable(report.render(saved)))
    (GOLDEN / "tiny_gpt.json").write_text(stable_json(saved))
    for other in ("tiny_resnet", "tiny_moe"):
        (GOLDEN / f"{other}.txt").write_text(narrow(make_plan(other)))
