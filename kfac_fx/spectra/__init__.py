"""Eigenvalues of a model's factors after some steps, as a plot or as JSON: `kfac-fx spectrum`."""

from kfac_fx.spectra.files import check_file as check_file
from kfac_fx.spectra.files import collect as collect
from kfac_fx.spectra.files import save as save
from kfac_fx.spectra.plot import draw as draw
