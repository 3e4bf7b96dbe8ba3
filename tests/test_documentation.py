"""Every block of code of the README and of the documentation does what its page says."""

import ast
import functools
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from kfac_fx import Reason, methods
from pagetools import small
from pagetools.blocks import PageError, blocks_of
from pagetools.commands import commands_of, run_file, run_program
from pagetools.formulas import with_mathml
from pagetools.offline import loaded_from_elsewhere
from pagetools.pages import rendered

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *DOCS.rglob("*.md")]
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@functools.cache
def page_text(page: Path) -> str:
    return rendered(page.read_text(), page=page.name)


def run(text: str) -> str:
    return rendered(text, page="page.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_the_page_runs(page: Path) -> None:
    assert page_text(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_formula_of_the_page_becomes_mathml(page: Path) -> None:
    text = "".join(part for i, part in enumerate(page.read_text().split("```")) if i % 2 == 0)
    formulas = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL) + re.findall(r"(?<!\$)\$([^$\n]+)\$", text)
    for tex in formulas:
        assert "<math" in with_mathml(f'<div class="arithmatex">\\[{tex}\\]</div>')


def test_a_command_of_tex_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="not known"):
        with_mathml('<span class="arithmatex">\\(\\nosuchcommand x\\)</span>')


def test_every_reason_has_a_section_whose_example_triggers_it() -> None:
    sections = re.split(r"^## ", page_text(DOCS / "reasons.md"), flags=re.MULTILINE)[1:]
    codes = [section.split("\n", 1)[0].strip() for section in sections]
    assert sorted(codes) == sorted(reason.value for reason in Reason)
    for code, section in zip(codes, sections, strict=True):
        outputs = re.findall(r"\.output \}\n([\w-]+):", section)
        assert outputs == [code], f"the example of {code} gives {outputs}"


def test_every_method_has_a_page_with_its_settings_and_a_source() -> None:
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {*methods(), "index"}
    for name in methods():
        text = (DOCS / "methods" / f"{name}.md").read_text()
        assert f"<!-- defaults: {name} -->" in text and "$$" in text
        assert "arXiv:" in text or "CVPR" in text or "ECML" in text


def test_a_page_shows_what_its_blocks_print() -> None:
    page = "```python\nx = 6\n```\n\n```python\nprint(x * 7)\n```\n"
    assert "``` { .text .output }\n42\n```" in run(page)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```\nprint(1)\n```\n", "needs a language"),
        ("```python\nprint(1)\n", "no end"),
        ("```python\nnothing_like_this\n```\n", "NameError"),
        ("<!-- run small: slow -->\n```python\nprint(1)\n```\n", "run as they are"),
        ("<!-- no-such-marker -->\n```python\nprint(1)\n```\n", "no marker"),
        ("<!-- fails -->\n```python\nprint(1)\n```\n", "raised nothing"),
        ("```console\n$ kfac-fx inspect no_such_file.py\n```\n", "ended with 1"),
        ("<!-- run small: -->\n```console\n$ kfac-fx methods\n```\n", "no marker"),
        ("```console\n$ rm file\n```\n", "no rule runs"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "prints another text"),
        ("```json\n{'a': 1}\n```\n", "property name"),
        ("<!-- excerpt: out/no_such.py /a/ -->\n", "nothing wrote"),
        ("<!-- defaults: kfacs -->\n", "no method"),
    ],
)
def test_a_broken_block_is_an_error_with_its_place(block: str, message: str) -> None:
    with pytest.raises(PageError, match=r"page\.md:\d+: ") as error:
        run(f"Text.\n\n{block}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("kfac-fx inspect TARGET --no-such-option", "No such option"),
        ("kfac-fx inspekt TARGET", "No such command"),
        ("kfac-fx inspect", "Missing argument"),
        ("kfac-fx transform TARGET --method kfac --folder DIR", "No such option"),
        ("kfac-fx bench examples/no_such_file.py", "there is no examples/no_such_file.py"),
        ("make no-such-target", "No rule to make target"),
        ("make clean", "does not say what `make clean`"),
        ("python examples/no_such_file.py", "there is no examples/no_such_file.py"),
        ("python examples/digits_conv.py --no-such-option", "unrecognized arguments: --no-such-option"),
        ("python tests/benchmarks/step_time.py --no-such-option", "no option --no-such-option"),
        ('pip install ".[no_such_extra]"', "no extra 'no_such_extra'"),
        ("git push", "no rule runs"),
        ("no-such-program", "no rule runs"),
    ],
)
def test_a_command_that_cannot_be_run_is_an_error_when_it_is_run_small(command: str, message: str) -> None:
    with pytest.raises(PageError, match=r"^page\.md:2: ") as error:
        run(f"<!-- run small: slow -->\n```console\n$ {command}\n```\n")
    assert message in str(error.value)


