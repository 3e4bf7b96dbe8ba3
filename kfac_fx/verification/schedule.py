"""A method's schedule made short, so that a few steps of training run every kind of step."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Literal

from kfac_fx.contracts import DampedMethod, Method

Kind = Literal["first", "plain", "statistics", "refresh"]
STATISTICS_EVERY, INVERSE_EVERY = 2, 4
KINDS: tuple[Kind, ...] = ("first", "plain", "statistics", "plain", "refresh")


def shortened(method: Method) -> Method:
    """The method with the schedule of `KINDS`; itself where `refusal` says why not."""
    if refusal(method):
        return method
    inverse_every = INVERSE_EVERY if method.inverse_every else 0
    return replace(method, statistics_every=STATISTICS_EVERY, inverse_every=inverse_every)  # type: ignore


def refusal(method: Method) -> str:
    """Why later steps are not checked; nothing if they are."""
    if isinstance(method, DampedMethod) and method.quadratic is not None:
        return "the quadratic model's update has no independent formula here"
    if not is_dataclass(method):
        return f"the schedule of {method.name} cannot be shortened, since it is no dataclass"
    return ""


def kind_of(index: int, method: Method) -> Kind:
    """Of the step after `index` others."""
    kind = KINDS[index]
    return "statistics" if kind == "refresh" and not method.inverse_every else kind
