"""Errors for users and the stable reason codes of skipped parameters.

Every error is a `ValueError` that names what is wrong, where, and what to do. Broken invariants of this
library are `assert` statements instead.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class KfacFxError(ValueError):
    """Base of every error that this library raises for its users."""


class CaptureError(KfacFxError):
    """The model, its loss or its backward pass cannot be written as one graph."""


class LossError(KfacFxError):
    """The loss is not a scalar, not differentiable, or of a kind that the chosen Fisher does not cover."""


class NonFiniteLossError(KfacFxError):
    """Loss or gradients are infinite or not a number: of this step, and nothing was changed; on CUDA of an
    earlier one, whose gradients counted as zero, so that no step waits for the device.
    """


class ModelChangedError(KfacFxError):
    """The model's parameters or buffers are not those that were compiled."""


class OptimizerMismatchError(KfacFxError):
    """The optimizer does not hold exactly the model's trainable parameters."""


class InputError(KfacFxError):
    """Inputs or targets are on another device or of another dtype than the model needs."""


class UnsupportedModelError(KfacFxError):
    """`strict=True` and some parameters cannot be preconditioned; or a setting that their dtype rules out."""


class UnknownNameError(KfacFxError):
    """A name (method, backend, option, parameter pattern) that does not exist."""


class StateError(KfacFxError):
    """A saved state does not belong to this model, method or optimizer."""


class ExportError(KfacFxError):
    """A training step that cannot be written as a file of its own."""


class ExportWarning(UserWarning):
    """A file of the folder of `transform` could not be made; the others were. file: its name."""

    def __init__(self, message: str, *, file: str) -> None:
        super().__init__(message)
        self.file = file


class TargetError(KfacFxError):
    """A command line TARGET that cannot be loaded."""


@enum.unique
class Reason(enum.Enum):
    """Why a parameter is left to the base optimizer with its plain gradient.

    The value is the stable code that reports print; `advice` says what the user can do about it.
    """

    TIED = "tied"
    FROZEN = "frozen"
    UNUSED = "unused"
    EXCLUDED = "excluded"
    ELEMENTWISE_SCALE = "elementwise-scale"
    BROADCAST_ADD = "broadcast-add"
    EMBEDDING = "embedding"
    MIXED_USE = "mixed-use"
    REPARAMETRISED = "reparametrised"
    BATCH_FREE = "batch-free"
    OUTSIDE_FISHER = "outside-fisher"
    COMPLEX_DTYPE = "complex-dtype"
    TOO_LARGE = "too-large"
    METHOD = "method"
    NO_PATTERN = "no-pattern"

    @property
    def advice(self) -> str:
        """What the user can do so that the parameter is preconditioned, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Reason.TIED: "its uses have factors that cannot be added; untie it to precondition each use",
    Reason.FROZEN: "set requires_grad=True to train it",
    Reason.UNUSED: "the loss does not depend on it; remove it or use it",
    Reason.EXCLUDED: "remove the pattern from exclude= to precondition it",
    Reason.ELEMENTWISE_SCALE: "its product is not summed over examples; apply the scale to activations",
    Reason.BROADCAST_ADD: "it is added without one gradient per example; the plain gradient is usual",
    Reason.EMBEDDING: "use scale_grad_by_freq=False and a dense gradient",
    Reason.MIXED_USE: "use it only in products with activations, or split it into two parameters",
    Reason.REPARAMETRISED: "the layer reads a function of it; remove the reparametrisation",
    Reason.BATCH_FREE: "its layer's input does not depend on the batch; the plain gradient is usual",
    Reason.OUTSIDE_FISHER: "the loss depends on it but not the prediction; use fisher='empirical'",
    Reason.COMPLEX_DTYPE: "use real and imaginary parts as two real parameters",
    Reason.TOO_LARGE: "raise max_factor_dim of the method if memory allows",
    Reason.METHOD: "the method has no curvature for this layer; `kfac-fx methods` lists others",
    Reason.NO_PATTERN: "no layer kind knows this operation; a new file in kfac_fx/layers adds it",
}


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that lists `choices` and, if one is near `name`, proposes it."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known)}."


def check_choice(parameter: str, value: str, choices: Iterable[str]) -> None:
    """Raise `UnknownNameError` if `value` is not one of `choices`; the message names `parameter`."""
    known = tuple(choices)
    if value not in known:
        raise UnknownNameError(f"{parameter}={value!r} does not exist.{did_you_mean(value, known)}")
