"""Calls that are spread over the ranks of a process group: slices of the vocabulary, or parts of the completions.

Both join sums that a sweep keeps anyway, so no logit and no hidden state travels. Groups go by their names, which are
what a custom op can take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the default group of the moment as their default argument, and a custom op's first call imports
# it: after init_process_group that would keep the group, and gloo's threads, alive beyond destroy_process_group.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor
from torch.distributed import distributed_c10d

from .pair import perturbation_step
from .statistics import MEANS, Tokens, merge, shifts

# A label that another rank's slice holds.
ELSEWHERE = -1


def _group(name: str) -> Any:
    # Private until torch.distributed finds a group by its name: an op takes no ProcessGroup.
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gather(numbers: Sequence[int], group: str | None, device: torch.device) -> Tensor:
    """(ranks, len(numbers)) of all ranks of a group, on the device; of this one alone where there is none."""
    own = torch.tensor([numbers], device="cpu").to(device, non_blocking=True)
    if group is None:
        return own
    of_ranks = [torch.empty_like(own) for _ in range(_group(group).size())]
    dist.all_gather(of_ranks, own, _group(group))
    return torch.cat(of_ranks)


def rank_in(group: str) -> int:
    return _group(group).rank()


def labels_in_slice(labels: Tensor, start: int, words: int) -> Tensor:
    """(N,) labels of the whole vocabulary -> those of the slice from ``start``, ``ELSEWHERE`` where it has not them."""
    inside = (labels >= start) & (labels < start + words)
    return torch.where(inside, labels - start, ELSEWHERE)


def merge_slices(swept: Tensor, group: str) -> None:
    """Joins a tile's (SWEPT, rows) sums of this rank's slice with the other slices', in one packed exchange."""
    of_group = _group(group)
    own = swept.contiguous()
    parts = [torch.empty_like(own) for _ in range(of_group.size())]
    dist.all_gather(parts, own, of_group)
    swept.copy_(merge(torch.stack(parts)))


def join_completions(tokens: Tokens, pairs: range, group: str) -> None:
    """Adds the sums of the pairs' tokens on other ranks to those on this one, and decides.

    This rank may hold no token of a completion, or none of the pair.
    """
    part = slice(pairs.start, pairs.stop)
    count, sums = tokens.count[part], tokens.sums[:, part]
    sums[MEANS] *= count
    packed = torch.cat((torch.where(count > 0, sums, 0), count[None]))
    dist.all_reduce(packed, group=_group(group))
    sums.copy_(packed[:-1])
    count.copy_(packed[-1])
    sums[MEANS] /= count
    tokens.step[part] = perturbation_step(*shifts(sums))


def sum_over(tensor: Tensor, group: str) -> None:
    """Adds up the ranks' tensors, in place."""
    dist.all_reduce(tensor, group=_group(group))
