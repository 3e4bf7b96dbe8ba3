"""`index.html` and `strip.svg` hold what the plan says, and nothing that could leave their place."""

import base64
import dataclasses
import difflib
import json
import re
import zlib
from html import escape
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kfac_fx
from kfac_fx.export import page as page_module
from kfac_fx.export.page import encoded, page
from kfac_fx.export.page_code import hunks, node_lines
from kfac_fx.export.page_data import page_data
from kfac_fx.export.strip import strip
from kfac_fx.export.subject import PassProgram, StatisticsStep, about
from kfac_fx.planned import Plan
from kfac_fx.report.lines import plain_text
from kfac_fx.report.text import header_lines
from kfac_fx.target import load_target
from tests.pages import GOLDEN, HOSTILE, hostile_plan, page_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def data(gpt_plan: Plan, gpt_step: StatisticsStep) -> dict[str, Any]:
    return page_data(gpt_plan, gpt_step)


@pytest.fixture(scope="module")
def text(gpt_plan: Plan, data: dict[str, Any]) -> str:
    return paged(gpt_plan, data)


@pytest.fixture(scope="module")
def programs(gpt_step: StatisticsStep) -> tuple[PassProgram, ...]:
    return gpt_step.texts


def paged(plan: Plan, data: dict[str, Any], *, plain_limit: int = page_module.PLAIN_LIMIT) -> str:
    """The page of data that is made already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "PLAIN_LIMIT", plain_limit)
        return page(plan, data)


class Elements(HTMLParser):
    """Tags with their attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data


def data_of(text: str) -> Any:
    """The JSON value of a page, as its script reads it."""
    elements = Elements(text)
    attributes = next(a for tag, a in elements.tags if tag == "script" and a.get("id") == "data")
    raw = elements.scripts[0]
    plain = raw if attributes["data-encoding"] == "json" else zlib.decompress(base64.b64decode(raw)).decode()
    return json.loads(plain)


def test_the_page_loads_nothing_from_elsewhere(text: str) -> None:
    for tag, attributes in Elements(text).tags:
        for name in ("src", "href", "action", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), f"<{tag} {name}={target}>"
    assert "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text


def test_names_and_source_lines_cannot_leave_their_place() -> None:
    text = page_of(hostile_plan())
    elements = Elements(text)
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert len(elements.scripts) == 2
    layer = data_of(text)["report"]["layers"][0]
    assert layer["weight"] == f"{HOSTILE}.weight"
    assert layer["source"]["code"].endswith("# </script><img src=x onerror=alert(2)>")
    ElementTree.fromstring(strip(hostile_plan()))


def test_long_data_is_deflated_and_reads_the_same(gpt_plan: Plan, data: dict[str, Any], text: str) -> None:
    packed = paged(gpt_plan, data, plain_limit=1000)
    assert len(packed) < len(text)
    assert data_of(packed) == data_of(text)


@given(st.text())
def test_encoded_text_is_read_back_and_ends_no_element(value: str) -> None:
    how, raw = encoded(json.dumps(value))
    assert how == "json" and "<" not in raw
    assert json.loads(raw) == value


LINES = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", ""]), max_size=30)


@given(LINES, LINES)
def test_hunks_turn_the_old_text_into_the_new_one(old: list[str], new: list[str]) -> None:
    result, read = [], 0
    for start, end, first, last in hunks(old, new):
        assert (start, end) != (first, last) or old[start:end] != new[first:last]
        result += old[read:start] + new[first:last]
        read = end
    assert result + old[read:] == new


def test_a_diff_of_a_pass_shows_no_more_lines_than_difflib(programs: tuple[PassProgram, ...]) -> None:
    texts = [program.text.splitlines() for program in programs]
    for old, new in zip(texts, texts[1:], strict=False):
        ours = sum(end - start + last - first for start, end, first, last in hunks(old, new))
        theirs = sum(line[0] in "+-" for line in difflib.ndiff(old, new))
        assert ours <= 1.1 * theirs + 4


def test_the_page_holds_the_program_after_every_pass(programs: tuple[PassProgram, ...], text: str) -> None:
    lines: list[str] = []
    for stored, program in zip(data_of(text)["programs"], programs, strict=True):
        added, result, read = iter(stored["new"].split("\n")), [], 0
        for start, end, first, last in zip(*[iter(stored["hunks"])] * 4, strict=True):
            result += lines[read:start] + [next(added) for _ in range(last - first)]
            read = end
        lines = result + lines[read:]
        assert stored["name"] == program.name
        assert "\n".join(lines) + "\n" == program.text


