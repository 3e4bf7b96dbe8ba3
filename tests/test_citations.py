"""What is cited of methods.md is there, and its table of defaults is that of the classes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kfac_fx.methods import METHODS
from kfac_fx.methods.base import norm_recovered

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "methods.md").read_text(encoding="utf-8")
NUMBER, ORACLE = r"\d+(?:\.\d+)?", r"(?:EMB2|[KLESIWNQBXY]\d{1,2})"
RULES = re.compile(r"\((?P<bracketed>[A-Z]\d)\)|^    Strategy (?P<strategy>S\d)", re.MULTILINE)


def listed(item: str) -> str:
    """One or several of `item`: `1.2`, `1.2, 2.3 and 4`, `D0 to D4`, `N1-N6`."""
    return rf"{item}(?:(?:, and |, | and | to |-){item})*"


CITED = {
    "section": re.compile(rf"methods\.md,?(?: sections?)? ({listed(f'{NUMBER}(?: [A-Z][0-9])?')})"),
    "pitfall": re.compile(rf"\bpitfalls? ({listed(r'P[0-9]+')})"),
    "oracle": re.compile(rf"\b[Oo]racles? ({listed(ORACLE)})"),
}
RULE_BEFORE = re.compile(rf"\brules? ({listed('[A-Z][0-9]')}) of methods\.md ({NUMBER})")
RULE_BEHIND = re.compile(rf"methods\.md (?:{NUMBER}, )*({NUMBER}),? (?:strategy )?([A-Z][0-9])\b")


def sections(text: str) -> dict[str, str]:
    """Number of each section -> its text, with that of its parts."""
    heads = [*re.finditer(rf"^#+ ({NUMBER})\.? ", text, re.MULTILINE)]
    ends = [head.start() for head in heads[1:]] + [len(text)]
    found = {head[1]: text[head.start() : end] for head, end in zip(heads, ends, strict=True)}
    assert len(found) == len(heads), "a section has the number of another"
    wholes = {n: "".join(part for m, part in found.items() if m == n or m.startswith(f"{n}.")) for n in found}
    return wholes


SECTIONS = sections(TEXT)
KNOWN = {
    "section": {*SECTIONS},
    "pitfall": {*re.findall(r"^ +(?:- )?(P\d+) ", SECTIONS["14"] + SECTIONS["19"], re.MULTILINE)},
    "oracle": {*re.findall(rf"^  ({ORACLE})  ", SECTIONS["15"], re.MULTILINE)},
}


def span(text: str) -> list[str]:
    """The names in a list; of `N1-N6` and `N1 to N6` those between as well."""
    names = re.findall(r"[A-Z]*\d+(?:\.\d+)?", text)
    for first, last in re.findall(r"([A-Z]*\d+)(?: to |-)([A-Z]*\d+)", text):
        kind = first.rstrip("0123456789")
        names += [f"{kind}{n}" for n in range(int(first[len(kind) :]), int(last[len(kind) :]) + 1)]
    return names


def citations(text: str) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything that a file cites, also over the end of a line."""
    flat = re.sub(r"\s+(?:# )?", " ", text)
    for kind, pattern in CITED.items():
        for found in pattern.findall(flat):
            chosen = re.sub(r" [A-Z]\d", "", found) if kind == "section" else found
            yield from ((kind, name) for name in span(chosen))
    for rules, section in RULE_BEFORE.findall(flat):
        yield from (("rule", f"{section} {name}") for name in span(rules))
    for section, name in RULE_BEHIND.findall(flat):
        yield "rule", f"{section} {name}"


def is_known(kind: str, name: str) -> bool:
    """Whether methods.md has it; a rule has to be in the section that is named with it."""
    if kind != "rule":
        return name in KNOWN[kind]
    section, rule = name.split()
    return rule in {found[1] or found[2] for found in RULES.finditer(SECTIONS.get(section, ""))}


