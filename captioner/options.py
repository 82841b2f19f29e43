"""The options of a command: tyro reads them into settings, and errors get the names of the options that correct them.

Below the command line, no error names an option. An error names settings as in the code, and this module adds their
options. A wrong command line gets an error of one line; tyro would draw a box.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from captioner.errors import ConflictError, SettingError

MENDS = {
    "on_bad": "pass {} skip to leave it out",
    "output": "name another {}",
}
FLAG_MENDS = {
    "allow_empty": "pass {} to give it zeros",
    "overwrite": "pass {} to replace it",
    "partial": "pass {} to score what both have",
    "resume": "pass {} to go on with it",
}
"""What to do with an option, and with a flag, that corrects an error; for others see `mend`."""

KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None", "PATH": "a path", "STR": "a text"}
"""Tyro's words for types, in plain words."""

REPHRASED = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "{0} must be a whole number, not {1}"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", "{0} must be a number, not {1}"),
    (
        r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*?)\]\..*",
        "{0} must be {1}, not {2}",
    ),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\)\.", "{1} must be one of {2}, not {0}"),
    (r"Missing value for argument '(\S+)'\. Expected 1 values\.", "{0} needs a value"),
    (r"Missing value for argument '(\S+)'\. Expected (\d+) values\.", "{0} needs {1} values"),
    (r"Error parsing (--\S+): (.*)", "{0}: {1}"),
    (r"Error parsing \S+: (.*)", "{0}"),
)
"""Patterns of tyro's messages, and our messages in their place."""


class UsageError(Exception):
    """An error in the command line; the message has one line."""


