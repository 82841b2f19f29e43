"""Reports: an HTML page in one file, which needs no other files and no network."""

from captioner.report.page import write_report

__all__ = ["write_report"]
