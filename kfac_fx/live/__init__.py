"""How a training step is doing: losses, damping, the factors' conditions, residuals, counts, times.

Enters: what a step keeps. Leaves: a frozen `StepReport`. Changes nothing of the training.
"""

from kfac_fx.live.health import FactorHealth as FactorHealth
from kfac_fx.live.health import LayerHealth as LayerHealth
from kfac_fx.live.journal import PROGRAM_PHASES as PROGRAM_PHASES
from kfac_fx.live.journal import Journal as Journal
from kfac_fx.live.journal import journaled as journaled
from kfac_fx.live.observe import Damping as Damping
from kfac_fx.live.observe import observe as observe
from kfac_fx.live.records import StepReport as StepReport