def test_a_page_leaves_random_numbers_as_they_were() -> None:
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    run("```python\nimport random\n\nprint(random.random())\n```\n")
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_every_text_file_is_read_and_written_as_utf_8_whatever_the_locale() -> None:
    opened = re.compile(r"read_text|write_text|open|fdopen|\w*TemporaryFile")
    for file in [f for room in ("kfac_fx", "cli", "docs", "examples") for f in (ROOT / room).rglob("*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = vars(call.func).get("attr", vars(call.func).get("id", ""))
            if not opened.fullmatch(name):
                continue
            modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = name != "write_text" and any("b" in mode for mode in modes)
            said = binary or any(keyword.arg == "encoding" for keyword in call.keywords)
            assert said, f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"


def test_what_is_run_small_is_what_the_pages_show() -> None:
    """An entry of the lists that no page needs is left over."""
    blocks = [block for page in PAGES for block in blocks_of(page.read_text(), page=page.name)]
    shown = [command for block in blocks if block.small for command in commands_of(block)]
    assert {start for start in small.SMALLER if any(re.match(start, command) for command in shown)} == {
        *small.SMALLER
    }
    words = {word for command in shown for word in command.split()}
    assert {*small.STAND_INS, *small.MAKES} <= words


def test_every_option_that_makes_a_command_short_is_last() -> None:
    """The last of a repeated option counts, so the page's own values are replaced."""
    assert small.options_for("python examples/digits_conv.py") == ["--epochs", "1"]
    assert small.options_for("python examples/digits_conv.py --epochs 5 --seed 1") == ["--epochs", "0"]
    assert small.options_for("kfac-fx bench TARGET --period --peers")[:2] == ["--method", "kfac"]
    assert small.options_for("kfac-fx benchmark TARGET") == []


def test_a_file_that_is_run_does_what_it_does_in_a_new_process(tmp_path: Path) -> None:
    """Arguments, folder, path, modules beside it, messages and exit codes."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "textwrap.py").write_text("WORD = 'that beside the file'\n")
    (tmp_path / "room" / "main.py").write_text(
        "import os, sys, textwrap\n"
        "print(__name__, sys.argv, os.getcwd(), sys.path[0], textwrap.WORD, flush=True)\n"
        "os.system('echo of a program')\n"
        "sys.exit({'text': 'a message', 'raise': 3}.get(sys.argv[1], 0))\n"
    )
    for word, code in {"fine": 0, "text": 1, "raise": 3}.items():
        words = ["room/main.py", word]
        said = "a message\n" if word == "text" else ""
        facts = f"__main__ {words} {tmp_path} {tmp_path / 'room'} that beside the file"
        assert run_file(words, tmp_path) == (f"{facts}\nof a program\n{said}", code)
        assert run_program([sys.executable, *words], tmp_path) == run_file(words, tmp_path)


def test_a_shown_text_may_leave_lines_out() -> None:
    block = "```python\nprint('a\\nb\\nc\\nd')\n```\n\n```text\na\n...\nd\n```\n"
    run(block)
    with pytest.raises(PageError):
        run(block.replace("d\n```", "e\n```"))


def test_what_a_site_would_load_from_elsewhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text('<a href="https://arxiv.org">link</a><link rel="canonical" href="https://x.org">')
    assert loaded_from_elsewhere(tmp_path) == []
    for tag in (
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<style>@import "https://cdn.example/x.css"</style>',
        '<img src="https://cdn.example/x.png">',
        '<p style="background: url(https://cdn.example/x.png)">',
    ):
        page.write_text(tag)
        assert len(loaded_from_elsewhere(tmp_path)) == 1
    page.write_text("")
    (tmp_path / "site.css").write_text("@font-face {src: url('https://fonts.example/x.woff2')}")
    assert len(loaded_from_elsewhere(tmp_path)) == 1


def test_the_pages_are_those_of_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_files_of_the_folder_are_those_that_its_page_lists() -> None:
    text = page_text(DOCS / "inspection.md")
    listing = re.search(r"\.output \}\nout:\n(.+?)\n\n", text, re.DOTALL)
    assert listing is not None
    listed = re.findall(r"^\| `([\w.]+)/?` \|", text[listing.end() :], re.MULTILINE)
    assert sorted(listed) == sorted(listing[1].splitlines())
