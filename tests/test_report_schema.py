"""The JSON report fits its schema, the schema says what is documented, and `diff` finds what was changed."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import kfac_fx
from kfac_fx import report
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError, Reason
from kfac_fx.export.environment import environment
from kfac_fx.export.subject import Subject
from kfac_fx.match import match
from kfac_fx.methods import METHODS
from kfac_fx.plan import make_plan
from kfac_fx.planned import Plan
from kfac_fx.report.difference import difference, difference_json
from kfac_fx.report.difference_text import difference_lines
from kfac_fx.report.document import SCHEMA_FILE
from kfac_fx.report.lines import plain_text
from kfac_fx.report.saved import read_report
from kfac_fx.target import Target, load_target
from kfac_fx.types import Matches, Sharing, Source
from kfac_fx.verification.document import document as verification_document
from kfac_fx.verification.records import LayerVerdict, Verification
from kfac_fx_cli.main import app

ROOT = Path(__file__).parents[1]
TARGET = str(Path(__file__).parent / "golden" / "tiny_gpt.py")
SCHEMA = json.loads(SCHEMA_FILE.read_text())
Document = dict[str, Any]


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(TARGET)


@pytest.fixture(scope="module")
def plan(target: Target) -> Plan:
    return plan_of(target)


def plan_of(target: Target, **options: Any) -> Plan:
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, **options)


@pytest.fixture(scope="module")
def good(plan: Plan) -> Document:
    return json.loads(report.to_json(plan))


def with_method(plan: Plan, method: Method, *, sharing: Sharing = "expand") -> Plan:
    """The plan of the same captured step for another method."""
    return make_plan(
        plan.capture,
        match(plan.capture),
        method,
        fisher="empirical",
        sharing=sharing,
        render=report.render,
        rows={},
    )


def check(document: Document) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


# --- the schema ---


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("method", kfac_fx.methods())
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_reports_of_every_method_fit_the_schema(plan: Plan, method: str, sharing: Sharing) -> None:
    check(json.loads(report.to_json(with_method(plan, METHODS[method](), sharing=sharing))))


def test_reports_of_convolutions_fit_the_schema_and_name_the_form() -> None:
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 2)]
    images, labels = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])
    document = json.loads(report.to_json(kfac_fx.inspect(nn.Sequential(*layers), None, images, labels)))
    check(document)
    factors = [factor for layer in document["layers"] for factor in layer["factors"]]
    assert [factor["gram"] for factor in factors if factor["side"] == "A"] == ["patches", "pixels", None]
    for factor in factors:
        assert (factor["estimated_ns"] is None) == (factor["gram"] is None)
        assert factor["gram"] is None or factor["side"] == "A"


def remove_model(document: Document) -> None:
    del document["model"]


def misspell(document: Document) -> None:
    document["layer"] = document.pop("layers")


def add_an_undocumented_field(document: Document) -> None:
    document["layers"][0]["colour"] = "red"


def other_version(document: Document) -> None:
    document["schema"] = "kfac_fx.report/2"


def negative_bytes(document: Document) -> None:
    document["layers"][0]["cost"]["bytes"] = -1


def unknown_reason(document: Document) -> None:
    document["skips"][0]["reason"] = "because"


def path_of_a_machine(document: Document) -> None:
    document["layers"][0]["source"]["file"] = "/home/someone/model.py"


def path_of_windows(document: Document) -> None:
    document["layers"][0]["source"]["file"] = "C:\\Users\\someone\\model.py"


def factor_without_side(document: Document) -> None:
    del document["layers"][0]["factors"][0]["side"]


@pytest.mark.parametrize(
    "spoil",
    [
        remove_model,
        misspell,
        add_an_undocumented_field,
        other_version,
        negative_bytes,
        unknown_reason,
        path_of_a_machine,
        path_of_windows,
        factor_without_side,
    ],
)
def test_a_wrong_document_does_not_fit(good: Document, spoil: Callable[[Document], None]) -> None:
    check(good)
    wrong = copy.deepcopy(good)
    spoil(wrong)
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_the_schema_knows_every_reason() -> None:
    assert set(SCHEMA["$defs"]["skip"]["properties"]["reason"]["enum"]) == {reason.value for reason in Reason}


def objects(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every object of the schema that lists its fields."""
    if "properties" in schema:
        yield schema
        for part in schema["properties"].values():
            yield from objects(part)
    if "items" in schema:
        yield from objects(schema["items"])


def test_every_field_is_required_described_and_in_the_page() -> None:
    page = (ROOT / "docs" / "report-schema.md").read_text()
    for part in (SCHEMA, *SCHEMA["$defs"].values()):
        for found in objects(part):
            assert (
                set(found["required"]) == set(found["properties"]) and found["additionalProperties"] is False
            )
            for name, field in found["properties"].items():
                assert re.search(rf"\| `(\w+\.)*{name}` \|", page), name
                assert field.get("description", "in its own section") in page or "properties" in field


def test_rows_hold_every_layer_once_and_add_up(good: Document) -> None:
    keys = [key for row in good["rows"] for key in row["layers"]]
    assert sorted(keys) == sorted(layer["key"] for layer in good["layers"])
    assert sum(row["cost"]["bytes"] for row in good["rows"]) == good["totals"]["cost"]["bytes"]


