"""Commands of the command line, run in the process of the test."""

import pytest

from captioner import cli


def run(*args) -> int:
    """Run the command line with these arguments; returns its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(arg) for arg in args])
    return stopped.value.code


def succeed(*args):
    """Run the command line with these arguments, which has to end well."""
    assert run(*args) == 0
