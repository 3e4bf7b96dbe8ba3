"""Independent oracles on the user's own model, behind `kfac_fx.verify` and `kfac-fx verify`.

Enters: model, loss and one batch. Leaves: a verdict per layer. Expected values come from eager PyTorch and
explicit formulas; nothing of the user's is changed.
"""

from kfac_fx.verification.document import document as document
from kfac_fx.verification.document import to_json as to_json
from kfac_fx.verification.records import Check as Check
from kfac_fx.verification.records import LayerVerdict as LayerVerdict
from kfac_fx.verification.records import Verification as Verification
from kfac_fx.verification.run import verify as verify
from kfac_fx.verification.text import render as render
