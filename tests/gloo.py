"""How the workers of several-process tests leave their group, so that what passed does not fail at its exit.

A thread of gloo's that outlives the interpreter aborts it now and then: it frees a tensor of Python's when there is no
Python any more.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import distributed


def end() -> None:
    """DDP's reducer goes first: as the group's last owner it would wait for a thread that waits for it."""
    gc.collect()
    distributed.destroy_process_group()


def leave(end: Callable[[], None] = end) -> None:
    """Ends the default group, and sees that its threads are gone."""
    distributed.barrier()
    end()
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in names if "gloo" in name], names


def leave_at_once() -> None:
    """For FSDP2: DTensor's caches keep the group's mesh for good, so that the interpreter must not get to its end."""
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
