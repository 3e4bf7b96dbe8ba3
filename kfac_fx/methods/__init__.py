"""Methods by name. A new method is one file and one entry here."""

from __future__ import annotations

from typing import Any

from kfac_fx.contracts import Method
from kfac_fx.errors import UnknownNameError, check_choice
from kfac_fx.methods.diagonal import Diagonal
from kfac_fx.methods.ekfac import EKFAC
from kfac_fx.methods.foof import FOOF
from kfac_fx.methods.kfac import KFAC
from kfac_fx.methods.kfc import KFC
from kfac_fx.methods.nkfac import NKFAC, AdaNKFAC
from kfac_fx.methods.singd import IKFAC, SINGD
from kfac_fx.methods.skfac import SKFAC

METHODS: dict[str, type[Any]] = {
    "kfac": KFAC,
    "kfc": KFC,
    "ekfac": EKFAC,
    "foof": FOOF,
    "diagonal": Diagonal,
    "singd": SINGD,
    "ikfac": IKFAC,
    "nkfac": NKFAC,
    "adankfac": AdaNKFAC,
    "skfac": SKFAC,
}


def resolve(method: str | Method) -> Method:
    """Any object with the functions of `Method` as it is; a name as that method with its defaults.

    Raises `UnknownNameError` with the nearest name.
    """
    if isinstance(method, str):
        check_choice("method", method, METHODS)
        return METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        known = ", ".join(f"{cls.__name__}(...)" for cls in METHODS.values())
        raise UnknownNameError(f"method={method!r} is neither a name nor a method such as {known}.")
    return method


__all__ = [
    "AdaNKFAC",
    "Diagonal",
    "EKFAC",
    "FOOF",
    "IKFAC",
    "KFAC",
    "KFC",
    "METHODS",
    "NKFAC",
    "SINGD",
    "SKFAC",
    "resolve",
]
