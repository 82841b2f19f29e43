"""Fingerprints: what determines the tokens of an image, and how two of them differ."""

import json

from captioner.encoders import TokenEncoder
from captioner.runs.digests import digest_tensors


def encoder_fingerprint(encoder: TokenEncoder, encoder_config: dict, image: dict) -> dict:
    """Return everything that determines the tokens of an image: the encoder, its weights, the preprocessing.

    Weights are compared as float16, so that a model saved in half precision can use the cache that it was trained on.

    Args:
        encoder: the encoder.
        encoder_config: timm name and arguments, as in `CaptionerConfig`.
        image: timm's data settings, as in `CaptionerProcessor`.
    """
    weights, arguments = digest_tensors(encoder.state_dict()), encoder_config.get("kwargs", {})
    content = {"encoder": encoder_config["name"], "arguments": arguments, "weights": weights, "image": image}
    return json.loads(json.dumps(content))  # tuples become lists, as they come back from disk


def compare_sources(made_by: dict, source: dict) -> str | None:
    """Return how the encoder and the preprocessing of a fingerprint differ from those of a model; `None` if not at all.

    Args:
        made_by: the `encoder_fingerprint` of what was made with an encoder.
        source: that of the model.
    """
    if made_by == source:
        return None
    if made_by["encoder"] != source["encoder"]:
        what = f"another encoder, {made_by['encoder']}, where the model has {source['encoder']}"
    elif made_by["arguments"] != source["arguments"]:
        one, other = (" ".join(f"{k}={v}" for k, v in s["arguments"].items()) for s in (made_by, source))
        what = f"{source['encoder']} with {one or 'no options'}, where the model has {other or 'no options'}"
    elif made_by["weights"] != source["weights"]:
        what = f"other weights of {source['encoder']} than the model's"
    else:
        keys = [k for k in made_by["image"] | source["image"] if made_by["image"].get(k) != source["image"].get(k)]
        what = "other preprocessing: " + ", ".join(
            f"{k} {made_by['image'].get(k)}, where the model has {source['image'].get(k)}" for k in keys
        )
    return what
