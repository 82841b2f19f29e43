"""Several processes of one run."""

from datetime import timedelta

PATIENT = timedelta(hours=2)
"""How long processes wait for one another: the main one reads data and writes models alone."""
