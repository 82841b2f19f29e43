"""Fully sharded training (FSDP2, by accelerate): checks and helpers in addition to `accelerator.prepare`."""

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType


def check_sharding(accelerator: Accelerator, unsharded: str) -> None:
    """Refuse FSDP settings with which a run would fail later, or write checkpoints that contain code.

    Args:
        accelerator: accelerator of the run.
        unsharded: names of modules that every process holds whole, because they are frozen and called outside the
            model's forward.

    Raises:
        ValueError: the settings ask for the first version of FSDP; for one file per shard, which torch indexes with a
            pickle; or for loading weights in the first process only, which an unsharded module does not allow.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None
    if plugin is None:
        return
    if not accelerator.is_fsdp2:
        raise ValueError("sharded training needs FSDP2: launch it with fsdp_version 2")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            "sharded training needs whole checkpoints: launch it with fsdp_state_dict_type FULL_STATE_DICT"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("every process loads its weights: launch it with fsdp_cpu_ram_efficient_loading false")
    plugin.ignored_modules = unsharded


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Return a context in which every process holds all weights of a sharded model, so that each can generate alone.

    Without it, processes with shorter captions would end while others still wait for their shards. Each process needs
    memory for the whole model in this context. A model that is not sharded stays as it is.
    """
    shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if shards:
        model._get_fsdp_state()._lazy_init()  # without this, before a first forward, each part would become a root
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)
            shard.reshard()
