"""The `captioner` command: a word for the job, then its settings. Each word is a file of `commands/`."""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

COMMANDS = {
    "caption": "caption images: files, folders, patterns, standard input",
    "cache": "encode images once, for train and evaluate to read their tokens",
    "train": "train a caption decoder on a frozen encoder",
    "evaluate": "caption a split on every process and score the captions",
    "pretrain": "make an encoder: distil it from teachers, train it on labels",
    "score": "score any system's captions against references, or compare two",
}

USAGE = """usage: captioner COMMAND [options]

Image captioning when cost per image matters.

commands:
{commands}

`captioner COMMAND --help` shows a command's options; `captioner --version` the version.
cache, train, evaluate and pretrain also run on many GPUs: `accelerate launch -m captioner COMMAND ...`.
Set CAPTIONER_DEBUG=1 to see where an error comes from.
"""


def parse(command: str, settings: Any, args: Sequence[str]) -> Any:
    """Read the settings of a command.

    Args:
        command: the word.
        settings: a dataclass of settings, or recipes by name, whose name then comes first.
        args: what follows the word.
    """
    import tyro

    prog, markers = f"captioner {command}", (tyro.conf.FlagCreatePairsOff,)
    if not isinstance(settings, dict):
        return tyro.cli(settings, prog=prog, args=args, config=markers)
    recipes = {name: ((recipe.__doc__ or "").partition("\n")[0], recipe()) for name, recipe in settings.items()}
    return tyro.extras.overridable_config_cli(recipes, prog=prog, args=args, use_underscores=False, config=markers)


MENDS = {
    "on_bad": "pass {} skip to leave it out",
    "overwrite": "pass {} to replace it",
    "resume": "pass {} to go on with it",
}
"""What an option does about a fault, where `change {}` would not say it."""


def name_options(settings: Any) -> dict[str, str]:
    """Map the names of all settings of a dataclass, and of those within it, to options; the outermost name wins."""
    options: dict[str, str] = {}
    inner: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        option = "--" + field.name.replace("_", "-")
        options[field.name] = option
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            inner |= {name: f"{option}.{below[2:]}" for name, below in name_options(value).items() if name not in inner}
    return inner | options


def tell_mends(error: Exception, settings: Any) -> str:
    """Say which options of a command mend an error, as the end of its line; nothing where none does."""
    options = name_options(settings) if settings is not None else {}
    wanted = [name for name in getattr(error, "settings", ()) if name in options]
    mends = [MENDS.get(name, "change {}").format(options[name]) for name in wanted]
    return f"; {' or '.join(mends)}" if mends else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 an error or images left out, 2 a wrong command line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers would draw one for every load and save
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        release = version("captioner")
    except PackageNotFoundError:
        print("captioner: not installed here; run `pip install .` in its folder first", file=sys.stderr)
        sys.exit(1)
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {word:<10} {what}" for word, what in COMMANDS.items())
        print(USAGE.format(commands=lines), end="")
        sys.exit(0)
    if name == "--version":
        print(f"captioner {release}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"captioner: no command '{name}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    settings = None
    try:
        command = import_module(f"captioner.commands.{name}")
        settings = parse(name, command.SETTINGS, args[1:])
        sys.exit(command.run(settings))
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("CAPTIONER_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"captioner {name}: {message}{tell_mends(error, settings)}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in (130, 143):  # saved and leaving: a signal that comes twice changes nothing
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        raise
    except KeyboardInterrupt:
        print(f"captioner {name}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
