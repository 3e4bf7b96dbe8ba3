"""Other curvature libraries as contenders, by their public interfaces: `singd`, and K-FAC of `asdfghjkl`.

Both collect statistics by module hooks, for the layers that they know; singd leaves the parameters of all
other layers as they are. Schedule and settings are those of this library's method of the same kind.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import nn

from kfac_fx.batch import call_model, default_loss
from kfac_fx.bench.contender import FIRST_ORDER, LEARNING_RATE, Data, kinds_of, training_loss


@final
class Peer:
    """A step of another library, which decides what is due by a count of steps that `run` sets."""

    def __init__(self, run: Callable[[int], None], *, statistics_every: int, inverse_every: int) -> None:
        def due(index: int) -> tuple[bool, bool]:
            return index % statistics_every == 0, inverse_every > 0 and index % inverse_every == 0

        self._run = run
        self.every: tuple[int, int] | None = (statistics_every, inverse_every)
        self.kinds: Mapping[str, Sequence[int]] = kinds_of(
            due, math.lcm(statistics_every, max(1, inverse_every))
        )
        run(0)

    def run(self, index: int) -> None:
        """One step."""
        self._run(index)

    def parts(self) -> Mapping[str, Callable[[], Any]]:
        """None: the hooks run inside forward and backward."""
        return {}

    def tensors(self) -> None:
        """Not known."""


def singd(model: nn.Module, data: Data, method: Any) -> Peer:
    """The package `singd`, with dense roots. Raises `ImportError` without it."""
    optimizer = importlib.import_module("singd.optim.optimizer").SINGD(
        model,
        lr=LEARNING_RATE,
        damping=method.damping,
        alpha1=method.alpha1,
        lr_cov=method.lr_cov,
        normalize_lr_cov=method.normalize_lr_cov,
        T=method.statistics_every,
        warn_unsupported=False,
    )
    loss = training_loss(model, data[0])

    def run(index: int) -> None:
        optimizer.steps = index - 1 + 2 * method.statistics_every  # the first steps are special
        optimizer.set_current_grad_scale(1.0)  # that of the step before, which the hooks ask for
        optimizer.steps += 1
        loss(*data[1:]).backward()
        optimizer.step()
        model.zero_grad()

    return Peer(run, statistics_every=method.statistics_every, inverse_every=0)


def asdfghjkl(model: nn.Module, data: Data, method: Any) -> Peer:
    """The empirical K-FAC of the package `asdfghjkl`. Raises `ImportError` without it."""
    library, (loss_fn, inputs, targets) = importlib.import_module("asdl.precondition"), data
    config = library.PreconditioningConfig(
        data_size=len(targets),
        damping=method.damping,
        ema_decay=1 - method.decay,
        curvature_upd_interval=method.statistics_every,
        preconditioner_upd_interval=method.inverse_every,
    )
    maker = library.KfacGradientMaker(model, config, fisher_type="fisher_emp")
    optimizer = FIRST_ORDER["sgd"]([p for p in model.parameters() if p.requires_grad])

    def run(index: int) -> None:
        maker.load_state_dict({"step": index})
        outputs = maker.setup_model_call(call_model, model, inputs)
        maker.setup_loss_call(loss_fn or default_loss, outputs, targets)
        maker.forward_and_backward()
        optimizer.step()
        optimizer.zero_grad()

    return Peer(run, statistics_every=method.statistics_every, inverse_every=method.inverse_every)
