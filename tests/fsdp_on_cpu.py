"""accelerate's FSDP2 on gloo, for the workers of the distributed tests."""

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu(trainer_class) -> None:
    """accelerate takes FSDP for GPUs alone; its preparation of model and optimizer runs on gloo all the same."""
    create = trainer_class.create_accelerator_and_postprocess

    def created(self):
        create(self)
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(self.accelerator.mixed_precision)
        # The one is copied over the other whenever accelerate looks up its state.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    trainer_class.create_accelerator_and_postprocess = created
