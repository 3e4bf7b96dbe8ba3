"""The update by the quadratic model, with the damping that gives the best one.

Martens & Grosse 2015, sections 6.4 to 6.6 and 7 (arXiv:1503.05671); methods.md 2.6, 2.7, 1.8 C3. Enters: the
forward of a capture, gradients, the curvature and how it preconditions. Leaves: the update. Holds what lives
between steps: the strength of the damping and the last update.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx.canonical import gradient_names
from kfac_fx.contracts import DampedMethod, Method
from kfac_fx.curvature import Curvature, Rates
from kfac_fx.curvature import Snapshot as CurvatureSnapshot
from kfac_fx.errors import CaptureError, NonFiniteLossError, StateError
from kfac_fx.forward import Derivative, Forward, Vector
from kfac_fx.levenberg import Strength
from kfac_fx.planned import Plan
from kfac_fx.quadratic import combination, dot, gram, minimiser

Directions = list[dict[str, Tensor]]
Snapshot = tuple[Strength, dict[str, Tensor]]


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """Where the model is expanded.

    tensors: parameters, buffers (as they were before the step) and the batch, in the forward's order.
    """

    forward: Forward
    tensors: tuple[Tensor, ...]

    def derivative(self, direction: Vector) -> Derivative:
        """The derivative along a direction."""
        return self.forward.derivative(direction, self.tensors)

    def parameters(self, names: Vector) -> dict[str, Tensor]:
        """The parameters of these names."""
        at = dict(zip(self.forward.names, self.tensors, strict=False))
        return {name: at[name].detach() for name in names}


@final
@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What one damping of the factors leads to.

    gamma_squared: that damping. derivative: along the first direction. predicted: M(delta) - M(0), at most 0;
    infinite where the model is not finite. kept: how many inverses could not be renewed. curvature: with it.
    """

    gamma_squared: float
    directions: Directions
    derivative: Derivative
    coefficients: Tensor
    predicted: float
    kept: int
    curvature: CurvatureSnapshot

    @property
    def rank(self) -> tuple[bool, int, float]:
        """The smallest is the best."""
        return not math.isfinite(self.predicted), self.kept, self.predicted


