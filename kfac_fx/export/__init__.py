"""The folder that `kfac-fx transform` leaves behind: reports, programs by pass, a standalone training step.

Enters: a plan and the model it was made of. Leaves: files. Reads everything, is read by the command line
alone.
"""

from kfac_fx.export.folder import check_folder as check_folder
from kfac_fx.export.folder import save as save
