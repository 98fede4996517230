"""The tokens of a row over ranks: Ulysses (Jacobs et al., 2023, arXiv 2309.14509) round the attention of packed rows.

    everywhere else   rank r of R has the tokens r, r + R, r + 2R … of the row, with all heads
    in the attention  it has all tokens of the row, with heads r·h/R … (r + 1)·h/R − 1

An exchange before the attention function and one after it lead from one to the other. The loss takes each rank's own
scored tokens and joins the sums of a pair over the group (``sequence_group``). Because tokens are dealt one by one, the
scored ones, which the head works on, are spread as evenly as all others.

``ParallelismConfig(sp_size=R)`` asks for it. To accelerate these ranks are data parallel: they have the same weights,
or shards of them, over which gradients are averaged. Only their batches are the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env, patch_environment, recursively_apply
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from .packing import Packing


@dataclass(frozen=True)
class Share(Packing):
    """One rank's tokens of a packed row; ``segments`` stay the whole row's, and name the group."""

    whole: Packing
    own: Tensor  # (m,) int64, which of the row's M scored states are this rank's

    def rows(self) -> list[Tensor]:
        return self.whole.rows()


def share(row: Packing, group: ProcessGroup, device: torch.device) -> Share:
    """This rank's tokens of a row that all ranks of a group have, on the CPU.

    All shares are of one length. Each ends in at least one token that nobody attends to or scores, at the row's last
    position: rotary scalings that go by the longest position (dynamic, longrope) have to be the same on all ranks.

    Args:
        device: one that the group's tensors may be on.

    Raises:
        ValueError: on all ranks, where they have different rows.
    """
    _check_same(row, group, device)
    ranks, rank, tokens = group.size(), group.rank(), row.input_ids.shape[1]
    place = torch.arange(rank, tokens, ranks)
    fill = -(-tokens // ranks) + 1 - len(place)
    ids, positions = (
        torch.cat((t[:, place], t.amax(1, keepdim=True).expand(1, fill)), 1) for t in (row.input_ids, row.position_ids)
    )
    mine = row.scored % ranks == rank
    counts = pad(mine.cumsum(0), (1, 0))
    return Share(
        ids, positions, replace(row.segments, group=group), row.scored[mine] // ranks, row.labels[mine],
        counts[row.cu_seqlens], row, mine.nonzero()[:, 0],
    )  # fmt: skip


def _check_same(row: Packing, group: ProcessGroup, device: torch.device) -> None:
    number = zlib.crc32(repr(row.segments.lengths).encode())
    for tensor in (row.input_ids, row.scored, row.labels):
        number = zlib.crc32(tensor.numpy().tobytes(), number)
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    if ends.sum() != 0:
        raise ValueError(
            "train_dataset, data_collator: the ranks that share a row (sp_size) got different pairs, takes an order "
            "and a layout that depend on nothing of the rank's own"
        )


def all_tokens(parts: Sequence[Tensor], group: ProcessGroup, tokens: int) -> list[Tensor]:
    """Queries, keys and values (1, heads, n, D) of this rank's tokens -> (1, heads / R, N, D) of this rank's heads.

    Grouped keys and values that are no multiple of the ranks are repeated before, for all ranks whose queries want
    them. Gradients go back the same way.

    Raises:
        ValueError: there are not as many queries for each rank.
    """
    ranks, found = group.size(), []
    if parts[0].shape[1] % ranks:
        raise ValueError(f"sp_size: got {ranks}, takes a divisor of the model's {parts[0].shape[1]} attention heads")
    for x in parts:
        heads = math.lcm(x.shape[1], ranks)
        x = x.repeat_interleave(heads // x.shape[1], 1)
        received = _Exchange.apply(x[0].unflatten(0, (ranks, -1)).transpose(1, 2), group)  # (R, n, heads / R, D)
        found.append(received.transpose(0, 1).flatten(0, 1)[:tokens].transpose(0, 1)[None])
    return found


def all_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """(1, N, heads / R, D) of this rank's heads -> (1, n, heads, D), this rank's tokens. Its gradient goes back."""
    ranks, tokens = group.size(), x.shape[1]
    n = -(-tokens // ranks) + 1
    rows = pad(x[0], (0, 0, 0, 0, 0, n * ranks - tokens)).unflatten(0, (n, ranks))
    received = _Exchange.apply(rows.transpose(0, 1), group)  # (R, n, heads / R, D)
    return received.transpose(0, 1).flatten(1, 2)[None]


class _Exchange(torch.autograd.Function):
    """(R, …) parts of this rank's, one for each rank -> (R, …) parts for this rank, one of each: its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, ctx.group), None


def own_heads(per_head: Tensor, group: ProcessGroup) -> Tensor:
    """(heads,) -> (heads / R,) of this rank."""
    return per_head.chunk(group.size())[group.rank()]


def whole_row(states: Tensor, group: ProcessGroup, tokens: int) -> Tensor:
    """(n, …) of this rank's tokens -> (tokens, …) of all, where the gradient of the others' is theirs to compute."""
    parts = [torch.empty_like(states) for _ in range(group.size())]
    dist.all_gather(parts, states.detach().contiguous(), group)
    parts[group.rank()] = states
    return torch.stack(parts, 1).flatten(0, 1)[:tokens]


