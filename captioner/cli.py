"""The `captioner` command: the name of a job, then its options. Each job is a file of `commands/`."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from captioner.errors import SettingError
from captioner.options import UsageError, mends, one_line, read_settings

COMMANDS = {
    "caption": "caption images: files, folders, patterns, standard input",
    "serve": "caption over HTTP: an API, health and counts",
    "cache": "encode images once and store their tokens, which train and evaluate then read",
    "train": "train a caption decoder on a frozen encoder",
    "evaluate": "caption a split and score the captions",
    "tags": "make a head that names what is in an image, for a vocabulary of your own",
    "pretrain": "train an encoder on outputs of teachers, class labels and words of captions",
    "score": "score the captions of any system against references, or compare two systems",
}

USAGE = """usage: captioner COMMAND [options]

Image captioning when cost per image matters.

commands:
{commands}

`captioner COMMAND --help` shows the options of a command, and `captioner --version` the version.
cache, train, evaluate and pretrain also run on many GPUs: `accelerate launch -m captioner COMMAND ...`.
Set CAPTIONER_DEBUG=1 in the environment to see where an error comes from.
"""

RECIPES = """usage: captioner {command} RECIPE [options]

{what}

recipes:
{recipes}

`captioner {command} RECIPE --help` shows the options, with the values of the recipe.
"""


def pick_defaults(command: str, settings: Any, args: Sequence[str]) -> tuple[str, Any, list[str]]:
    """Return the words before the options, the default settings, and the options.

    Args:
        command: name of the command.
        settings: a dataclass of settings; or recipes by name, of which the first argument names one.
        args: the arguments after the command.

    Raises:
        UsageError: no recipe is named, or the named one does not exist.
        SystemExit: the help of a command with recipes was printed.
    """
    if not isinstance(settings, dict):
        return f"captioner {command}", settings(), list(args)
    first = args[0].replace("-", "_") if args else ""
    if first in settings:
        return f"captioner {command} {first}", settings[first](), list(args[1:])
    if args and args[0] in ("-h", "--help"):
        lines = "\n".join(
            f"  {name:<28} {(make.__doc__ or '').partition(chr(10))[0]}" for name, make in settings.items()
        )
        print(RECIPES.format(command=command, what=COMMANDS[command].capitalize(), recipes=lines), end="")
        sys.exit(0)
    names = ", ".join(settings)
    if not args or args[0].startswith("-"):
        raise UsageError(f"the first word after {command} is a recipe: {names}")
    raise UsageError(f"no recipe '{args[0]}'; there are {names}")


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
    defaults: Any = None
    options: list[str] = []
    try:
        command = import_module(f"captioner.commands.{name}")
        prog, defaults, options = pick_defaults(name, command.SETTINGS, args[1:])
        sys.exit(command.run(read_settings(prog, defaults, options)))
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # a launcher starts several processes, which all have the same error
            print(f"captioner {name}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # by name, because importing torch takes seconds
        if os.environ.get("CAPTIONER_DEBUG") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        fact = SettingError("the memory of the GPU is full", "batch_size") if out_of_memory else error
        print(f"captioner {name}: {one_line(fact)}{mends(fact, defaults, options)}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in (130, 143):  # a signal stopped the run, which has saved: further signals are ignored
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        raise
    except KeyboardInterrupt:
        print(f"captioner {name}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
