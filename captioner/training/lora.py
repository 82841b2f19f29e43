"""Choose the trained weights of a captioner: the whole decoder, none of it, or low-rank updates (LoRA) of it.

LoRA is due to Hu et al. (ICLR 2022, arXiv 2106.09685).
"""

import torch
from transformers.pytorch_utils import Conv1D

from captioner.errors import SettingError
from captioner.modeling import CaptionerModel
from captioner.training.config import ModelConfig

ADAPTER = "default"
"""Name of the LoRA adapter in the names of peft's weights."""


def tune(model: CaptionerModel, config: ModelConfig) -> None:
    """Choose the trained weights: always the projector; and all, none, or low-rank updates of the decoder.

    Args:
        model: the captioner, changed in place.
        config: `tune` and the settings of LoRA.

    Raises:
        SettingError: `tune` is `lora` and peft is not installed.
    """
    model.decoder.requires_grad_(config.tune == "full")
    if config.tune != "lora":
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SettingError("LoRA needs peft: pip install 'captioner[lora]'", "tune") from None
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",  # peft leaves the head out
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.decoder.modules()),  # GPT-2's layers
    )
    inject_adapter_in_model(lora, model.decoder, ADAPTER)


def merged_weights(model: CaptionerModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict of `model` with LoRA's updates added to the weights that they update.

    Other weights are unchanged. Neither the model nor `state` is changed: merging the updates in place and removing
    them again would change the weights by rounding.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    merged = {}
    for key, value in state.items():
        name, _, last = key.rpartition(".base_layer.")
        if name not in layers:
            if not any(part.startswith("lora_") for part in key.split(".")):
                merged[key] = value
            continue
        if last == "weight":
            down, up = (state[f"{name}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            update = up @ down * layers[name].scaling[ADAPTER]  # (out, in)
            value = value + (update.T if layers[name].fan_in_fan_out else update).to(value.dtype)
        merged[f"{name}.{last}"] = value
    return merged
