"""Choose among the files of a folder or an archive by patterns as in a `.gitignore`."""

from collections.abc import Sequence

from pathspec import GitIgnoreSpec

from captioner.errors import SettingError

EXCLUDED = "excluded by the patterns"
"""Kind of the files that patterns leave out."""


class PathFilter:
    """Filter of files by patterns: `*.jpg`, `2024/`, `raw/**/*.png`.

    A pattern without a slash is compared with the names of files and folders. A pattern with a slash is compared with
    the path from the folder that is searched.

    Args:
        include: patterns of which a file must match one; without patterns, every file passes.
        exclude: patterns of which a file must match none.

    Raises:
        SettingError: a pattern cannot be read.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()):
        self.include = read_patterns(include, "include") if include else None
        self.exclude = read_patterns(exclude, "exclude")

    def __call__(self, path: str) -> bool:
        """Return whether a file passes, by its path from the folder that is searched, with `/`."""
        return (self.include is None or self.include.match_file(path)) and not self.exclude.match_file(path)


def read_patterns(patterns: Sequence[str], setting: str) -> GitIgnoreSpec:
    """Read patterns.

    Raises:
        SettingError: a pattern cannot be read, or is empty.
    """
    for pattern in patterns:
        try:
            spec = GitIgnoreSpec.from_lines([pattern])
        except ValueError:
            raise SettingError(f"'{pattern}' is not a pattern of files", setting) from None
        if not any(one.include is not None for one in spec.patterns):
            raise SettingError(f"'{pattern}' is not a pattern of files", setting)
    return GitIgnoreSpec.from_lines(patterns)
