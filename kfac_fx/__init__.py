"""A compiler pass that turns any PyTorch model into a compiled second-order training step.

`compile` for training, `inspect` to see what it would do, `verify` to check that, `methods` for the names.
See README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kfac_fx import errors as errors
from kfac_fx import guards as _guards
from kfac_fx.batch import flatten_batch as _flatten_batch
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError as KfacFxError
from kfac_fx.errors import NonFiniteLossError as NonFiniteLossError
from kfac_fx.errors import Reason as Reason
from kfac_fx.errors import check_choice as _check_choice
from kfac_fx.methods import EKFAC as EKFAC
from kfac_fx.methods import FOOF as FOOF
from kfac_fx.methods import IKFAC as IKFAC
from kfac_fx.methods import KFAC as KFAC
from kfac_fx.methods import KFC as KFC
from kfac_fx.methods import METHODS as _METHODS
from kfac_fx.methods import NKFAC as NKFAC
from kfac_fx.methods import SINGD as SINGD
from kfac_fx.methods import SKFAC as SKFAC
from kfac_fx.methods import AdaNKFAC as AdaNKFAC
from kfac_fx.methods import Diagonal as Diagonal
from kfac_fx.methods import resolve as _resolve
from kfac_fx.planned import Plan as Plan
from kfac_fx.schedule import Refresh
from kfac_fx.stages import SWITCHABLE_PASSES as SWITCHABLE_PASSES
from kfac_fx.stages import log_as_asked as _log_as_asked
from kfac_fx.stages import switched_off as _switched_off
from kfac_fx.stages import without_passes as without_passes
from kfac_fx.step import TrainStep as TrainStep
from kfac_fx.trace import trace as _trace
from kfac_fx.types import Fisher, LossFn, Sharing
from kfac_fx.verification import Verification as Verification
from kfac_fx.verification import verify as verify

__version__ = "0.1.0"

_log_as_asked()


def methods() -> tuple[str, ...]:
    """Names of the methods."""
    return tuple(_METHODS)


def compile(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    *,
    method: str | Method = "kfac",
    optimizer: torch.optim.Optimizer | None = None,
    fisher: Fisher = "empirical",
    sharing: Sharing = "expand",
    exclude: Sequence[str] = (),
    backend: str = "auto",
    strict: bool = False,
    refresh: Refresh = "together",
) -> TrainStep:
    """A training step `step(inputs, targets) -> loss` with preconditioned gradients. Tracing happens at its
    first call.

    Args:
        model: any module. Batches of other shapes, train and eval mode are captured as they come.
        loss_fn: `loss_fn(outputs, targets)`, a scalar. None: the model's own loss, else cross-entropy for
            integer targets and mean squared error for floating ones; the plan says which.
        method: a name of `methods()`, or an instance such as `KFAC(damping=0.01)`.
        optimizer: any torch optimizer over exactly the model's trainable parameters; it receives
            preconditioned gradients. None: the method's published base optimizer.
        fisher: "empirical" (gradients of the loss itself, free), "mc" (labels drawn from the prediction, one
            more backward) or "type2" (exact, one more backward per class and loss term).
        sharing: "expand" (positions are examples) or "reduce" (within an example, inputs are averaged and
            output gradients summed over positions).
        exclude: patterns (fnmatch) of parameter names to leave to the optimizer.
        backend: "eager", "inductor" (on CUDA with CUDA graphs), "inductor-no-cudagraphs", or "auto" (inductor
            on CUDA, eager elsewhere).
        strict: raise `UnsupportedModelError` if any trainable parameter cannot be preconditioned.
        refresh: "together" (all inverses every `inverse_every` steps, as published) or "staggered" (each
            layer's once in `inverse_every` steps too, but some at a time, from the statistics of earlier
            steps, so that no step stalls). Layers without any are always refreshed at once.

    Raises:
        KfacFxError: of the kind that names the problem (all are `ValueError`s).
    """
    patterns = _check_options(model, fisher, sharing, exclude)
    _check_choice("refresh", refresh, ("together", "staggered"))
    return TrainStep(
        model,
        loss_fn,
        method=_resolve(method),
        optimizer=optimizer,
        fisher=fisher,
        sharing=sharing,
        exclude=patterns,
        backend=backend,
        strict=strict,
        refresh=refresh,
        without=_switched_off(),
    )


def inspect(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    inputs: Any = None,
    targets: Any = None,
    *,
    method: str | Method = "kfac",
    fisher: Fisher = "empirical",
    sharing: Sharing = "expand",
    exclude: Sequence[str] = (),
    strict: bool = False,
) -> Plan:
    """What `compile` would do with this model and a batch of these shapes; read-only.

    `print(plan)` is the report.
    """
    patterns = _check_options(model, fisher, sharing, exclude)
    batch = _flatten_batch(inputs, targets)
    _guards.check_batch(batch, model)
    return _trace(
        model,
        loss_fn,
        batch,
        method=_resolve(method),
        fisher=fisher,
        sharing=sharing,
        exclude=patterns,
        strict=strict,
        without=_switched_off(),
    )


def _check_options(model: nn.Module, fisher: str, sharing: str, exclude: Sequence[str]) -> tuple[str, ...]:
    _check_choice("fisher", fisher, ("empirical", "mc", "type2"))
    _check_choice("sharing", sharing, ("expand", "reduce"))
    _guards.check_sized(model)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    _guards.check_exclude(patterns, model)
    return patterns
