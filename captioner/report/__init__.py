"""Reports: one HTML file that needs nothing else, no network included."""

from captioner.report.page import write_report

__all__ = ["write_report"]
