"""`captioner tags`: make a tag head for a vocabulary, on the tokens of a frozen encoder."""

from captioner.tagging.config import TagsConfig

SETTINGS = TagsConfig


def run(config: TagsConfig) -> int:
    """Make the head, and return the exit code."""
    from accelerate.utils import set_seed

    from captioner.commands.cache import open_encoder
    from captioner.runs.processes import start_processes
    from captioner.tagging.run import make_head

    accelerator = start_processes()
    set_seed(config.seed)
    encoder, source, grid = open_encoder(config, accelerator.device)
    make_head(config, accelerator, encoder, source, grid)
    accelerator.end_training()
    return 0
