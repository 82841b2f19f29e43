"""Progress of a job: a bar on a terminal; in files, such as the log of a scheduler, a line each minute."""

import sys
from typing import Any

from tqdm import tqdm

MINUTE = 60.0


class MinuteLines(tqdm):
    """A progress bar that prints a line on standard error, at most once a minute."""

    printed = 0.0
    """Seconds since the start at which the last line was printed."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        """Print the progress, if the last line is a minute old."""
        elapsed = self.format_dict["elapsed"]
        if elapsed - self.printed >= MINUTE:
            self.printed = elapsed
            print(self, file=sys.stderr, flush=True)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: printed lines stay."""

    def close(self) -> None:
        """Print nothing more."""
        self.disable = True


def progress_bar(*iterable: Any, **settings: Any) -> tqdm:
    """Return a bar of tqdm; if standard error is not a terminal, the bar prints a line each minute.

    Args:
        iterable: the iterable that the bar wraps, if any.
        settings: arguments of tqdm.
    """
    if sys.stderr is None:
        return tqdm(*iterable, **settings | {"disable": True})
    if sys.stderr.isatty():
        return tqdm(*iterable, **settings)
    return MinuteLines(*iterable, **settings, ascii=True)
