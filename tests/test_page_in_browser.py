"""`index.html` in headless Chromium: what a person does with mouse and keyboard, and what they then see.

Needs `chromium` and `chromedriver`, which `make test` installs where it can.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from kfac_fx.export.page import page
from kfac_fx.export.page_data import page_data
from kfac_fx.export.subject import PassProgram, StatisticsStep
from kfac_fx.planned import Plan
from tests.pages import HOSTILE, hostile_plan, page_of

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The one skip of the suite: a browser is a program that only a system's packages have. `make test` installs
# it with apt; where that cannot be, everything but clicks is still tested, and the reason is printed.
pytestmark = pytest.mark.skipif(
    None in PROGRAMS.values(), reason="no chromium and chromedriver here, and apt could not install them"
)


@pytest.fixture(scope="module")
def programs(gpt_step: StatisticsStep) -> tuple[PassProgram, ...]:
    return gpt_step.texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, gpt_plan: Plan, gpt_step: StatisticsStep) -> Path:
    """Pages by name: `main`, `packed` (deflated) and `hostile`."""
    folder = tmp_path_factory.mktemp("pages")
    data = page_data(gpt_plan, gpt_step)
    with pytest.MonkeyPatch.context() as patch:
        (folder / "main.html").write_text(page(gpt_plan, data), encoding="utf-8")
        patch.setattr("kfac_fx.export.page.PLAIN_LIMIT", 0)
        (folder / "packed.html").write_text(page(gpt_plan, data), encoding="utf-8")
    (folder / "hostile.html").write_text(page_of(hostile_plan()), encoding="utf-8")
    return folder


class Reader:
    """A browser with one page open."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(
        self, name: str = "main", *, at: str = "", size: tuple[int, int] = (1400, 900), dark: bool = False
    ) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.driver.get(f"file://{self.folder / name}.html{at}")
        for _ in range(100):
            if self.js("return document.documentElement.dataset.ready") == "true":
                return
            self.driver.execute_async_script("setTimeout(arguments[0], 20)")
        raise AssertionError(f"the page did not get ready: {self.log()}")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css)

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()
        self.settle()

    def click(self, element: WebElement) -> None:
        """In the middle of the window, also where a drawing's element is covered by its text."""
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).click().perform()
        self.settle()

    def settle(self) -> None:
        """Let events that were sent arrive."""
        self.driver.execute_async_script("setTimeout(() => setTimeout(arguments[0], 20), 20)")

    def focused(self) -> str:
        return self.js("return document.activeElement.textContent || document.activeElement.id")

    def log(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = str(PROGRAMS["chromium"])
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(PROGRAMS["chromedriver"])))
    yield driver
    driver.quit()


@pytest.fixture
def reader(driver: webdriver.Chrome, folder: Path) -> Iterator[Reader]:
    reader = Reader(driver, folder)
    yield reader
    assert reader.log() == []


ROWS = "#table > tbody > tr.row"


def keys_shown(reader: Reader) -> list[str]:
    return reader.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.dataset.key)", ROWS)


def numbers(plan: Plan) -> dict[str, dict[str, float]]:
    """What each column is sorted by, per layer, from the plan alone."""
    found: dict[str, dict[str, float]] = {}
    for match in plan.matched:
        factors = [factor for factor in plan.factors if factor.owner == match.key]
        sides = {factor.side: factor.dim for factor in factors}
        statistics = sum(f.flops_statistics for f in factors)
        refresh, apply = sum(f.flops_refresh for f in factors), sum(f.flops_apply for f in factors)
        found[match.key] = {
            "A": sides.get("A", 0),
            "G": sides.get("G", sides.get("F", 0)),
            "rows": match.rows,
            "state": sum(f.bytes for f in factors),
            "statistics": statistics,
            "refresh": refresh,
            "apply": apply,
            "per step": apply
            + statistics / plan.method.statistics_every
            + refresh / plan.method.inverse_every,
        }
    return found


def test_every_numeric_column_sorts_down_then_up_then_as_before(reader: Reader, gpt_plan: Plan) -> None:
    reader.open()
    reader.find("#alike").click()
    before, values = keys_shown(reader), numbers(gpt_plan)
    assert len(before) == len(gpt_plan.matched)
    names = [name.strip("▾▴") for name in reader.texts("#table > thead button")]
    for column in next(iter(values.values())):
        index = names.index(column)
        for direction in ("descending", "ascending"):
            reader.js("document.querySelectorAll('#table > thead button')[arguments[0]].click()", index)
            assert reader.all("#table > thead th")[index].get_attribute("aria-sort") == direction
            shown = [values[key][column] for key in keys_shown(reader)]
            assert shown == sorted(shown, reverse=direction == "descending"), column
        reader.all("#table > thead button")[index].click()
        assert keys_shown(reader) == before


def test_text_columns_sort_and_keep_numbers_in_names_in_order(reader: Reader, gpt_plan: Plan) -> None:
    reader.open()
    reader.find("#alike").click()
    reader.all("#table > thead button")[0].click()
    names = reader.texts(f"{ROWS} button.open")
    assert names == sorted(names)
    kinds = {match.key: match.kind for match in gpt_plan.matched}
    reader.all("#table > thead button")[1].click()
    shown = [kinds[key] for key in keys_shown(reader)]
    assert shown == sorted(shown)


