"""accelerate's DeepSpeed on gloo, for the workers of tests/test_zero.py."""

import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType


def zero_on_cpu() -> None:
    """accelerate looks for DeepSpeed where there is an accelerator alone; all that it does then runs on gloo too."""
    import deepspeed.comm.torch

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    # Collectives through shared memory, which DeepSpeed would compile on the spot.
    deepspeed.comm.torch.build_shm_op = lambda: None
