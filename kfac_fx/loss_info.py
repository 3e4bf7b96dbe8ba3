"""What a capture says about the loss of its step.

Enters: the recorded calls (`loss.LossCall`), the batch size. Leaves: `LossInfo`. No graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kfac_fx.errors import LossError
from kfac_fx.loss import LossCall
from kfac_fx.traced import LossInfo
from kfac_fx.types import Fisher
from kfac_fx.wording import counted


def loss_info(calls: Sequence[LossCall], *, examples: int, covered: bool, chosen: bool) -> LossInfo:
    """Kind, reduction and sizes of the loss.

    covered: it depends on trainable parameters through these calls alone. chosen: by this library, from the
    model's output and targets.
    """
    if not calls:
        return LossInfo(
            kind="unknown",
            reduction="unknown",
            examples=examples,
            terms=1,
            unit=1.0,
            ignores=False,
            note=f"unknown loss, taken as a mean over the {counted(examples, 'example')} of the batch",
        )
    terms = [_terms(call, examples) for call in calls]
    note = _note(calls, terms, examples)
    if chosen:
        note += ", chosen by the model's output and targets"
    if not covered:
        note += ", with further terms"
    return LossInfo(
        kind=_common([call.kind for call in calls]),
        reduction=_common([call.reduction for call in calls]),
        examples=examples,
        terms=max(terms),
        unit=sum(1.0 / call.factor for call in calls) / len(calls),
        ignores=any(call.can_ignore and own > 1 for call, own in zip(calls, terms, strict=True)),
        note=note,
    )


def check_fisher(calls: Sequence[LossCall], fisher: Fisher, *, covered: bool) -> None:
    """Raise `LossError` unless the Fisher can be had of a loss of these calls."""
    if fisher != "empirical" and not covered:
        raise LossError(
            f"fisher={fisher!r} needs a loss made of cross-entropy, mean squared error or BCE-with-logits "
            f"calls alone, but this loss has {'other terms beside them' if calls else 'none of them'}. "
            "fisher='empirical' works with every loss."
        )


def _terms(call: LossCall, examples: int) -> int:
    count = call.num_terms  # not a plain number if the loss selects rows by their values
    return max(1, count // examples) if isinstance(count, int) else 1


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else "several"


def _note(calls: Sequence[LossCall], terms: Sequence[int], examples: int) -> str:
    """`cross_entropy (mean) + 2 x mse (sum), 4 examples x 1 term`."""
    alike = len(set(terms)) == 1
    names = Counter(
        f"{call.kind} ({call.reduction}{'' if alike else ', ' + counted(own, 'term')})"
        for call, own in zip(calls, terms, strict=True)
    )
    told = " + ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return f"{told}, {counted(examples, 'example')}" + (f" x {counted(terms[0], 'term')}" if alike else "")