def test_the_filter_narrows_layers_and_skips_and_escape_clears_it(reader: Reader, gpt_plan: Plan) -> None:
    reader.open()
    everything = len(keys_shown(reader))
    reader.press("/")
    reader.press(*"conv1d")
    assert [kind for kind in reader.texts(f"{ROWS} td:nth-child(2)")] == ["conv1d"]
    assert reader.find("#shown").text == f"1 of {everything} rows"
    reader.press(Keys.ESCAPE)
    assert len(keys_shown(reader)) == everything
    skip = gpt_plan.skipped[0]
    reader.press(*skip.parameter)
    assert skip.parameter in " ".join(reader.texts("#skiptable tbody tr"))
    assert len(reader.all("#skiptable tbody tr")) < len(gpt_plan.skipped)
    reader.press(*" zzz")
    assert reader.texts("#table > tbody .none") == ["No layer fits the filter."]


def test_a_layer_opens_to_its_lines_of_the_program(
    reader: Reader, gpt_plan: Plan, programs: tuple[PassProgram, ...]
) -> None:
    reader.open()
    source = programs[-1].text.splitlines()
    reader.js(
        "document.querySelector(arguments[0]).scrollIntoView()", f'{ROWS}[data-key="blocks.0.out.weight"]'
    )
    reader.find(f'{ROWS}[data-key="blocks.0.out.weight"]').click()
    for number, text in zip(reader.texts(".detail .l .n"), reader.texts(".detail .l"), strict=True):
        assert text.removeprefix(number).strip("\n") == source[int(number) - 1]
    shown = "\n".join(reader.texts(".detail .part .l"))
    match = next(m for m in gpt_plan.matched if m.key == "blocks.0.out.weight")
    assert f"{match.uses[0].grad.name}: " in shown and f"{match.uses[0].g[0].name}: " in shown
    assert reader.texts(".detail .part summary b") == ["forward", "backward", "statistics", "precondition"]
    facts = " ".join(reader.texts(".detail .facts"))
    assert match.source is not None
    assert match.source.code in facts and f"tiny_gpt.py:{match.source.line}" in facts
    forms = {factor.form for factor in gpt_plan.factors if factor.owner == match.key}
    assert all(form in " ".join(reader.texts(".detail .form")) for form in forms)


def test_layers_alike_are_shown_one_by_one(reader: Reader) -> None:
    reader.open(at="#layer/blocks.2.out.weight")
    choice = reader.find(".detail .member select")
    assert reader.js("return arguments[0].selectedOptions[0].textContent", choice) == "blocks.2.out"
    assert reader.texts(".detail .member option") == ["blocks.0.out", "blocks.1.out", "blocks.2.out"]
    assert "blocks.2.out.weight" in reader.texts(".detail .facts")[0]
    Select(choice).select_by_visible_text("blocks.1.out")
    assert reader.js("return document.activeElement.tagName") == "SELECT"
    assert "blocks.1.out.weight" in reader.texts(".detail .facts")[0]


def test_a_click_in_the_strip_opens_the_layer_again_and_again(reader: Reader) -> None:
    reader.open()
    link = reader.find('#strip a[data-key="head.weight"]')
    for _ in range(2):
        reader.click(link)
        assert reader.find(f'{ROWS}[data-key="head.weight"] button').get_attribute("aria-expanded") == "true"
        reader.find(f'{ROWS}[data-key="head.weight"] button').click()
    assert "bytes each" in reader.js("return arguments[0].querySelector('title').textContent", link)


def test_a_click_in_the_drawing_jumps_to_the_line(reader: Reader, gpt_plan: Plan) -> None:
    reader.open(at="#layer/head.weight")
    match = next(m for m in gpt_plan.matched if m.key == "head.weight")
    boxes = reader.all(".graph a.box")
    lanes = [box.get_attribute("aria-label").split(":")[0] for box in boxes]
    assert set(lanes) == {"forward", "backward", "statistics", "precondition"}
    box = next(box for box in boxes if ": g, output gradient" in box.get_attribute("aria-label"))
    reader.click(box)
    assert match.uses[0].g[0].name in " ".join(reader.texts("#code .marked"))
    place = reader.js("return document.querySelector('#code .marked').getBoundingClientRect().top")
    assert 0 < place < 900
    reader.driver.back()
    reader.settle()
    assert reader.find(".graph").is_displayed()


def test_passes_show_what_each_of_them_changed(reader: Reader, programs: tuple[PassProgram, ...]) -> None:
    reader.open()
    reader.click(reader.find("nav [data-view=changes]"))
    assert [text.split()[1] for text in reader.texts("#stages a")] == [program.name for program in programs]
    for index in range(1, len(programs)):
        reader.click(reader.all("#stages a")[index])
        old, new = (set(programs[i].text.splitlines()) for i in (index - 1, index))
        added, gone = (
            [re.sub(r"^\d+[+−]", "", text).strip("\n") for text in reader.texts(f"#code .{css}")]
            for css in ("new", "gone")
        )
        assert new - old <= set(added) and old - new <= set(gone)
    reader.click(reader.find("#modes a"))
    assert len(reader.all("#code .l")) == len(programs[-1].text.splitlines())


