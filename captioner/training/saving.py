"""Write the best model of a run as a folder for `captioner.load`."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from captioner.processing import CaptionerProcessor
from captioner.runs.files import folder_whole, share_weights
from captioner.training.lora import merged_weights


def save_best(
    accelerator: Accelerator, model: nn.Module, processor: CaptionerProcessor, folder: Path, dtype: str
) -> None:
    """Write a prepared model and its processor, completely or not at all; every process calls this.

    LoRA's updates are merged into the decoder. Captioning then needs neither peft nor the decoder's repository, and
    costs no more than without LoRA.

    Args:
        accelerator: accelerator that prepared the model.
        model: the prepared model.
        processor: its processor.
        folder: folder of the captioner.
        dtype: torch name of the weights' precision.

    Raises:
        OSError: the disk is full or not writable; an earlier model in the folder is unchanged.
    """
    state = accelerator.get_state_dict(model)  # gathers the shards, where the model is sharded
    if accelerator.is_main_process:
        captioner = accelerator.unwrap_model(model)
        state = merged_weights(captioner, state)
        cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        for key, value in state.items():
            # A token cache has the digest of the encoder's float16 weights, which bfloat16 would change.
            name = "float16" if dtype == "bfloat16" and key.startswith("encoder.") else dtype
            saved = getattr(torch, name) if value.is_floating_point() else value.dtype
            state[key] = cast.setdefault(value.data_ptr(), value.to(saved))
        with folder_whole(folder, "the model") as temporary:
            captioner.save_pretrained(temporary, state_dict=state)
            processor.save_pretrained(temporary)
            share_weights(temporary)
    accelerator.wait_for_everyone()