@final
class QuadraticUpdate:
    """Updates delta = sum of coefficient times direction that minimise the quadratic model.

    Directions: the preconditioned negative gradient of the matched parameters, the plain negative gradient of
    the rest, and the last update. strength: lambda and gamma of the next step.
    """

    def __init__(self, method: DampedMethod, strength: Strength) -> None:
        self._method = method
        self._l2 = strength.settings.l2
        self._last: dict[str, Tensor] = {}
        self._checked: set[int] = set()
        self.strength = strength

    def update(
        self,
        plan: Plan,
        point: Point,
        gradients: Vector,
        *,
        curvature: Curvature,
        refresh: bool,
        rates: Rates,
        step: int,
    ) -> dict[str, Tensor]:
        """Delta; adapts gamma and lambda when due. Changes no parameter.

        gradients: of the loss, all parameters. refresh: whether new inverses are due. step: number of earlier
        updates.
        """
        gradients = self._objective_gradients(gradients, point)
        others = self._other_directions(gradients, gradient_names(plan))
        known = [point.derivative(direction) for direction in others]
        before, best = curvature.snapshot(), None
        for gamma_squared in self.strength.candidates(step):
            curvature.restore(before)
            damped = replace(plan, method=self._method.damped(gamma_squared))
            if refresh:
                curvature.refresh(damped.method)
            preconditioned = curvature.preconditioned(damped, gradients, rates=rates)
            first = [{name: -tensor for name, tensor in preconditioned.items()}] if preconditioned else []
            derivatives = [*map(point.derivative, first), *known]
            trial = self._trial(gamma_squared, curvature, gradients, [*first, *others], derivatives)
            best = trial if best is None or trial.rank < best.rank else best
        assert best is not None
        curvature.restore(best.curvature)
        return self._accepted(best, point, gradients, step)

    def _accepted(self, trial: _Trial, point: Point, gradients: Vector, step: int) -> dict[str, Tensor]:
        """The update of this trial; adapts lambda when due."""
        if not math.isfinite(trial.predicted):
            raise NonFiniteLossError(
                "the quadratic model of this step is infinite or not a number: nothing was changed. "
                "Skip this batch, or raise the damping."
            )
        self._check_slope(point, gradients, trial.directions[0], trial.derivative)
        delta = combination(trial.coefficients.tolist(), trial.directions)
        self.strength = self.strength.chosen(trial.gamma_squared)
        if self.strength.adapts_after(step):
            change = self._change(point, trial.derivative.loss, delta)
            self.strength = self.strength.adapted(change, trial.predicted)
        if self.strength.settings.momentum:
            self._last = delta
        return delta

    def _objective_gradients(self, gradients: Vector, point: Point) -> dict[str, Tensor]:
        """Gradients of `loss + eta/2 |theta|^2`."""
        if not self._l2:
            return dict(gradients)
        parameters = point.parameters(gradients)
        return {name: gradient + self._l2 * parameters[name] for name, gradient in gradients.items()}

    def _other_directions(self, gradients: Vector, matched: Collection[str]) -> Directions:
        """Those without a preconditioner, where not empty."""
        rest = {name: -gradient for name, gradient in gradients.items() if name not in matched}
        last = {name: tensor.to(gradients[name]) for name, tensor in self._last.items() if name in gradients}
        return [direction for direction in (rest, last) if direction]

    def _trial(
        self,
        gamma_squared: float,
        curvature: Curvature,
        gradients: Vector,
        directions: Directions,
        derivatives: list[Derivative],
    ) -> _Trial:
        """The minimiser of the model in the span of these directions."""
        model = gram(derivatives, directions, damping=self.strength.of_model)
        slopes = torch.stack([dot(gradients, direction) for direction in directions])
        read = torch.cat([model, slopes[None]]).cpu()  # in one read; what follows of K numbers runs there
        model, slopes = read[:-1], read[-1]
        coefficients, predicted = torch.zeros_like(slopes), math.inf
        if bool(torch.isfinite(model).all() & torch.isfinite(slopes).all()):
            precision = torch.finfo(derivatives[0].roots[0].dtype).eps
            coefficients = minimiser(model, slopes, precision=precision)
            predicted = 0.5 * float(slopes @ coefficients)
        return _Trial(
            gamma_squared=gamma_squared,
            directions=directions,
            derivative=derivatives[0],
            coefficients=coefficients,
            predicted=predicted,
            kept=int(curvature.kept_last),
            curvature=curvature.snapshot(),
        )

    def _check_slope(
        self, point: Point, gradients: Vector, direction: Vector, derivative: Derivative
    ) -> None:
        """Once per capture: the forward-mode derivative of the loss is that of the backward pass.

        They differ where the model replaces gradients, which the captured forward does not show.
        """
        if id(point.forward) in self._checked:
            return
        penalty = self._l2 * float(dot(point.parameters(direction), direction))
        forward, backward = float(derivative.slope), float(dot(gradients, direction)) - penalty
        size = math.sqrt(float(dot(gradients, gradients)) * float(dot(direction, direction)))
        if abs(forward - backward) > 0.05 * max(abs(forward), abs(backward)) + 1e-4 * size:
            raise CaptureError(
                f"the loss changes at rate {forward:.4g} along the update by the model's forward, but at "
                f"{backward:.4g} by its backward: the model stops or replaces gradients (.detach(), no_grad, "
                "a custom autograd.Function), so quadratic_model=True cannot model it. "
                "Use quadratic_model=False."
            )
        self._checked.add(id(point.forward))

    def _change(self, point: Point, loss: Tensor, delta: Vector) -> float:
        """Of the objective by the update. loss: before it."""
        before = point.parameters(delta)
        after = {name: tensor + delta[name] for name, tensor in before.items()}
        change = float(point.forward.loss(after, point.tensors)) - float(loss)
        if self._l2:
            change += self._l2 * float(dot(before, delta) + 0.5 * dot(delta, delta))
        return change

    def snapshot(self) -> Snapshot:
        """What `restore` needs."""
        return self.strength, self._last

    def restore(self, snapshot: Snapshot) -> None:
        """Back to the state of `snapshot`."""
        self.strength, self._last = snapshot

    def state_dict(self) -> dict[str, Any]:
        """Lambda, gamma^2 where it is adapted, and the last update."""
        return {**self.strength.state_dict(), "last_update": dict(self._last)}

    def check_state(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Raise `StateError` if a step's saved state lacks this one, or has it of another model."""
        if "quadratic" not in state:
            raise StateError(
                "the saved state has no quadratic model: it was saved by a method with quadratic_model=False."
            )
        self.strength.loaded(state["quadratic"])
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, tensor in state["quadratic"]["last_update"].items():
            if shapes.get(name) != tensor.shape:
                raise StateError(
                    f"the saved last update of {name}, {tuple(tensor.shape)}, fits no parameter."
                )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.strength, self._last = self.strength.loaded(saved), dict(saved["last_update"])


def quadratic_update(method: Method) -> QuadraticUpdate | None:
    """The state of a method's quadratic model; None if it has none."""
    if not isinstance(method, DampedMethod) or method.quadratic is None:
        return None
    return QuadraticUpdate(method, Strength.initial(method.damping, method.quadratic))
