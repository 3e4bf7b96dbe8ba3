"""The strip as a file of its own: XML, whatever the names hold."""

from xml.etree import ElementTree

import torch
from torch import nn

import kfac_fx
from kfac_fx.export.strip import strip

SVG = "{http://www.w3.org/2000/svg}"


def test_names_with_characters_that_xml_forbids_are_spelled_out() -> None:
    names = ("odd\x0b\x1bname", "two\nlines", "<&\x00>", "plain")
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    model.get_submodule(names[2]).requires_grad_(False)  # a line of what is skipped
    model.__class__ = type("Odd\x0bModel", (nn.Sequential,), {})
    batch = torch.ones(2, 3)
    plan = kfac_fx.inspect(model, nn.MSELoss(), batch, batch)
    for page in ("", "index.html"):
        drawing = ElementTree.fromstring(strip(plan, page=page))
        shown = [text.text or "" for text in drawing.iter(f"{SVG}text")]
        for spelled in (r"odd\x0b\x1bname", r"two\nlines", r"<&\x00>", "plain"):
            assert any(text.startswith(spelled) for text in shown), spelled
        assert drawing.attrib["aria-label"].startswith(r"Odd\x0bModel, method kfac")
        titles = [title.text or "" for title in drawing.iter(f"{SVG}title")]
        exact = next(title for title in titles if title.startswith("two"))
        assert exact.splitlines()[0] == r"two\nlines" and exact.splitlines()[1].startswith("A: 4 x 4, ")
