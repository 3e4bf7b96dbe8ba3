"""Reports of a `Plan` and of the methods: text, terminal table, JSON document and readable programs.

Enters: the frozen plan, or the methods' classes. Nothing here changes a graph or decides anything about a
layer.
"""

from kfac_fx.report.document import document as document
from kfac_fx.report.document import to_json as to_json
from kfac_fx.report.methods import methods_json as methods_json
from kfac_fx.report.program import readable as readable
from kfac_fx.report.text import render as render
