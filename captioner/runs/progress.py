"""How far a job is: a bar on a terminal; elsewhere, as in the log of a scheduler, a line each minute."""

import sys
from typing import Any

from tqdm import tqdm

MINUTE = 60.0


class MinuteLines(tqdm):
    """A bar that is printed as a line on standard error, at most once a minute."""

    printed = 0.0
    """Seconds since the start at which the last line was printed."""

    def display(self, *args, **kwargs) -> None:
        """Print where the job is, if the last line is a minute old."""
        elapsed = self.format_dict["elapsed"]
        if elapsed - self.printed >= MINUTE:
            self.printed = elapsed
            print(self, file=sys.stderr, flush=True)

    def clear(self, *args, **kwargs) -> None:
        """Leave lines as they are."""

    def close(self) -> None:
        """Print nothing more."""
        self.disable = True


def progress_bar(*iterable: Any, **settings: Any) -> tqdm:
    """Return a bar of tqdm, which is a line each minute where standard error is no terminal.

    Args:
        iterable: what to go through, if anything.
        settings: arguments of tqdm.
    """
    if sys.stderr is None:
        return tqdm(*iterable, **settings | {"disable": True})
    if sys.stderr.isatty():
        return tqdm(*iterable, **settings)
    return MinuteLines(*iterable, **settings, ascii=True)
