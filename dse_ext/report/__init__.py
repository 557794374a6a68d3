"""The outcome of a run for the eye: one table, one page."""

from dse_ext.report.build import write_report
from dse_ext.report.table import checkpoint_table, summary_lines

__all__ = ["checkpoint_table", "summary_lines", "write_report"]