def test_the_deflated_page_shows_the_same(reader: Reader) -> None:
    reader.open("main", at="#program/cleanup")
    plain = reader.texts("#code .l")
    reader.open("packed", at="#program/cleanup")
    assert reader.texts("#code .l") == plain


def test_everything_can_be_done_with_the_keyboard(reader: Reader) -> None:
    reader.open()
    reader.press(Keys.TAB, Keys.ENTER)
    names = reader.texts(f"{ROWS} button.open")
    for _ in range(200):
        if reader.js("return document.activeElement.matches('button.open')"):
            break
        reader.press(Keys.TAB)
    assert reader.focused() == names[0]
    reader.press(Keys.ARROW_DOWN)
    assert reader.focused() == names[1]
    outline = reader.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    reader.press(Keys.ENTER)
    assert reader.focused() == names[1] and reader.find(".detail .graph").is_displayed()
    reader.press(Keys.SPACE)
    assert reader.all(".detail") == []
    reader.press(Keys.END)
    assert reader.focused() == names[-1]
    reader.press("/")
    assert reader.focused() == "filter"
    for element in reader.all("#strip a, nav a, button"):
        assert element.get_attribute("tabindex") != "-1"


@pytest.mark.parametrize("width", [400, 900, 1600])
def test_the_page_is_never_wider_than_the_window(reader: Reader, width: int) -> None:
    for at in ("", "#layer/head.weight", "#changes/statistics", "#program/cleanup"):
        reader.open(at=at, size=(width, 800))
        wide = reader.js(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide[0] <= wide[1], at


@pytest.mark.parametrize("width", [1100, 1280, 1900])
def test_the_strip_fits_its_box_and_gives_its_texts_the_room_there_is(reader: Reader, width: int) -> None:
    reader.open(size=(width, 800))
    wide = reader.js(
        "const box = document.getElementById('strip'); return [box.scrollWidth, box.clientWidth]"
    )
    assert wide[0] <= wide[1]
    texts = reader.js(
        "const right = document.querySelector('#strip svg').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('#strip text[data-full]')].map("
        "(e) => [e.textContent, e.dataset.full, right - e.getBoundingClientRect().right])"
    )
    assert len(texts) > 5
    for shown, full, free in texts:
        assert free >= 0
        assert shown == full or (full.startswith(shown.rstrip("\u2026")) and shown != full and free < 40)
    assert width < 1900 or sum(shown == full for shown, full, _ in texts) > len(texts) / 2


CONTRAST = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const parse = (css) => (css.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    if (e.matches("svg a") || e.matches("svg g")) continue;
    const color = parse(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const found = [];
for (const e of document.querySelectorAll("body *")) {
  if (e.closest("script, style, title, .quiet, .jump, [hidden]") || !e.checkVisibility()) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
  const style = getComputedStyle(e);
  const box = e.closest(".box");
  const fill = (shape) => parse(getComputedStyle(shape).fill);
  const drawn = () => (box ? fill(box.querySelector("rect"))
    : e.matches(".lane") ? fill(e.previousElementSibling) : behind(e.closest("svg").parentElement));
  const isDrawn = e.tagName === "text";
  const [a, b] = [light(parse(isDrawn ? style.fill : style.color)), light(isDrawn ? drawn() : behind(e))];
  const name = `${e.tagName}.${e.getAttribute("class")}`;
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), name, e.textContent.slice(0, 40)]);
}
return found.sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("at", ["#layer/blocks.0.out.weight", "#changes/averages"])
def test_all_text_has_the_contrast_of_wcag_aa(reader: Reader, dark: bool, at: str) -> None:
    reader.open(at=at, dark=dark)
    found = reader.js(CONTRAST)
    assert len(found) > 100
    assert found[0][0] >= 4.5, found[:8]


def test_dark_is_dark_and_light_is_light(reader: Reader) -> None:
    for dark in (False, True):
        reader.open(dark=dark)
        page, ink = reader.js(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        brighter = sum(map(int, re.findall(r"\d+", page))) > sum(map(int, re.findall(r"\d+", ink)))
        assert brighter is not dark


def test_hostile_names_are_shown_as_they_are_and_run_nothing(reader: Reader) -> None:
    reader.open("hostile")
    name = f"{HOSTILE}.weight"
    assert reader.texts(f"{ROWS} button.open") == [HOSTILE]
    assert reader.all("img") == []
    reader.js("document.querySelector('#strip a').focus()")
    reader.press(Keys.ENTER)
    assert name in " ".join(reader.texts(".detail .facts"))
    reader.press("/")
    reader.press("<", "/")
    assert reader.texts(f"{ROWS} button.open") == [HOSTILE]
    assert HOSTILE in " ".join(reader.texts("#skiptable tbody th"))
