"""Errors in settings. The message states a fact; the command line alone adds the option that corrects it.

Imports nothing heavy.
"""

import math
from typing import Any


class SettingError(ValueError):
    """An error that another value of a setting corrects.

    Args:
        fact: what is wrong, in one line that names the thing: `grid 9x9 is larger than the lookup grid 7x7`.
        settings: names of the settings that correct it, as in the code: `grid`, `on_bad`, or with the group that
            contains them, `data.tokens`. The command line adds the names of their options; others may ignore them.
    """

    def __init__(self, fact: str, *settings: str):
        super().__init__(fact)
        self.settings = settings


class ConflictError(SettingError):
    """Settings exclude each other. Leaving out those that are given on a command line corrects the error."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MissingError(SettingError, FileNotFoundError):
    """A file or folder does not exist at the place that a setting names."""


def check_positive(settings: Any, *names: str) -> None:
    """Refuse settings that are zero, negative or not finite; `None` is accepted.

    Raises:
        SettingError: a setting is not positive; the message names the first one.
    """
    for name in names:
        if (value := getattr(settings, name)) is not None and not 0 < value < math.inf:
            raise SettingError(f"{name} must be positive, not {value}", name)


def check_seed(settings: Any) -> None:
    """Refuse a seed that numpy does not accept.

    Raises:
        SettingError: the seed is negative or has more than 32 bits.
    """
    if not 0 <= settings.seed < 2**32:
        raise SettingError(f"seed must be from 0 to 2**32 - 1, not {settings.seed}", "seed")


def check_shares(settings: Any, *names: str) -> None:
    """Refuse settings that are not between 0 and 1.

    Raises:
        SettingError: a setting is not; the message names the first one.
    """
    for name in names:
        if not 0 <= (value := getattr(settings, name)) <= 1:
            raise SettingError(f"{name} must be a share between 0 and 1, not {value}", name)