def parallelism(args: Any) -> ParallelismConfig | None:
    """What training arguments, or else `accelerate launch`, ask for."""
    if args.parallelism_config is not None:
        return args.parallelism_config
    return ParallelismConfig() if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") else None


def sequence_ranks(args: Any) -> int:
    """Ranks that share a row; consecutive ones do."""
    config = parallelism(args)
    return 1 if config is None else config.sp_size


def tensor_ranks(args: Any) -> int:
    """Ranks that share a model's layers; consecutive ones do."""
    config = parallelism(args)
    return 1 if config is None else config.tp_size


class SharedRows:
    """To be named before a transformers.Trainer among a trainer's bases, whose rows may be spread over ranks.

    Raises:
        ValueError: by name, a size that does not fit the processes, or an engine that it does not go with.
    """

    args: Any
    accelerator: Any
    state: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    get_tp_size: Callable[[], int]
    sequence_group: ProcessGroup | None = None

    @property
    def sequence_ranks(self) -> int:
        return 1 if self.sequence_group is None else self.sequence_group.size()

    @property
    def row_ranks(self) -> int:
        """Ranks that have the same batches: those that share a row's tokens, or a model's layers."""
        return self.sequence_ranks * self.get_tp_size()

    @property
    def data_ranks(self) -> int:
        """How many batches are there at a time."""
        return self.args.world_size // self.row_ranks

    @property
    def data_rank(self) -> int:
        """Which of them is this rank's."""
        return self.args.process_index // self.row_ranks

    @property
    def first_of_row(self) -> bool:
        """Whether this rank stands for those that share its rows."""
        return self.args.process_index % self.row_ranks == 0

    @property
    def averaged_over(self) -> int:
        """Ranks over which gradients are averaged; tensor parallelism's have slices, or the same ones."""
        return self.args.world_size // self.get_tp_size()

    def count_once(self, counts: Tensor) -> Tensor:
        """The sum over all ranks of int64 counts of their batches, each batch once."""
        return self.accelerator.reduce(counts, "sum") // self.row_ranks

    def create_accelerator_and_postprocess(self):
        config = parallelism(self.args)
        if config is None or config.sp_size == 1:
            return super().create_accelerator_and_postprocess()  # type: ignore[misc]
        # Told of sp_size, accelerate would want DeepSpeed, and transformers deal other batches.
        given, self.args.parallelism_config = self.args.parallelism_config, None
        with patch_environment(ACCELERATE_USE_PARALLELISM_CONFIG="false"):
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.args.parallelism_config = given
        self._share_rows(config)

    def _share_rows(self, config: ParallelismConfig) -> None:
        ranks, processes = config.sp_size, self.accelerator.num_processes
        replicate, shard = config.dp_replicate_size, config.dp_shard_size
        if config.tp_size > 1:
            raise ValueError(
                f"parallelism_config: got sp_size={ranks} with tp_size={config.tp_size}, takes one of both"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(f"parallelism_config: got sp_size={ranks} with DeepSpeed, takes DDP and FSDP2")
        if replicate * shard == 1:
            shard = processes // ranks  # what was not said is data parallel
        if replicate * shard * ranks != processes:
            raise ValueError(
                f"parallelism_config: got sp_size={ranks}, dp_replicate_size={replicate} and dp_shard_size={shard} in "
                f"{processes} processes, takes sizes whose product that is"
            )
        if shard == 1 and self.is_fsdp_enabled and replicate > 1:
            raise ValueError(
                f"parallelism_config: got dp_replicate_size={replicate} with FSDP, takes dp_shard_size, over which it "
                "shards; both, to have replicas of what is sharded"
            )
        if shard == 1:  # DDP, which asks for neither
            replicate, shard = 1, replicate
        # accelerate's loaders give the ranks of "cp" one batch, and its FSDP shards over them and "dp_shard".
        mesh: Any = ParallelismConfig(replicate, shard, cp_size=ranks, sp_size=1, tp_size=1).build_device_mesh(
            self.accelerator.device.type
        )
        state = self.accelerator.state
        state.parallelism_config = ParallelismConfig(replicate, shard * ranks, cp_size=1, sp_size=1, tp_size=1)
        state.device_mesh = mesh
        self.sequence_group = mesh["cp"].get_group()

    def get_total_train_batch_size(self, args):
        return super().get_total_train_batch_size(args) // self.sequence_ranks  # type: ignore[misc]

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(inputs) // self.sequence_ranks  # type: ignore[misc]

    def _track_num_input_tokens(self, inputs):
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        added = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + added // self.sequence_ranks

    def evaluation_loop(self, *args, **kwargs):
        if self.sequence_group is not None:
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _gather_once(self, data: Any) -> Any:
        """``Accelerator.gather_for_metrics`` of tensors, those that share a row counted once."""
        state, shape = self.accelerator.gradient_state, (self.data_ranks, self.sequence_ranks, -1)
        end = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        return recursively_apply(
            lambda t: t.unflatten(0, shape)[:, 0].flatten(0, 1)[:end], self.accelerator.gather(data)
        )
