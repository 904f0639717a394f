"""Reports: what a run's folder tells, as a page."""

from embedshard.report.page import write_report

__all__ = ["write_report"]
