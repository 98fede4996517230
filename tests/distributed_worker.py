"""What tests/test_distributed.py runs in several processes: ``torchrun … distributed_worker.py CASE FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def ddp(folder: Path) -> None:
    """The trainer, with the flags that the folder holds."""
    from train.__main__ import main

    trainer = main(json.loads((folder / "flags.json").read_text()))
    assert trainer.args.world_size == torch.distributed.get_world_size()


if __name__ == "__main__":
    {"ddp": ddp}[sys.argv[1]](Path(sys.argv[2]))