def read_settings(prog: str, defaults: Any, args: Sequence[str]) -> Any:
    """Read options into a copy of a command's settings.

    Args:
        prog: the words before the options, such as `captioner train debug`.
        defaults: a dataclass of settings, with their default values.
        args: the options.

    Raises:
        UsageError: an option does not exist or has no effect, a value has the wrong type, or settings exclude each
            other.
        SystemExit: the help was printed.
    """
    import tyro

    helping = bool({"-h", "--help"} & set(args))
    if helping:
        join_lines(defaults)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # tyro draws its boxes by the encoding of standard output
    try:
        with contextlib.redirect_stdout(sys.stdout if helping else printed), contextlib.redirect_stderr(printed):
            settings, unknown = tyro.cli(
                type(defaults),
                prog=prog,
                default=defaults,
                args=args,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        printed.seek(0)
        box = printed.read()
        if not stop.code:  # tyro printed the help, or a script for completion in a shell
            print(box, end="")
            raise
        if fault := find_fault(stop):
            raise UsageError(f"{one_line(fault)}{mends(fault, defaults, args)}") from None
        raise UsageError(rephrase(box)) from None
    if unknown:
        raise UsageError(explain_unknown(unknown[0], prog, defaults))
    refuse_unused(settings, defaults, args)
    return settings


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, such as `--data.root`, and its default value."""

    name: str
    default: Any


def list_options(defaults: Any, prefix: str = "") -> dict[str, Option]:
    """Map each setting of a command, such as `data.root` or `teachers.0.name`, to its option.

    Args:
        defaults: see `read_settings`. The option of a flag that they set unsets it: `--data.no-restval`.
        prefix: start of the names, which ends in a dot.
    """
    import tyro

    options: dict[str, Option] = {}
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        parts = parts_of(field.name, value)
        for name, part in parts.items():
            options |= list_options(part, f"{prefix}{name}.")
        if not parts and tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            name = f"no-{field.name}" if value is True else field.name
            options[prefix + field.name] = Option(f"--{prefix}{name}".replace("_", "-"), value)
    return options


def parts_of(name: str, value: Any) -> dict[str, Any]:
    """Return a value that is a dataclass, or the dataclasses in a tuple, by name such as `teachers.0`."""
    values = {f"{name}.{n}": part for n, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return {name: part for name, part in values.items() if dataclasses.is_dataclass(part)}


def given_options(args: Sequence[str]) -> set[str]:
    """Return the options of a command line, in the form of `Option.name`."""
    return {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}


def refuse_unused(settings: Any, defaults: Any, args: Sequence[str]) -> None:
    """Refuse options that have no effect beside the other settings; settings of a recipe are never refused.

    The settings' method `unused`, if there is one, maps names of settings without effect to the reason.

    Raises:
        UsageError: an option has no effect; the message names all of them.
    """
    unused: Mapping[str, str] = getattr(settings, "unused", dict)()
    given = given_options(args)
    found = {option.name: unused[name] for name, option in list_options(defaults).items() if name in unused}
    if facts := [f"{name} has no effect: {why}" for name, why in found.items() if name in given]:
        raise UsageError("; ".join(facts))


def mends(error: BaseException, defaults: Any, args: Sequence[str]) -> str:
    """Return the options that correct an error, as the end of its message; empty if there are none.

    Args:
        error: an error; a `SettingError` names the settings that correct it.
        defaults: see `read_settings`; `None` if the command line was not read.
        args: the options on the command line.
    """
    options, given = list_options(defaults) if defaults is not None else {}, given_options(args)
    phrases: dict[str, list[str]] = {}
    for setting in error.settings if isinstance(error, SettingError) else ():
        names = [name for name in options if name == setting or name.endswith(f".{setting}")]
        if names:
            option = options[min(names, key=lambda name: name.count("."))]  # `grid` before `model.grid`
            if isinstance(error, ConflictError) and option.name in given:
                phrase = "leave out {}"
            else:
                phrase = mend(setting.rpartition(".")[2], option.default, option.name in given)
            one_of_many = len({re.sub(r"\d+", "", name) for name in names}) < len(names)
            name = re.sub(r"\.\d+\.", ".N.", option.name) if one_of_many else option.name  # `--teachers.N.kind`
            phrases.setdefault(phrase, []).append(name)
    parts = [phrase.format(" or ".join(names)) for phrase, names in phrases.items()]
    return f"; {' or '.join(parts)}" if parts else ""


def mend(setting: str, default: Any, given: bool) -> str:
    """Return what to do with the option of a setting; `{}` stands for the option."""
    if isinstance(default, bool):
        return "leave out {}" if given else FLAG_MENDS.get(setting, "pass {}")
    if default in (None, (), {}, "") and not given:
        return "give {}"
    return MENDS.get(setting, "change {}")


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"'{error.filename}': {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def find_fault(stop: BaseException) -> SettingError | None:
    """Return the error of this package for which tyro exits; `None` if the error is tyro's own."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, SettingError):
        error = error.__context__
    return error


def rephrase(box: str) -> str:
    """Return the text of tyro's box above its first line, as one line in plain words."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rules = [number for number, line in enumerate(lines) if re.fullmatch("─+", line)]
    text = " ".join(" ".join(lines[: rules[0] if rules else None]).split())
    for pattern, phrase in REPHRASED:
        if match := re.fullmatch(pattern, text):
            groups = [kind_of(group) for group in match.groups()]
            return phrase.format(*groups)
    return text or " ".join(box.split())


def kind_of(text: str) -> str:
    """Return a type such as `{None}|INT` or `{FLOAT FLOAT}` in plain words; other text is unchanged."""
    kinds = []
    for word in text.split("|"):
        words = word.strip("{}").split()
        if word in KINDS:
            kinds.append(KINDS[word])
        elif words and set(words) <= {"INT", "FLOAT"}:
            kinds.append(f"{len(words)} numbers")
        else:
            return text
    return " or ".join(reversed(kinds))


def explain_unknown(word: str, prog: str, defaults: Any) -> str:
    """Return the error for an unknown word of the command line, with the nearest option."""
    if not word.startswith("-"):
        return f"'{word}' belongs to no option; `{prog} --help` lists them"
    option = word.partition("=")[0].replace("_", "-")
    known = [option.name for option in list_options(defaults).values()]
    ends = {name.removeprefix("--").rpartition(".")[2]: name for name in reversed(known)}  # `root` of `--data.root`
    end = option.lstrip("-").rpartition(".")[2]
    near = [ends[name] for name in difflib.get_close_matches(end, ends, 1, cutoff=0.75)]
    near = near or difflib.get_close_matches(option, known, 1)
    return f"no option {option}; " + (f"the nearest is {near[0]}" if near else f"`{prog} --help` lists the options")


def join_lines(settings: Any) -> None:
    """Set the help of each field to its docstring as one line; tyro would print the line breaks of the source."""
    from docstring_parser import parse_from_object

    docs = {
        doc.arg_name: " ".join((doc.description or "").split())
        for cls in reversed(type(settings).__mro__[:-1])
        for doc in parse_from_object(cls).params
    }
    for field in dataclasses.fields(settings):
        field.metadata = MappingProxyType({**field.metadata, "help": docs.get(field.name)})
        for part in parts_of(field.name, getattr(settings, field.name)).values():
            join_lines(part)
