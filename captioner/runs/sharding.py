"""What fully sharded training (FSDP2, through accelerate) needs beyond `accelerator.prepare`."""

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType


def check_sharding(accelerator: Accelerator, unsharded: str) -> None:
    """Refuse FSDP settings under which a run would fail later, or write checkpoints that hold code.

    Args:
        unsharded: name of a module that every process holds whole, as it is frozen and called apart from the model's
            forward.

    Raises:
        ValueError: FSDP's first version; shards as files of their own, which torch indexes with a pickle; loading that
            leaves all but the first process without weights, which cannot be combined with an unsharded module.
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
    """Hold the weights of a sharded model whole on every process, so that each may generate at its own pace.

    Processes whose captions end sooner would otherwise leave the others waiting for their shards. Costs the memory of
    the whole model while it lasts; does nothing to a model that is not sharded.
    """
    shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if shards:
        model._get_fsdp_state()._lazy_init()  # else, before a first forward, the parts would each take root
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)
            shard.reshard()
