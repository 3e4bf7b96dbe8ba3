"""Writes a plan into the captured graph, pass by pass.

Enters: a `Plan`. Leaves: `Program`s, one fx graph per variant, whose mathematics is ordinary torch functions
traced and spliced beside the weight gradients they belong to. Loss and gradients stay the nodes that were
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, final

from torch.fx import GraphModule

from kfac_fx import stages
from kfac_fx.collect import write_averages, write_guard, write_statistics
from kfac_fx.directions import write_lengths, write_precondition, write_products
from kfac_fx.draft import Draft
from kfac_fx.planned import Plan
from kfac_fx.stages import PassRecord
from kfac_fx.writer import Key

Variant = Literal["plain", "statistics", "gradients", "batch_statistics"]
VARIANTS: tuple[Variant, ...] = ("plain", "statistics", "gradients", "batch_statistics")
WRITES: Mapping[Variant, tuple[str, ...]] = {
    "plain": ("precondition", "lengths", "products"),
    "statistics": ("statistics", "averages", "precondition", "lengths", "products"),
    "gradients": (),
    "batch_statistics": ("statistics",),
}
OnPass = Callable[[str, PassRecord | None, GraphModule], None]
T = TypeVar("T")


@final
@dataclass(frozen=True, kw_only=True)
class Returned(Generic[T]):
    """What a program returns, by what it is: tensors, or their nodes. products: None if it has none."""

    loss: T
    inverse_scale: T
    check: T
    gradients: dict[str, T]
    state: dict[Key, T]
    products: T | None


@final
@dataclass(frozen=True, kw_only=True)
class Program:
    """One variant of the training step.

    module: placeholders are those of the capture, then `state_inputs` in order, then `weights` ([layers],
    share of the new batch in the moving averages) and `learning_rates` ([layers]) where the variant uses
    them. Outputs: loss, 1/R_, a check (finite if all gradients are), gradients in the order of `gradients`,
    new tensors in the order of `state_outputs`, then <V, grad> of each layer if `has_products`.
    """

    variant: Variant
    module: GraphModule
    state_inputs: tuple[Key, ...]
    state_outputs: tuple[Key, ...]
    gradients: tuple[str, ...]
    has_weight: bool
    has_rates: bool
    has_products: bool

    def returned(self, outputs: Sequence[T]) -> Returned[T]:
        """The outputs, in their order, by what they are."""
        loss, inverse_scale, check, *rest = outputs
        products = rest.pop() if self.has_products else None
        first = len(self.gradients)
        return Returned(
            loss=loss,
            inverse_scale=inverse_scale,
            check=check,
            gradients=dict(zip(self.gradients, rest[:first], strict=True)),
            state=dict(zip(self.state_outputs, rest[first:], strict=True)),
            products=products,
        )


def instrument(
    plan: Plan,
    variant: Variant,
    *,
    sizes: Mapping[Key, Sequence[int]] | None = None,
    layers: Collection[str] | None = None,
    on_pass: OnPass | None = None,
) -> Program:
    """Write one variant, without the passes that are off in the plan.

    sizes: shapes of state tensors that are not those of `Method.init` (thin factors that have grown). layers:
    keys of those whose statistics are collected, with all that share a tensor with them; None for all.
    on_pass: called with the name of a pass, its record and the graph as it leaves it: as captured
    ("capture"), with labels ("match"), and for each pass that writes. Nodes keep their names throughout.

    plain: forward, backward, precondition. statistics: the same plus the moving averages of the factors.
    gradients: forward and backward alone. batch_statistics: forward, backward and this batch's statistics,
    not yet averaged (for accumulation).
    """
    collects = "statistics" in WRITES[variant] and stages.runs("statistics", plan.without)
    chosen = [match.key for match in plan.matched] if layers is None else layers
    only_batch = variant == "batch_statistics"
    draft = Draft(plan, sizes or {}, collects=collects, only_batch=only_batch, layers=chosen)

    def show(name: str, record: PassRecord | None) -> None:
        if on_pass is not None:
            on_pass(name, record, draft.shown())

    show("capture", None)
    draft.writer.label_matches()
    show("match", None)
    for name in ("guard", *WRITES[variant], "cleanup"):
        if not stages.runs(name, plan.without):
            stages.note_off(name, variant)
            continue
        draft.writer.begin(name)
        with stages.running(name, draft) as running:
            done = _WRITING[name](draft)
            running.did = f"{variant}: {done}"
        show(name, running.record)
    return _written(draft, variant)


def _written(draft: Draft, variant: Variant) -> Program:
    """The finished program."""
    return Program(
        variant=variant,
        module=draft.writer.module,
        state_inputs=draft.read,
        state_outputs=tuple(draft.state_outputs),
        gradients=tuple(draft.gradients),
        has_weight=draft.weight is not None,
        has_rates=draft.rates is not None,
        has_products=draft.products is not None,
    )


def _clean(draft: Draft) -> str:
    """Drop what nobody reads, and let views copy where strides differ."""
    before = len(draft)
    draft.finish()
    return f"{before - len(draft)} nodes dropped, {len(draft.read)} state tensors are read"


_Writing = Callable[[Draft], str]
_WRITING: Mapping[str, _Writing] = {
    "guard": write_guard,
    "statistics": write_statistics,
    "averages": write_averages,
    "precondition": write_precondition,
    "lengths": write_lengths,
    "products": write_products,
    "cleanup": _clean,
}
