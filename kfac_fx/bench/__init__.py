"""Step times of methods against SGD and AdamW: `bench`, its report, and the tables, JSON and plot of it.

Enters: a model with a batch. Leaves: a frozen `BenchReport`; the model is copied, not changed.
"""

from kfac_fx.bench.autotune import autotune as autotune
from kfac_fx.bench.autotune import measured_forms as measured_forms
from kfac_fx.bench.contender import Contender as Contender
from kfac_fx.bench.contender import kinds_of as kinds_of
from kfac_fx.bench.document import to_json as to_json
from kfac_fx.bench.files import check_files as check_files
from kfac_fx.bench.files import save as save
from kfac_fx.bench.records import BenchReport as BenchReport
from kfac_fx.bench.records import ContenderReport as ContenderReport
from kfac_fx.bench.run import bench as bench
from kfac_fx.bench.settings import DEFAULT_METHODS as DEFAULT_METHODS
from kfac_fx.bench.settings import Make as Make
from kfac_fx.bench.settings import Settings as Settings
from kfac_fx.bench.table import show as show
