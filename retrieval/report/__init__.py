"""Result files to one page: tables and curves, as HTML and as Markdown. Reads files only; computes no metric."""

from retrieval.report.inputs import ReportInputs, read_inputs
from retrieval.report.page import write_report

__all__ = ["ReportInputs", "read_inputs", "write_report"]
