"""The update by the quadratic model, and the damping that follows how well the model predicts.

Martens & Grosse 2015, sections 6.4, 6.5 and 7 (arXiv:1503.05671); methods.md 2.6, 2.7, 1.8 C3. Enters: the
forward of a capture, gradients and preconditioned directions. Leaves: the update. Holds what lives between
steps: lambda and the last update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx.contracts import DampedMethod, Method
from kfac_fx.errors import CaptureError, NonFiniteLossError, OptimizerMismatchError, StateError
from kfac_fx.forward import Derivative, Forward, Vector
from kfac_fx.quadratic import combination, dot, gram, minimiser
from kfac_fx.types import QuadraticSettings

Snapshot = tuple[float, dict[str, Tensor], float | None]


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """Where the model is expanded.

    tensors: parameters, buffers (as they were before the step) and the batch, in the forward's order.
    """

    forward: Forward
    tensors: tuple[Tensor, ...]

    def parameters(self, names: Vector) -> dict[str, Tensor]:
        """The parameters of these names."""
        at = dict(zip(self.forward.names, self.tensors, strict=False))
        return {name: at[name].detach() for name in names}


@final
class QuadraticUpdate:
    """Updates delta = sum of coefficient times direction that minimise the quadratic model.

    Directions: the preconditioned negative gradient of the matched parameters, the plain negative gradient of
    the rest, and the last update. damping: lambda now. ratio: the last reduction ratio rho, None before the
    first adaptation.
    """

    def __init__(self, method: DampedMethod, settings: QuadraticSettings) -> None:
        self._method = method
        self._settings = settings
        self._last: dict[str, Tensor] = {}
        self._checked: set[int] = set()
        self.damping = float(method.damping)
        self.ratio: float | None = None

    @property
    def method(self) -> Method:
        """The method, damped as now."""
        return self._method.damped(self.damping)

    def objective_gradients(self, gradients: Vector, parameters: Vector) -> dict[str, Tensor]:
        """Gradients of `loss + eta/2 |theta|^2`."""
        eta = self._settings.l2
        if not eta:
            return dict(gradients)
        return {name: gradient + eta * parameters[name].detach() for name, gradient in gradients.items()}

    def update(
        self, point: Point, gradients: Vector, preconditioned: Vector, *, step: int
    ) -> dict[str, Tensor]:
        """Delta; adapts the damping when due. Changes no parameter.

        gradients: of the objective, all parameters. preconditioned: those of matched parameters. step: number
        of earlier updates.
        """
        directions = self._directions(gradients, preconditioned)
        derivatives = [point.forward.derivative(direction, point.tensors) for direction in directions]
        damping = self.damping + self._settings.l2
        curvature = gram(derivatives, directions, damping=damping)
        slopes = torch.stack([dot(gradients, direction) for direction in directions]).cpu()
        if not bool(torch.isfinite(curvature).all() & torch.isfinite(slopes).all()):
            raise NonFiniteLossError(
                "the quadratic model of this step is infinite or not a number: nothing was changed. "
                "Skip this batch, or raise the damping."
            )
        self._check_slope(point, gradients, directions[0], derivatives[0], float(slopes[0]))
        precision = torch.finfo(derivatives[0].roots[0].dtype).eps
        coefficients = minimiser(curvature, slopes, precision=precision)
        delta = combination(coefficients.tolist(), directions)
        every = self._settings.adapt_every
        if every and (step + 1) % every == 0:
            self._adapt(point, derivatives[0].loss, delta, 0.5 * float(slopes @ coefficients))
        if self._settings.momentum:
            self._last = delta
        return delta

    def _directions(self, gradients: Vector, preconditioned: Vector) -> list[dict[str, Tensor]]:
        """Those that are not empty."""
        matched = {name: -direction for name, direction in preconditioned.items()}
        rest = {name: -gradient for name, gradient in gradients.items() if name not in preconditioned}
        last = {name: tensor.to(gradients[name]) for name, tensor in self._last.items() if name in gradients}
        return [direction for direction in (matched, rest, last) if direction]

    def _check_slope(
        self, point: Point, gradients: Vector, direction: Vector, derivative: Derivative, slope: float
    ) -> None:
        """Once per capture: the forward-mode derivative of the loss is that of the backward pass.

        They differ where the model replaces gradients, which the captured forward does not show.
        """
        if id(point.forward) in self._checked:
            return
        penalty = self._settings.l2 * float(dot(point.parameters(direction), direction))
        forward, backward = float(derivative.slope), slope - penalty
        size = math.sqrt(float(dot(gradients, gradients)) * float(dot(direction, direction)))
        if abs(forward - backward) > 0.05 * max(abs(forward), abs(backward)) + 1e-4 * size:
            raise CaptureError(
                f"the loss changes at rate {forward:.4g} along the update by the model's forward, but at "
                f"{backward:.4g} by its backward: the model stops or replaces gradients (.detach(), no_grad, "
                "a custom autograd.Function), so quadratic_model=True cannot model it. "
                "Use quadratic_model=False."
            )
        self._checked.add(id(point.forward))

    def _adapt(self, point: Point, loss: Tensor, delta: Vector, predicted: float) -> None:
        """Levenberg-Marquardt: less damping where the model predicts well, more where it does not.

        predicted: M(delta) - M(0), at most 0.
        """
        before = point.parameters(delta)
        after = {name: tensor + delta[name] for name, tensor in before.items()}
        change = float(point.forward.loss(after, point.tensors)) - float(loss)
        if self._settings.l2:
            change += self._settings.l2 * float(dot(before, delta) + 0.5 * dot(delta, delta))
        if predicted >= 0:
            return
        ratio = change / predicted
        factor = self._settings.adapt_factor
        if ratio > 0.75:
            self.damping *= factor
        elif not ratio >= 0.25:  # also where the new loss is not a number
            self.damping /= factor
        least, largest = self._settings.damping_bounds
        self.damping = min(max(self.damping, least), largest)
        self.ratio = ratio

    def snapshot(self) -> Snapshot:
        """What `restore` needs."""
        return self.damping, self._last, self.ratio

    def restore(self, snapshot: Snapshot) -> None:
        """Back to the state of `snapshot`."""
        self.damping, self._last, self.ratio = snapshot

    def state_dict(self) -> dict[str, Any]:
        """Lambda and the last update."""
        return {"damping": self.damping, "last_update": dict(self._last)}

    def check_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Raise `StateError` if a step's saved state lacks this one, or has it of another model."""
        if "quadratic" not in state:
            raise StateError(
                "the saved state has no quadratic model: it was saved by a method with quadratic_model=False."
            )
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, tensor in state["quadratic"]["last_update"].items():
            if shapes.get(name) != tensor.shape:
                raise StateError(
                    f"the saved last update of {name}, {tuple(tensor.shape)}, fits no parameter."
                )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.damping, self._last = float(saved["damping"]), dict(saved["last_update"])
        self.ratio = None


def quadratic_update(method: Method) -> QuadraticUpdate | None:
    """The state of a method's quadratic model; None if it has none."""
    if not isinstance(method, DampedMethod) or method.quadratic is None:
        return None
    return QuadraticUpdate(method, method.quadratic)


def check_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptimizerMismatchError` unless the optimizer adds the update as it is."""
    wanted = {"lr": 1, "momentum": 0, "weight_decay": 0, "maximize": False}
    wrong = [
        f"{name}={float(group[name]):g}"
        for group in optimizer.param_groups
        for name, value in wanted.items()
        if name in group and float(group[name]) != value
    ]
    if type(optimizer) is torch.optim.SGD and not wrong:
        return
    found = f"{type(optimizer).__name__}({', '.join(dict.fromkeys(wrong))})"
    raise OptimizerMismatchError(
        f"quadratic_model=True computes the whole update, its length and its momentum, but the optimizer is "
        f"{found}. Use optimizer=None or torch.optim.SGD(parameters, lr=1.0) without momentum, weight decay "
        "and schedule; for a penalty eta/2 |theta|^2 pass l2=eta to the method."
    )
