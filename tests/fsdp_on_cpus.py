"""`train.py` for a launcher, with accelerate made to shard on CPUs, which by itself it does on accelerators alone."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from captioner.cli import main

original = AcceleratorState.__init__


def shard_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = shard_on_cpus
    main(["train", *sys.argv[1:]])
