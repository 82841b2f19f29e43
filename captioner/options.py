"""The options of a command: tyro reads them into settings; errors get the names of the options that mend them.

Below the command line no error spells an option. An error names settings, as the code has them, and their options are
added here. A wrong command line gets one line, where tyro would draw a box.
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
"""What to do with an option, and with a flag, that mends a fault; for others see `mend`."""

KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None", "PATH": "a path", "STR": "a text"}
"""What tyro's words for types mean."""

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
    """A command line that cannot be read, in one line."""


def read_settings(prog: str, defaults: Any, args: Sequence[str]) -> Any:
    """Read options into a copy of a command's settings.

    Args:
        prog: what was typed before the options, such as `captioner train debug`.
        defaults: a dataclass of settings, with the values that hold without options.
        args: the options.

    Raises:
        UsageError: an option that does not exist or has no effect, a value that is not of its kind, or settings that
            exclude one another.
        SystemExit: the options ask for help, which is printed.
    """
    import tyro

    helping = bool({"-h", "--help"} & set(args))
    if helping:
        join_lines(defaults)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # for tyro draws its boxes by what standard output is
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
        if not stop.code:  # the help, or a script that completes options in a shell
            print(box, end="")
            raise
        fault = find_fault(stop)
        if fault is not None and hasattr(fault, "settings"):
            raise UsageError(f"{one_line(fault)}{mends(fault, defaults, args)}") from None
        raise UsageError(rephrase(box)) from None
    if unknown:
        raise UsageError(explain_unknown(unknown[0], prog, defaults))
    refuse_unused(settings, defaults, args)
    return settings


@dataclasses.dataclass(frozen=True)
class Option:
    """An option as it is typed, `--data.root`, and the value that holds without it."""

    name: str
    default: Any


def list_options(defaults: Any, prefix: str = "") -> dict[str, Option]:
    """Map every setting of a command, such as `data.root` or `teachers.0.name`, to its option.

    Args:
        defaults: see `read_settings`. A flag that they set has an option that takes it back, `--data.no-restval`.
        prefix: what stands before the names, with a dot.
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
    """Return the dataclasses that a value is, or that are in it where it is a tuple, by name: `teachers.0`."""
    values = {f"{name}.{n}": part for n, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return {name: part for name, part in values.items() if dataclasses.is_dataclass(part)}


def given_options(args: Sequence[str]) -> set[str]:
    """Return the options of a command line as `Option.name` has them."""
    return {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}


def refuse_unused(settings: Any, defaults: Any, args: Sequence[str]) -> None:
    """Refuse options that have no effect with the others; what a recipe sets is never refused.

    Settings that know of such cases have a method `unused`, which maps names of settings to why they have no effect.

    Raises:
        UsageError: naming them.
    """
    unused: Mapping[str, str] = getattr(settings, "unused", dict)()
    given = given_options(args)
    found = {option.name: unused[name] for name, option in list_options(defaults).items() if name in unused}
    if facts := [f"{name} has no effect: {why}" for name, why in found.items() if name in given]:
        raise UsageError("; ".join(facts))


def mends(error: BaseException, defaults: Any, args: Sequence[str]) -> str:
    """Say which options mend an error, as the end of its line; empty where none does.

    Args:
        error: may have `settings`, names of the settings that mend it.
        defaults: see `read_settings`; `None` where the command line was not read.
        args: the options that were given.
    """
    options, given = list_options(defaults) if defaults is not None else {}, given_options(args)
    phrases: dict[str, list[str]] = {}
    for setting in getattr(error, "settings", ()):
        names = [name for name in options if name == setting or name.endswith(f".{setting}")]
        if names:
            option = options[min(names, key=lambda name: name.count("."))]  # `grid` before `model.grid`
            phrase = mend(setting.rpartition(".")[2], option.default, option.name in given)
            one_of_many = len({re.sub(r"\d+", "", name) for name in names}) < len(names)
            name = re.sub(r"\.\d+\.", ".N.", option.name) if one_of_many else option.name  # `--teachers.N.kind`
            phrases.setdefault(phrase, []).append(name)
    parts = [phrase.format(" or ".join(names)) for phrase, names in phrases.items()]
    return f"; {' or '.join(parts)}" if parts else ""


def mend(setting: str, default: Any, given: bool) -> str:
    """Return what to do with the option of a setting, which stands for `{}`."""
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


def find_fault(stop: BaseException) -> BaseException | None:
    """Return our own error for which tyro exits; `None` where the error is tyro's."""
    error: BaseException | None = stop
    while error is not None and not hasattr(error, "settings"):
        error = error.__context__
    return error


def rephrase(box: str) -> str:
    """Turn tyro's box into one line: the text above its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rules = [number for number, line in enumerate(lines) if re.fullmatch("─+", line)]
    text = " ".join(" ".join(lines[: rules[0] if rules else None]).split())
    for pattern, phrase in REPHRASED:
        if match := re.fullmatch(pattern, text):
            groups = [kind_of(group) for group in match.groups()]
            return phrase.format(*groups)
    return text or " ".join(box.split())


def kind_of(text: str) -> str:
    """Translate tyro's words for a type, such as `{None}|INT` or `{FLOAT FLOAT}`; other text stays."""
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
    """Say that a word of the command line is no option, and which is the nearest."""
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
    """Give tyro the docstring of each field as one line; it would print the line breaks of the source."""
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
