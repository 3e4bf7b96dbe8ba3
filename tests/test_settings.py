"""Settings of another type, without meaning or without effect are refused by name, for every method."""

import re
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy
import pytest

import kfac_fx
from kfac_fx.methods import METHODS

WRONG: dict[Any, tuple[tuple[Any, ...], str]] = {
    int: ((1.5, True, "a", None, -1), "must be a whole number of at least [01]"),
    float: (("a", None, True, 1j), "must be a number"),
    float | None: (("a", False), "must be a number or None"),
    bool: ((1, "yes", None), "must be True or False"),
    tuple[float, float]: (((1,), (1, 2, 3), [1.0, 2.0], 1.0, ("a", 1)), "must be a tuple of two numbers"),
}
SETTINGS = [
    pytest.param(kind, field.name, get_type_hints(kind)[field.name], id=f"{name}-{field.name}")
    for name, kind in METHODS.items()
    for field in fields(kind)
    if get_type_hints(kind)[field.name] in WRONG
]


@pytest.mark.parametrize(("kind", "name", "hint"), SETTINGS)
def test_a_value_of_another_type_is_refused_by_name(kind: type[Any], name: str, hint: Any) -> None:
    values, rule = WRONG[hint]
    for value in values:
        start = re.escape(f"{kind.__name__}({name}={value!r}): ")
        with pytest.raises(ValueError, match=f"^{start}{rule}"):
            kind(**{name: value})


def test_the_numbers_of_the_standard_types_are_covered() -> None:
    """Every setting is a number, a bool, a pair, or a choice of strings, which `METHODS` checks itself."""
    covered = {(p.values[0], p.values[1]) for p in SETTINGS}
    others = {f.name for kind in METHODS.values() for f in fields(kind) if (kind, f.name) not in covered}
    assert others == {"damping_rule", "guard", "strategy", "scale", "statistics_precision"}
    assert {"statistics_every", "damping", "damping_bounds", "kl_clip", "decay"} <= {n for _, n in covered}


def test_numbers_of_numpy_and_whole_numbers_for_real_ones_are_taken() -> None:
    method = kfac_fx.KFAC(damping=1, statistics_every=numpy.int64(3), decay=numpy.float32(0.5), kl_clip=None)
    assert method == kfac_fx.KFAC(damping=1.0, statistics_every=3, decay=0.5, kl_clip=None)
    assert kfac_fx.Diagonal(inverse_every=0) == kfac_fx.Diagonal()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (kfac_fx.KFAC, {"kl_clip": 0.0}, "kl_clip=0.0): must be positive, or None"),
        (kfac_fx.Diagonal, {"kl_clip": -1.0}, "kl_clip=-1.0): must be positive, or None"),
        (kfac_fx.EKFAC, {"damping": float("nan")}, "damping=nan): must be finite and not negative"),
        (kfac_fx.FOOF, {"decay": 1.5}, "decay=1.5): must lie in [0, 1]"),
        (kfac_fx.FOOF, {"inverse_every": 0}, "inverse_every=0): must be a whole number of at least 1"),
        (kfac_fx.SINGD, {"inverse_every": 5}, "inverse_every=5): must be 0, since nothing is inverted"),
        (kfac_fx.NKFAC, {"decay": 1.0}, "decay=1.0): must lie in [0, 1)"),
        (kfac_fx.NKFAC, {"guard": ["spectral"]}, "guard=['spectral']): must be one of 'frobenius'"),
        (kfac_fx.KFAC, {"statistics_precision": "tf32"}, "statistics_precision='tf32'): must be 'full' or"),
        (kfac_fx.KFAC, {"damping_rule": 3}, "damping_rule=3): must be one of tikhonov"),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(
    kind: type[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}({message}")):
        kind(**settings)


@pytest.mark.parametrize("kind", [kfac_fx.KFAC, kfac_fx.KFC])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_momentum": False}, "model_momentum=False): needs quadratic_model=True"),
        ({"l2": 0.1}, "l2=0.1): needs quadratic_model=True"),
        ({"adaptive_damping": True}, "adaptive_damping=True): needs quadratic_model=True"),
        ({"adapt_every": 3}, "adapt_every=3): needs quadratic_model=True"),
        ({"adapt_rate": 0.5}, "adapt_rate=0.5): needs quadratic_model=True"),
        ({"damping_bounds": (0.1, 1.0)}, "damping_bounds=(0.1, 1.0)): needs quadratic_model=True"),
        ({"adaptive_gamma": True}, "adaptive_gamma=True): needs quadratic_model=True"),
        ({"gamma_every": 40}, "gamma_every=40): needs quadratic_model=True"),
        ({"quadratic_model": True, "kl_clip": 0.1}, "kl_clip=0.1): has no effect with quadratic_model=True"),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(
    kind: type[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}({message}")):
        kind(**settings)
    kind(quadratic_model=True, kl_clip=None, model_momentum=False)


def test_settings_that_a_method_of_ones_own_adds_are_checked_too() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(kfac_fx.KFAC):
        rounds: int = 3

    with pytest.raises(ValueError, match=r"^Own\(rounds=0\.5\): must be a whole number of at least 1\.$"):
        Own(rounds=0.5)  # type: ignore[arg-type]
    assert Own(rounds=2).rounds == 2
