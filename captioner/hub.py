"""Asking the hub in a moment whether it has something: its libraries take half a minute to give up on it."""

from pathlib import Path
from typing import Literal


def hub_trouble(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why the hub cannot be asked for a repository, or None where it can.

    Raises:
        ValueError: the hub answers that there is no such repository.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    api = huggingface_hub.HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"'{name}' is no file, no folder, and no {kind} on the hub (of a private one: hf auth login)"
        ) from None
    except HfHubHTTPError:
        return None  # it answers, and will say itself what is wrong when a file is asked for
    except (OSError, *HfHubHTTPError.__bases__) as error:  # those of its HTTP client
        return f"the hub does not answer ({str(error).partition(chr(10))[0]})"
    return None


def hub_options(name: str) -> dict[str, bool]:
    """Return what `from_pretrained` is to be told of a model's folder or hub id.

    Where the hub does not answer, that is not to ask it again, file by file, but to take what was downloaded before.

    Raises:
        ValueError: there is no such model, or the hub does not answer and nothing was downloaded before.
    """
    import huggingface_hub

    if Path(name).exists() or (trouble := hub_trouble(name, "model")) is None:
        return {}
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        raise ValueError(f"no folder '{name}', and {trouble}")
    return {"local_files_only": True}