def test_each_node_is_found_on_its_line(gpt_plan: Plan, programs: tuple[PassProgram, ...]) -> None:
    lines = programs[-1].text.splitlines()
    where = node_lines(lines)
    for node in gpt_plan.capture.graph.graph.nodes:
        if node.op == "placeholder":
            assert re.match(rf"\s+{node.name}:", lines[where[node.name][0]])
    for name, (first, last) in where.items():
        assert re.match(rf"\s+{name}\b", lines[first])
        statement = " ".join(line.strip() for line in lines[first : last + 1])
        assert statement.count("(") == statement.count(")")


def boxes_by_title(drawing: list[Any]) -> dict[str, list[Any]]:
    return {box[0]: box for box in drawing[0]}


def test_the_drawing_of_a_layer_names_its_nodes_and_their_lines(
    gpt_plan: Plan, data: dict[str, Any], programs: tuple[PassProgram, ...]
) -> None:
    lines = programs[-1].text.splitlines()
    matches = {match.key: match for match in gpt_plan.matched}
    for layer, drawing in zip(data["report"]["layers"], data["graphs"], strict=True):
        match, boxes = matches[layer["key"]], boxes_by_title(drawing)
        use = match.uses[0]
        expected = {"weight": gpt_plan.capture.parameter(match.weight).node, "g, output gradient": use.g[0]}
        expected |= {"a, input": use.a} if use.a is not None else {}
        expected["weight gradient"] = gpt_plan.capture.gradients[match.weight]
        for title, node in expected.items():
            box = next(box for name, box in boxes.items() if title in name.split(" = "))
            assert box[1].split()[-1] == node.name
            assert any(re.match(rf"\s+{node.name}\b", line) for line in lines[box[4] : box[5] + 1])
        stored = {f.side for f in gpt_plan.factors if f.owner == match.key and f.bytes}
        assert {name.split()[1] for name in boxes if name.startswith("new ")} >= stored
        assert {"gradient as a matrix", "direction", "weight direction"} <= set(boxes)
        named = [box[0] for box in drawing[0] if box[3] == 0]
        assert named.count("direction") == named.count("gradient as a matrix") == 1


def test_arrows_of_a_drawing_are_edges_of_the_program(
    data: dict[str, Any], programs: tuple[PassProgram, ...]
) -> None:
    source = programs[-1].text.splitlines()
    for boxes, arrows, _ in data["graphs"]:
        for start, end in arrows:
            read = "\n".join(source[a] for a in _lines(boxes[end]))
            found = (re.match(r"\s+(\w+)(?:: \"[^\"]*\")?(?: =|,)", source[a]) for a in _lines(boxes[start]))
            made = {match[1] for match in found if match}
            assert any(re.search(rf"\b{name}\b", read) for name in made), (boxes[start], boxes[end])


def _lines(box: list[Any]) -> list[int]:
    return [n for first, last in zip(box[4::2], box[5::2], strict=True) for n in range(first, last + 1)]


def test_costs_of_the_rows_add_up_to_the_totals(gpt_plan: Plan, data: dict[str, Any]) -> None:
    every, inverse_every = gpt_plan.method.statistics_every, gpt_plan.method.inverse_every
    per_step = sum(
        f.flops_apply + f.flops_statistics / every + f.flops_refresh / inverse_every for f in gpt_plan.factors
    )
    assert sum(row["per_step"] for row in data["report"]["rows"]) == pytest.approx(per_step)
    assert sum(layer["per_step"] for layer in data["report"]["layers"]) == pytest.approx(per_step)


def test_every_skipped_parameter_is_on_the_page_with_reason_and_advice(gpt_plan: Plan, text: str) -> None:
    rows = data_of(text)["skips"]
    shown = {name: row for row in rows for name in row["members"]}
    assert set(shown) == {skip.parameter for skip in gpt_plan.skipped}
    for skip in gpt_plan.skipped:
        assert shown[skip.parameter]["reason"] == skip.reason.value
        assert shown[skip.parameter]["advice"] == skip.advice


