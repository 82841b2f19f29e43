"""The `captioner` command: a word for the job, then its settings."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

Settings = TypeVar("Settings")

USAGE = """usage: captioner COMMAND [options]

Image captioning when cost per image matters.

commands:
  caption    caption pictures: files, folders, patterns, standard input
  cache      encode pictures once, for train and evaluate to read their tokens
  train      train a caption decoder on a frozen encoder
  evaluate   caption a split on every process and score the captions
  pretrain   make an encoder: distil it from a teacher
  score      score any system's captions against references, or compare two

`captioner COMMAND --help` shows a command's options; `captioner --version` the version.
cache, train, evaluate and pretrain also run on many GPUs: `accelerate launch -m captioner.cli COMMAND ...`.
Set CAPTIONER_DEBUG=1 to see where an error comes from.
"""


def caption(args: Sequence[str]) -> int:
    """Caption pictures."""
    from captioner.caption_files import CaptionConfig, caption_files

    config = parse("caption", CaptionConfig, args)
    return 1 if caption_files(config) else 0


def cache(args: Sequence[str]) -> int:
    """Encode pictures once."""
    from captioner.training.config import CacheConfig

    config = parse("cache", CacheConfig, args)
    from captioner.training.cache import fill_cache

    fill_cache(config)
    return 0


def train(args: Sequence[str]) -> int:
    """Train a decoder."""
    from captioner.recipes import TRAIN

    config = parse_recipe("train", TRAIN, args)
    from captioner.training.decoder import train

    train(config)
    return 0


def evaluate(args: Sequence[str]) -> int:
    """Caption a split and score it."""
    from captioner.training.config import EvaluateConfig

    config = parse("evaluate", EvaluateConfig, args)
    from captioner.evaluation import evaluate

    evaluate(config)
    return 0


def pretrain(args: Sequence[str]) -> int:
    """Make an encoder."""
    from captioner.recipes import PRETRAIN

    config = parse_recipe("pretrain", PRETRAIN, args)
    from captioner.training.encoder import pretrain

    pretrain(config)
    return 0


def score(args: Sequence[str]) -> int:
    """Score results files."""
    from captioner.score_files import ScoreConfig, score_files

    score_files(parse("score", ScoreConfig, args))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "caption": caption,
    "cache": cache,
    "train": train,
    "evaluate": evaluate,
    "pretrain": pretrain,
    "score": score,
}


def parse(command: str, settings: type[Settings], args: Sequence[str]) -> Settings:
    """Read the settings of a command."""
    import tyro

    return tyro.cli(settings, prog=f"captioner {command}", args=args, config=(tyro.conf.FlagCreatePairsOff,))


def parse_recipe(command: str, recipes: dict[str, Callable], args: Sequence[str]):
    """Read the name of a recipe, then the settings that override it."""
    import tyro

    configs = {name: ((recipe.__doc__ or "").partition("\n")[0], recipe()) for name, recipe in recipes.items()}
    options = {"use_underscores": False, "config": (tyro.conf.FlagCreatePairsOff,)}
    return tyro.extras.overridable_config_cli(configs, prog=f"captioner {command}", args=args, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 an error or pictures left out, 2 a wrong command line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers would draw one for every load and save
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF and of sizes, which `open_image` looks after
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0)
    if name == "--version":
        from importlib.metadata import version

        print(f"captioner {version('captioner')}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"captioner: no command '{name}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(COMMANDS[name](args[1:]))
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("CAPTIONER_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"captioner {name}: {message}", file=sys.stderr)
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
