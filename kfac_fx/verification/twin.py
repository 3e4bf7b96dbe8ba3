"""Copies of the user's model and batch, so that nothing of theirs is run or changed.

Enters: model, loss, batch. Leaves: a `Subject` in float64 where the model runs in it, else in its own dtype.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx import guards
from kfac_fx.batch import Batch, call_model, default_loss, flatten_batch
from kfac_fx.graph import tree_map
from kfac_fx.types import LossFn

SEED = 20_150_319  # any; each run on a subject starts from it


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is verified. model: a copy that is never run; `fresh` makes the copies that are.

    note: why this dtype.
    """

    model: nn.Module
    loss_fn: LossFn | None
    inputs: Any
    targets: Any
    dtype: torch.dtype
    note: str

    def fresh(self) -> nn.Module:
        """A copy to run."""
        return copy.deepcopy(self.model)

    @property
    def batch(self) -> Batch:
        """The batch as flat tensors."""
        return flatten_batch(self.inputs, self.targets)

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of `model` on the batch, as PyTorch runs it."""
        inputs, targets = tree_map(_cloned, (self.inputs, self.targets))
        with torch.enable_grad():
            return (self.loss_fn or default_loss)(call_model(model, inputs), targets)


@contextlib.contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Inside, torch's generators start from one seed; outside they are as before."""
    device = guards.model_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        yield


def subject_of(
    model: nn.Module, loss_fn: LossFn | None, inputs: Any, targets: Any, *, float64: bool
) -> Subject:
    """Copies of all, cast to float64 if that is wanted and the model runs in it."""
    own = _copied(model, loss_fn, inputs, targets)
    if not float64:
        return _subject(own, note="as asked")
    if _dtype(own[0]) == torch.float64:
        return _subject(own, note="the model's own")
    wide = _subject(tree_map(_widened, _copied(model, loss_fn, inputs, targets)), note="a copy, cast")
    try:
        with seeded(wide.model):
            wide.loss(wide.fresh())
    except Exception as error:  # whatever a model does that knows one dtype alone
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _subject(own, note=f"the model's own, since it does not run in float64: {first}")
    return wide


def _subject(parts: tuple[Any, Any, Any, Any], *, note: str) -> Subject:
    model, loss_fn, inputs, targets = parts
    return Subject(
        model=model, loss_fn=loss_fn, inputs=inputs, targets=targets, dtype=_dtype(model), note=note
    )


def _copied(
    model: nn.Module, loss_fn: LossFn | None, inputs: Any, targets: Any
) -> tuple[nn.Module, LossFn | None, Any, Any]:
    twin = guards.copied(model, "verify")
    own_loss = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    inputs, targets = tree_map(_cloned, (inputs, targets))
    return twin, own_loss, inputs, targets


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the parameters; of several the least precise one."""
    found = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    order = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((dtype for dtype in order if dtype in found), torch.float32)


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, nn.Module):
        return leaf.double()
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