def test_the_box_of_skips_says_why_in_words() -> None:
    target = load_target(f"{GOLDEN / 'tiny_gpt.py'}:build")
    plan = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="nkfac")
    html = page_of(plan)
    box = html[html.index('class="reasons"') : html.index("</ul>", html.index('class="reasons"'))]
    reasons = {skip.reason for skip in plan.skipped}
    assert box.count("<li>") == len(reasons) > 1
    for reason in reasons:
        details = [escape(skip.detail) for skip in plan.skipped if skip.reason is reason]
        tensors = f"<b>{reason.value}</b> {len(details)}</a>"
        assert tensors in box and any(detail in box for detail in details)


def test_areas_of_the_strip_are_proportional_to_the_dimensions(gpt_plan: Plan) -> None:
    drawing = ElementTree.fromstring(strip(gpt_plan))
    ratios = []
    for link in drawing.iter(f"{SVG}a"):
        key = link.attrib["data-key"]
        for side, css in (("A", "A"), ("G", "G")):
            dims = [
                f.dim
                for f in gpt_plan.factors
                if f.owner == key and f.side == side and not f.diagonal and f.count == 1
            ]
            squares = [r for r in link.iter(f"{SVG}rect") if r.get("class") == css]
            for dim, square in zip(dims, squares, strict=False):
                assert square.attrib["width"] == square.attrib["height"]
                ratios.append(float(square.attrib["width"]) ** 2 / dim)
    assert len(ratios) >= 6
    assert max(ratios) < 1.03 * min(ratios)


def test_the_strip_has_a_link_for_each_row_and_a_line_for_each_skip(
    gpt_plan: Plan, data: dict[str, Any]
) -> None:
    drawing = ElementTree.fromstring(strip(gpt_plan, page="index.html"))
    links = list(drawing.iter(f"{SVG}a"))
    rows = data["report"]["rows"]
    assert [link.attrib["href"] for link in links] == [f"index.html#layer/{row['layers'][0]}" for row in rows]
    words = " ".join(drawing.itertext())
    for skip in gpt_plan.skipped:
        assert skip.reason.value in words and skip.advice in words
    assert "proportional" in words


def test_every_head_names_what_was_chosen(gpt_plan: Plan, data: dict[str, Any]) -> None:
    method = kfac_fx.KFAC(statistics_precision="bfloat16")
    plan = dataclasses.replace(gpt_plan, method=method, without=frozenset({"products", "lengths"}))
    chosen = ("method kfac", "sharing expand", "fisher empirical")
    switched = ("statistics of bfloat16 rows", "without lengths, products")
    html = page(plan, data)
    header = re.sub(r"<[^>]*>", "", html[html.index("<i>method</i>") : html.index("<i>loss</i>")])
    report, program = plain_text(header_lines(plan)), about(plan)
    for text in (header, report, program):
        assert all(part in text for part in (*chosen, *switched))
    assert "node captured" not in report and "nodes captured" in report
    for text in (plain_text(header_lines(gpt_plan)), about(gpt_plan)):
        assert all(part in text for part in chosen) and "without" not in text and "bfloat16" not in text


def test_a_model_without_layers_and_one_without_skips_have_pages() -> None:
    frozen = nn.Linear(3, 2)
    frozen.requires_grad_(False)
    nothing = nn.Sequential(frozen, nn.PReLU())
    plan = kfac_fx.inspect(nothing, lambda y, t: (y - t).square().mean(), torch.ones(4, 3), torch.ones(4, 2))
    data = data_of(page_of(plan))
    assert {skip["reason"] for skip in data["skips"]} >= {"frozen"}
    ElementTree.fromstring(strip(plan))


def test_the_page_of_ten_thousand_nodes_stays_under_a_megabyte() -> None:
    """By the bytes for each node of a smaller model; a large one has fewer, since more of it repeats."""
    target = load_target(f"{GOLDEN / 'tiny_gpt.py'}:build")
    assert isinstance(target.model.blocks, nn.ModuleList)
    make_block = type(target.model.blocks[0])
    target.model.blocks = nn.ModuleList(make_block() for _ in range(9))
    deep = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="kfac")
    nodes = len(deep.capture.graph.graph.nodes)
    assert nodes > 800
    text = page_of(deep)
    stored = len(Elements(text).scripts[0])
    assert len(text) - stored + stored / nodes * 10_000 < 1_000_000
