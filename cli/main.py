"""The command `kfac-fx`. Enters: a TARGET and options. Leaves: printed reports, files and an exit code.

Commands only call the library, one file each. Exit codes: 0 done; 1 an error of the user, in one message on
stderr; 2 `--strict` and a trainable parameter is skipped; 3 `diff --exit-code` and something differs; 4
`verify` found a violation.
"""

from kfac_fx_cli import bench as bench
from kfac_fx_cli import diff as diff
from kfac_fx_cli import inspect as inspect
from kfac_fx_cli import methods as methods
from kfac_fx_cli import spectrum as spectrum
from kfac_fx_cli import transform as transform
from kfac_fx_cli import verify as verify
from kfac_fx_cli.common import app as app