def test_settings_that_json_does_not_have_are_text_and_nothing_else_is(plan: Plan) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(kfac_fx.KFAC):
        kept_in: torch.dtype = torch.bfloat16
        weights: tuple[float, ...] = (1.0, float("inf"))

    found = report.document(dataclasses.replace(plan, method=Own()))["method"]["hyperparameters"]
    assert found["kept_in"] == "torch.bfloat16" and found["weights"] == [1.0, "inf"]
    with pytest.raises(TypeError):
        report.document(dataclasses.replace(plan, sharing=object()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused(plan: Plan, good: Document, value: float) -> None:
    found = difference(good, good)
    for write in (
        lambda: report.document(dataclasses.replace(plan, model_flops=value)),
        lambda: difference(good, copy.deepcopy(good) | {"fisher": value}),
        lambda: difference_json(found | {"same": value}),
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()


@pytest.mark.parametrize("folder", ["/home/someone/", "C:\\Users\\someone\\", "C:\\Users/some one/", ""])
def test_no_folder_of_any_system_is_in_a_report(plan: Plan, folder: str) -> None:
    source = Source(file=f"{folder}net.py", line=3, code="  y = self.fc(x)")
    assert str(source) == "net.py:3"
    matched = tuple(dataclasses.replace(match, source=source) for match in plan.matched)
    skipped = tuple(dataclasses.replace(skip, source=source) for skip in plan.skipped)
    moved = dataclasses.replace(plan, matches=Matches(matched=matched, skipped=skipped))
    document = report.document(moved)
    verified = verification_document(
        Verification(
            plan=moved,
            layers=(LayerVerdict(layer=matched[0], rows="graph", checks=()),),
            whole=(),
            precision="float64",
            note="",
            seconds=0.0,
            render=str,
        )
    )
    for entry in (*document["layers"], *document["skips"], *verified["layers"]):
        assert entry["source"] == {"file": "net.py", "line": 3, "code": "y = self.fc(x)"}
    assert "someone" not in report.render(moved) and "net.py:3" in report.render(moved)


# --- environment.json ---


def test_the_environment_names_versions_options_and_shapes(plan: Plan, target: Target) -> None:
    text = environment(Subject(plan=plan, target=target))["environment.json"]
    content = json.loads(text)
    assert content["schema"] == "kfac_fx.environment/1" and content["target"] == "tiny_gpt.py"
    assert (
        content["options"]["hyperparameters"] == json.loads(report.to_json(plan))["method"]["hyperparameters"]
    )
    assert [(t["shape"], t["dtype"]) for t in content["inputs"]] == [(list(target.inputs.shape), "int64")]
    assert [(t["shape"], t["dtype"]) for t in content["targets"]] == [(list(target.targets.shape), "int64")]
    assert str(ROOT) not in text


# --- diff ---


def test_a_report_does_not_differ_from_itself(good: Document) -> None:
    found = difference(good, copy.deepcopy(good))
    assert found["same"] and found["layers"]["unchanged"] == len(good["layers"])
    assert "no differences" in plain_text(difference_lines(found, names=("a", "b")))


def test_other_versions_and_moved_lines_are_no_difference(good: Document) -> None:
    other = copy.deepcopy(good)
    other["versions"]["torch"] = "9.9"
    other["layers"][0]["source"]["line"] += 7
    found = difference(good, other)
    assert found["same"]
    assert found["environment"] == [{"name": "torch", "before": good["versions"]["torch"], "after": "9.9"}]


def test_diff_finds_what_an_excluded_layer_changes(target: Target, good: Document) -> None:
    without = json.loads(report.to_json(plan_of(target, exclude=("filters.*",))))
    found = difference(good, without)
    assert [layer["key"] for layer in found["layers"]["removed"]] == ["filters.weight"]
    assert found["layers"]["added"] == found["layers"]["changed"] == []
    assert {(s["parameter"], s["reason"]) for s in found["skips"]["new"]} == {
        ("filters.weight", "excluded"),
        ("filters.bias", "excluded"),
    }
    removed = next(layer for layer in good["layers"] if layer["key"] == "filters.weight")
    state = next(total for total in found["totals"] if total["name"] == "bytes")
    assert state["before"] - state["after"] == removed["cost"]["bytes"] > 0
    back = difference(without, good)
    assert [layer["key"] for layer in back["layers"]["added"]] == ["filters.weight"]
    assert [skip["parameter"] for skip in back["skips"]["gone"]] == [
        skip["parameter"] for skip in found["skips"]["new"]
    ]


def test_diff_names_changed_settings_and_sizes(plan: Plan, good: Document) -> None:
    method = dataclasses.replace(kfac_fx.KFAC(), damping=0.5)
    settings = difference(good, json.loads(report.to_json(with_method(plan, method))))["settings"]
    assert settings == [{"name": "damping", "before": kfac_fx.KFAC().damping, "after": 0.5}]
    wider = copy.deepcopy(good)
    changed = [layer for layer in wider["layers"] if layer["name"].endswith(".out")]
    for layer in changed:
        layer["factors"][0]["dim"] = 17
        layer["cost"]["bytes"] += 100
    found = difference(good, wider)
    assert [entry["name"] for entry in found["layers"]["changed"]] == [layer["name"] for layer in changed]
    assert found["layers"]["changed"][0]["changes"] == [{"name": "A", "before": "9^2", "after": "17^2"}]
    lines = plain_text(difference_lines(found, names=("a", "b"))).splitlines()
    row = next(line for line in lines if line.startswith("  ~ "))
    assert "blocks.[0-2].out" in row and "x3" in row and "A 9^2 -> 17^2" in row
    assert sum(line.startswith("  ~ ") for line in lines) == 1


def test_diff_tells_another_reason_of_the_same_skip(good: Document) -> None:
    other = copy.deepcopy(good)
    other["skips"][0]["reason"] = "tied"
    changes = difference(good, other)["skips"]["changed"]
    assert [(c["parameter"], c["changes"][0]["after"]) for c in changes] == [
        (good["skips"][0]["parameter"], "tied")
    ]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_of_a_difference_is_wider_than_the_terminal(plan: Plan, good: Document, width: int) -> None:
    other = json.loads(report.to_json(with_method(plan, kfac_fx.SKFAC())))
    lines = plain_text(difference_lines(difference(good, other), names=("before", "after"), width=width))
    assert max(map(len, lines.splitlines())) <= width


def test_points_and_percentages_of_a_difference_have_the_same_precision(plan: Plan, good: Document) -> None:
    other = json.loads(report.to_json(with_method(plan, kfac_fx.SKFAC())))
    lines = plain_text(difference_lines(difference(good, other), names=("before", "after")))
    totals = lines[lines.index("total ") :]
    changes = re.findall(r"[+-][\d,]+\.(\d+)(?:%| points)$", totals, re.MULTILINE)
    assert " points" in totals and len(changes) > 2 and {len(digits) for digits in changes} == {1}


def test_a_difference_rounds_no_coverage_to_all_or_nothing(good: Document) -> None:
    pair = [copy.deepcopy(good), copy.deepcopy(good)]
    for document, coverage in zip(pair, (0.9997, 0.0002), strict=True):
        document["totals"]["coverage"] = coverage
    lines = plain_text(difference_lines(difference(*pair), names=("a", "b"))).splitlines()
    (matched,) = [line.split() for line in lines if line.startswith("matched")]
    assert matched[1:3] == [">99.9%", "<0.1%"]


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folders(tmp_path: Path, good: Document) -> tuple[str, str]:
    other = copy.deepcopy(good) | {"fisher": "mc"}
    for name, document in (("a", good), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(document))
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_diff_ends_with_3_only_if_asked_and_different(folders: tuple[str, str]) -> None:
    first, second = folders
    assert run("diff", first, second).exit_code == 0
    assert run("diff", first, second, "--exit-code").exit_code == 3
    assert run("diff", first, f"{first}/report.json", "--exit-code").exit_code == 0


def test_diff_prints_json_alone(folders: tuple[str, str]) -> None:
    content = json.loads(run("diff", *folders, "--json").stdout)
    assert content["schema"] == "kfac_fx.diff/1" and not content["same"]
    assert content["settings"] == [{"name": "fisher", "before": "empirical", "after": "mc"}]
    assert "fisher empirical -> mc" in run("diff", *folders).stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no report.json"),
        ("{", "is not JSON"),
        ("[]", "is not a report"),
        ('{"schema": "kfac_fx.methods/1"}', "is not a report"),
        ('{"schema": "kfac_fx.report/2"}', "Install the version of kfac_fx that wrote it"),
        ('{"schema": "kfac_fx.report/1"}', "lacks versions"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_an_error(
    tmp_path: Path, folders: tuple[str, str], content: str | None, message: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "report.json").write_text(content)
    result = run("diff", folders[0], str(bad))
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_missing_folder_is_an_error() -> None:
    result = run("diff", "nowhere", "nowhere")
    assert result.exit_code == 1 and "nowhere does not exist" in result.stderr


def test_a_missing_field_deep_inside_is_named(tmp_path: Path, good: Document) -> None:
    wrong = copy.deepcopy(good)
    del wrong["layers"][1]["factors"][0]["bytes"]
    (tmp_path / "report.json").write_text(json.dumps(wrong))
    with pytest.raises(KfacFxError, match=re.escape("layers[1].factors[0].bytes")):
        read_report(tmp_path)


def test_costs_that_print_the_same_are_not_listed(good: Document) -> None:
    other = copy.deepcopy(good)
    other["layers"][0]["cost"]["bytes"] = 2**20
    near = copy.deepcopy(other)
    near["layers"][0]["cost"]["bytes"] += 4
    small = plain_text(difference_lines(difference(other, near), names=("a", "b")))
    assert "1.0M -> 1.0M" not in small and "1 changed" in small and "less than is printed" in small
    near["layers"][0]["cost"]["bytes"] *= 2
    assert "state 1.0M -> 2.0M" in plain_text(difference_lines(difference(other, near), names=("a", "b")))
