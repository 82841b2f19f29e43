"""Faults in what a person gave, stated as facts; which option mends one is known to the command line alone.

Imports nothing heavy.
"""

import math
from typing import Any


class SettingError(ValueError):
    """A fault that another setting mends.

    Args:
        fact: what is wrong, in one line that names the thing: `grid 9x9 is larger than the lookup grid 7x7`.
        settings: names of the settings that mend it, as the code has them: `grid`, `on_bad`, or with the settings that
            hold them, `data.tokens`. The command line adds what it calls them; others may ignore them.
    """

    def __init__(self, fact: str, *settings: str):
        super().__init__(fact)
        self.settings = settings


class MissingError(SettingError, FileNotFoundError):
    """A file or folder that is missing where a setting says it is."""


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings that are zero, negative or not finite; `None` passes.

    Raises:
        SettingError: naming the first of them.
    """
    for name in names:
        if (value := getattr(settings, name)) is not None and not 0 < value < math.inf:
            raise SettingError(f"{name} must be positive, not {value}", name)


def check_seed(settings: Any) -> None:
    """Refuse a seed that numpy does not take.

    Raises:
        SettingError: it is negative, or has more than 32 bits.
    """
    if not 0 <= settings.seed < 2**32:
        raise SettingError(f"seed must be from 0 to 2**32 - 1, not {settings.seed}", "seed")


def check_shares(settings: Any, *names: str) -> None:
    """Refuse settings that are not between 0 and 1.

    Raises:
        SettingError: naming the first of them.
    """
    for name in names:
        if not 0 <= (value := getattr(settings, name)) <= 1:
            raise SettingError(f"{name} is a share between 0 and 1, not {value}", name)
