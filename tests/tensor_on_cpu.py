"""accelerate's parallelism on CPU ranks, which it takes on accelerators alone."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType


def split_on_cpu() -> None:
    own = Accelerator.multi_device.fget  # type: ignore[attr-defined]
    Accelerator.multi_device = property(  # type: ignore[assignment]
        lambda self: own(self) or self.distributed_type == DistributedType.MULTI_CPU
    )
