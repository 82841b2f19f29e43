"""Faults in what a person gave, stated as facts; which option mends one is known to the command line alone."""


class SettingError(ValueError):
    """A fault that another setting mends.

    Args:
        fact: what is wrong, in one line that names the thing: `grid 9x9 is larger than the lookup grid 7x7`.
        settings: names of the settings that mend it, as the code has them: `grid`, `on_bad`. The command line adds
            what it calls them; others may ignore them.
    """

    def __init__(self, fact: str, *settings: str):
        super().__init__(fact)
        self.settings = settings
