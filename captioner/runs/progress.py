"""How far a job is: a bar on a terminal, and elsewhere, as in the log of a scheduler, a line each minute."""

import sys

from tqdm import tqdm

MINUTE = 60.0


class MinuteLines(tqdm):
    """A bar that is told as a line on standard error, at most once a minute."""

    told = 0.0

    def display(self, *args, **kwargs) -> None:
        """Print where the job is, if that was last told a minute ago."""
        elapsed = self.format_dict["elapsed"]
        if elapsed - self.told >= MINUTE:
            self.told = elapsed
            print(self, file=sys.stderr, flush=True)

    def clear(self, *args, **kwargs) -> None:
        """Leave lines as they are."""

    def close(self) -> None:
        """Say nothing more."""
        self.disable = True


def progress_bar(*iterable, **settings) -> tqdm:
    """Return a bar as tqdm's, which is a line each minute where standard error is no terminal.

    Args:
        iterable: what to go through, if anything.
        settings: arguments of tqdm.
    """
    if sys.stderr is None:
        return tqdm(*iterable, **settings | {"disable": True})
    if sys.stderr.isatty():
        return tqdm(*iterable, **settings)
    return MinuteLines(*iterable, **settings, ascii=True)
