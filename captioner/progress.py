"""How far a job is: a bar on a terminal, and elsewhere, as in the log of a scheduler, a word each minute."""

import sys

from tqdm import tqdm

MINUTE = 60.0


def progress_bar(*iterable, **settings) -> tqdm:
    """Return tqdm's bar on standard error; off a terminal it is silent in its first minute, and between minutes.

    Args:
        iterable: what to go through, if anything.
        settings: arguments of tqdm.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        settings |= {"delay": MINUTE, "mininterval": MINUTE, "maxinterval": MINUTE, "ascii": True, "leave": False}
    return tqdm(*iterable, **settings)
