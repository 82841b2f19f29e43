"""Check within seconds whether the hub has a repository; its own libraries wait for half a minute."""

from pathlib import Path
from typing import Literal

from captioner.errors import first_line


def hub_trouble(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why the hub cannot be reached for a repository, or None if it can.

    Raises:
        ValueError: the hub has no such repository.
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
            f"'{name}' is no file, no folder, and no {kind} on the hub (if it is private, run `hf auth login`)"
        ) from None
    except HfHubHTTPError:
        return None  # the hub answers; its own error follows when a file is requested
    except (OSError, *HfHubHTTPError.__bases__) as error:  # the bases are errors of its HTTP client
        return f"the hub does not answer ({first_line(error)})"
    return None


def hub_options(name: str) -> dict[str, bool]:
    """Return the keyword arguments of `from_pretrained` for a model's folder or hub id.

    If the hub does not answer, they allow only files that were downloaded before: without them, `from_pretrained` would
    wait for the hub once per file.

    Raises:
        ValueError: there is no such model, or the hub does not answer and nothing was downloaded before.
    """
    import huggingface_hub

    if Path(name).exists() or (trouble := hub_trouble(name, "model")) is None:
        return {}
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        raise ValueError(f"no folder '{name}', and {trouble}")
    return {"local_files_only": True}
