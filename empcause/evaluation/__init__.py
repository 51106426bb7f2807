"""Evaluating systems: their figures, confidence intervals, tables, plots and reports."""

from empcause.evaluation.report import write_report

__all__ = ["write_report"]
