"""The choice of checkpoints by DSE, and how good it was where the true quality is known.

>>> from dse_ext import selection
>>> runs = [selection.select_run(run) for run in selection.read_results("results")]
>>> runs[0].chosen_checkpoints
('checkpoint0240.pth', 'checkpoint0120.pth')
>>> table = selection.read_miou("miou.csv")
>>> selection.evaluate_selection(runs, table).mean_tau("dse")
0.57
"""

from dse_ext.selection.evaluation import (
    METRICS,
    Gain,
    KendallTau,
    SelectionEvaluation,
    evaluate_selection,
    kendall_tau,
)
from dse_ext.selection.miou import MiouTable, read_miou
from dse_ext.selection.results import RunResults, read_results
from dse_ext.selection.rule import dse_lambda, select_checkpoints
from dse_ext.selection.run import RunSelection, SelectionResult, select_by_dse, select_run
from dse_ext.selection.tables import ResultsError

__all__ = [
    "METRICS",
    "Gain",
    "KendallTau",
    "MiouTable",
    "ResultsError",
    "RunResults",
    "RunSelection",
    "SelectionEvaluation",
    "SelectionResult",
    "dse_lambda",
    "evaluate_selection",
    "kendall_tau",
    "read_miou",
    "read_results",
    "select_by_dse",
    "select_checkpoints",
    "select_run",
]
