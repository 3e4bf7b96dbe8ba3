"""Numbers as short texts: bytes, operations, shares.

Enters: numbers. Leaves: strings of few characters.
"""

from __future__ import annotations

from kfac_fx.wording import counted

_SUFFIXES = ("", "K", "M", "G", "T", "P")


def bytes_text(number: int) -> str:
    """Bytes in powers of 1024: `160.5K`."""
    return _scaled(number, base=1024)


def flops_text(number: int) -> str:
    """Operations in powers of 1000: `21.0M`."""
    return _scaled(number, base=1000)


def share_text(share: float) -> str:
    """What is added to a whole: `+3.2%`, `+48%`."""
    return f"+{share:.1%}" if share < 0.1 else f"+{share:,.0%}"


def part_text(part: float) -> str:
    """A part of a whole: `91.0%`. Rounding makes neither all nor nothing of it: `>99.9%`, `<0.1%`."""
    if 0.9995 <= part < 1:
        return ">99.9%"
    return "<0.1%" if 0 < part < 0.0005 else f"{part:.1%}"


def tensors_text(number: int) -> str:
    """`1 tensor`, `2 tensors`."""
    return counted(number, "tensor")


def _scaled(number: int, *, base: int) -> str:
    value = float(number)
    for suffix in _SUFFIXES:
        if suffix == _SUFFIXES[-1] or round(value, 1 if suffix else 0) < base:
            return f"{value:.1f}{suffix}" if suffix else str(number)
        value /= base
    raise AssertionError("unreachable: the largest suffix takes every number")