def test_everything_that_is_cited_is_there() -> None:
    files = [f for room in ("kfac_fx", "cli", "tests", "docs", "examples") for f in (ROOT / room).rglob("*")]
    files = [f for f in files if f.suffix in (".py", ".md") and f != Path(__file__)]
    cited = {(file, *found) for file in files for found in citations(file.read_text(encoding="utf-8"))}
    assert len({file for file, *_ in cited}) > 40 and {kind for _, kind, _ in cited} == {*KNOWN, "rule"}
    missing = [f"{f.relative_to(ROOT)}: {kind} {name}" for f, kind, name in cited if not is_known(kind, name)]
    assert not missing, missing


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(methods.md\n    9.4)", [("section", "9.4")]),
        (
            "methods.md sections\n5, 16.3 and 19. The",
            [("section", "5"), ("section", "16.3"), ("section", "19")],
        ),
        (
            "methods.md 2.6, 2.7, 1.8 C3. E",
            [("section", n) for n in ("2.6", "2.7", "1.8")] + [("rule", "1.8 C3")],
        ),
        ("rules D1 to D2 of methods.md 1.6.", [("section", "1.6"), ("rule", "1.6 D1"), ("rule", "1.6 D2")]),
        ("methods.md 4.4, strategy S3", [("section", "4.4"), ("rule", "4.4 S3")]),
        ("(pitfall\n# P6 of methods.md)", [("pitfall", "P6")]),
        ("oracles N1-N3, Q1 and K8 of", [("oracle", n) for n in ("N1", "N2", "N3", "Q1", "K8")]),
    ],
)
def test_a_citation_is_seen_in_every_spelling(text: str, found: list[tuple[str, str]]) -> None:
    assert {*citations(text)} == {*found}


@pytest.mark.parametrize(
    "missing", ["methods.md 1.99", "pitfall P99", "oracle E99", "rule C9 of methods.md 1.8"]
)
def test_what_is_not_there_is_missing(missing: str) -> None:
    assert not all(is_known(*found) for found in citations(missing))


def test_the_text_is_ascii_with_lines_to_read() -> None:
    assert TEXT.isascii() and max(len(line) for line in TEXT.splitlines() if line[:1] != "|") <= 160


def test_the_table_of_defaults_is_that_of_the_classes() -> None:
    rows = [line.strip("| ").split(" | ") for line in SECTIONS["17"].splitlines() if line.startswith("| ")]
    heads, *rows = rows
    assert {row[0] for row in rows} == {*METHODS}
    for row in rows:
        cells = dict(zip(heads, row, strict=True))
        method = METHODS[cells["method"]]()
        optimizer = method.base_optimizer([torch.nn.Parameter(torch.zeros(1))])
        known = {"lr": "lr", "weight decay": "weight_decay", "momentum": "momentum"}
        name, *settings = re.split(r" (?=lr)|, ", cells["base optimizer"])
        assert name == type(optimizer).__name__
        for setting in settings:
            key, value = setting.rsplit(" ", 1)
            assert optimizer.defaults[known[key]] == float(value), cells
        rule = getattr(method, "damping_rule", "-")
        every = (method.statistics_every, method.inverse_every)
        assert (cells["rule"], (int(cells["T_stat"]), int(cells["T_inv"]))) == (rule, every), cells
        assert (float(cells["damping"]), float(cells["decay"])) == (method.damping, method.decay), cells
        clip = "none" if method.kl_clip is None else f"kl_clip {method.kl_clip}"
        assert cells["rescaling"] == ("norm recovery" if recovers(method) else clip), cells


def recovers(method: object) -> bool:
    """Whether directions get the lengths of the gradients."""
    v, g = torch.randn(2, 3), torch.randn(2, 3)
    (found,) = method.rescale([v], [g], learning_rates=torch.ones(1))  # type: ignore[attr-defined]
    return torch.allclose(found, norm_recovered([v], [g])[0])
