"""What tests/test_parallel.py runs in several processes: a call that is spread over ranks, against the whole call."""

from __future__ import annotations

import copy
import json
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import gloo
from cases import make_case, pack, plant_first, relative_error, worst_error
from epsdpo_kernels import EpsilonDPOLoss, engines, linear_epsilon_dpo, linear_pair_stats

GRADS = ("hidden", "weight", "bias")
# Bytes of two float64 tiles at V 103: all in one tile, some pairs to a tile, less than a pair.
BUDGETS = (1 << 20, 20 * 103 * 16, 3 * 103 * 16)


def whole(case, function, cu_seqlens=None, **options):
    """Result and gradients of a call; of a sum of the log-probs where the function gives statistics."""
    args, biases = case.arguments(grad=GRADS)
    out = function(*args, **biases, cu_seqlens=cu_seqlens, **options)
    if function is linear_pair_stats:
        loss = (out.chosen_logps.square() - 2 * out.rejected_logps).sum()
    else:
        loss = out.loss * 3
    return out, torch.autograd.grad(loss, (args[0], args[1], biases["bias"]))


def same(got, truth) -> float:
    assert all(torch.equal(g, t) for g, t in zip(got, truth, strict=True) if not t.is_floating_point())
    return worst_error(got, truth)


def vocabulary(rank: int, size: int) -> float:
    """Uneven slices, one of them a single word, and labels in any of them."""
    cuts = {2: (0, 71, 103), 3: (0, 1, 40, 103)}[size]
    mine = slice(cuts[rank], cuts[rank + 1])
    worst = 0.0
    for pairs, budget in ((1, BUDGETS[2]), (3, BUDGETS[0]), (4, BUDGETS[1])):
        case = plant_first(make_case(pairs, bias=True, drift=0.2, seed=pairs))
        part = case._replace(
            weight=case.weight[mine],
            ref_weight=case.ref_weight[mine],
            bias=case.bias[mine],
            ref_bias=case.ref_bias[mine],
        )
        for function in (linear_epsilon_dpo, linear_pair_stats):
            options = {"softcap": 3.0, "max_tile_bytes": budget}
            truth, expected = whole(case, function, **options)
            got, gradients = whole(part, function, vocab_group=dist.group.WORLD, **options)
            worst = max(worst, same(got, truth))
            for g, e in zip(gradients, (expected[0], expected[1][mine], expected[2][mine]), strict=True):
                worst = max(worst, relative_error(g, e))
    return worst


def impossible(rank: int, size: int) -> float:
    """A slice without a possible word: padding of the vocabulary that both heads mask."""
    case = make_case(2, bias=True)
    last = slice(102, 103)
    case = case._replace(labels=case.labels.where(case.labels != 102, 0))
    case.bias[last] = case.ref_bias[last] = -torch.inf
    mine = slice(0, 102) if rank == 0 else last
    part = case._replace(
        weight=case.weight[mine], ref_weight=case.ref_weight[mine], bias=case.bias[mine], ref_bias=case.ref_bias[mine]
    )
    truth, expected = whole(case, linear_epsilon_dpo)
    got, gradients = whole(part, linear_epsilon_dpo, vocab_group=dist.group.WORLD)
    worst = same(got, truth)
    for g, e in zip(gradients, (expected[0], expected[1][mine], expected[2][mine]), strict=True):
        worst = max(worst, relative_error(g, e) if e.count_nonzero() else g.abs().max().item())
    return worst


def kernels(rank: int, size: int) -> float:
    """Triton's kernels on slices, in fp32, by both routes."""
    mine = slice(0, 71) if rank == 0 else slice(71, 103)
    worst = 0.0
    for engines.LOGIT_FREE in (False, True):
        case = plant_first(make_case(2, bias=True, drift=0.2, seed=2))
        sliced = {name: getattr(case, name)[mine] for name in ("weight", "ref_weight", "bias", "ref_bias")}
        case, part = (c._replace(**dict(zip(c._fields, f32(c), strict=True))) for c in (case, case._replace(**sliced)))
        for function in (linear_epsilon_dpo, linear_pair_stats):
            truth, expected = whole(case, function, engine="torch", epsilon=0.1)
            options = {"max_tile_bytes": BUDGETS[2], "engine": "triton", "epsilon": 0.1}
            got, gradients = whole(part, function, vocab_group=dist.group.WORLD, **options)
            worst = max(worst, same(got, truth))
            for g, e in zip(gradients, (expected[0], expected[1][mine], expected[2][mine]), strict=True):
                worst = max(worst, relative_error(g, e))
    return worst


def f32(case):
    return [t.float() if t is not None and t.is_floating_point() else t for t in case]


def sequence(rank: int, size: int) -> float:
    """Tokens dealt to ranks at random; the last rank has none of the first pair, and in the end none at all."""
    worst = 0.0
    for round_, (pairs, budget) in enumerate(((3, BUDGETS[0]), (2, BUDGETS[2]), (1, BUDGETS[2]), (2, BUDGETS[0]))):
        case, cu_seqlens = pack(plant_first(make_case(pairs, length=11, bias=True, drift=0.2, seed=pairs)))
        completion = torch.arange(2 * pairs).repeat_interleave(cu_seqlens.diff())
        owner = torch.randint(0, size, completion.shape, generator=torch.Generator().manual_seed(pairs))
        owner[(completion % pairs == 0) & (owner == size - 1)] = 0
        if round_ == 3:
            owner[owner == size - 1] = 0
        mine = owner == rank
        part = case._replace(hidden=case.hidden[mine], labels=case.labels[mine], ref_hidden=case.ref_hidden[mine])
        counts = torch.stack([(completion[mine] == c).sum() for c in range(2 * pairs)])
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        for function in (linear_epsilon_dpo, linear_pair_stats):
            options = {"max_tile_bytes": budget, "logit_scale": 0.7}
            truth, expected = whole(case, function, cu_seqlens, **options)
            got, gradients = whole(part, function, bounds, sequence_group=dist.group.WORLD, **options)
            worst = max(worst, same(got, truth))
            worst = max(worst, relative_error(gradients[0], expected[0][mine]) if mine.any() else 0.0)
            for g, e in zip(gradients[1:], expected[1:], strict=True):
                dist.all_reduce(g)
                worst = max(worst, relative_error(g, e))
    return worst


def both(rank: int, size: int) -> float:
    """Two slices of the vocabulary × two parts of every completion, through the module, β and all."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    vocab_group, sequence_group = rows[rank // 2], columns[rank % 2]
    case = make_case(3, drift=0.3, seed=4)
    words = slice(0, 40) if rank % 2 == 0 else slice(40, 103)
    positions = slice(0, 3) if rank // 2 == 0 else slice(3, 7)
    part = case._replace(
        hidden=case.hidden[:, positions], ref_hidden=case.ref_hidden[:, positions], labels=case.labels[:, positions],
        weight=case.weight[words], ref_weight=case.ref_weight[words],
    )  # fmt: skip
    ours, theirs = EpsilonDPOLoss(), EpsilonDPOLoss()
    got = ours(*part.arguments()[0], vocab_group=vocab_group, sequence_group=sequence_group)
    truth = theirs(*case.arguments()[0])
    ours.update_beta(), theirs.update_beta()
    assert torch.equal(ours.beta, theirs.beta) and ours.beta != 0.1
    return same(got, truth)


def wrapped(rank: int, size: int) -> float:
    """The module within what DDP wraps, which sets all ranks' buffers to the first's before every forward."""

    class Model(torch.nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.layer, self.loss_fn = torch.nn.Linear(width, width).double(), EpsilonDPOLoss()

        def forward(self, hidden, *rest):
            return self.loss_fn(hidden + 0.1 * self.layer(hidden), *rest)

    cases = [make_case(3, drift=0.3, seed=seed) for seed in range(2 * size)]
    torch.manual_seed(0)
    alone = Model(cases[0].hidden.shape[-1])
    together = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    for case in cases:
        alone(*case.arguments()[0])
    for case in cases[2 * rank : 2 * rank + 2]:
        together(*case.arguments()[0]).loss.backward()
    counts = [module.loss_fn.counts for module in (alone, together.module)]
    dist.all_reduce(counts[1])
    assert counts[0].tolist() == counts[1].tolist() and counts[0].tolist()[0] and counts[0].tolist()[2], counts
    return 0.0


def nothing(rank: int, size: int) -> float:
    """Nothing scored on any rank: zeros, and nobody waits."""
    case = make_case(2, bias=True)
    case = case._replace(labels=torch.full_like(case.labels, -100))
    for group in ("vocab_group", "sequence_group"):
        out, gradients = whole(case, linear_epsilon_dpo, **{group: dist.group.WORLD})
        assert out.loss == 0 and all(g.count_nonzero() == 0 for g in gradients)
    return 0.0


def refused(rank: int, size: int) -> float:
    """A bad label on one rank stops all of them, and so does a completion that is empty on all."""
    case = make_case(2, masked=False)
    args, _ = case.arguments()
    bad = case.labels.clone()
    if rank == 1:
        bad[0, 0] = 103
    message = "labels: got 103" if rank == 1 else "refused on 1 other ranks of sequence_group"
    for labels, expected in ((bad, message), (case.labels.index_fill(0, torch.tensor([3]), -100), "rejected .* 1 ")):
        try:
            linear_epsilon_dpo(*args[:2], labels, *args[3:], sequence_group=dist.group.WORLD)
        except ValueError as error:
            assert re.search(expected, str(error)), error
        else:
            raise AssertionError("not refused")
    # Ranks that were not given the same pairs, or tokens, would wait for one another.
    more, longer = make_case(2 + rank, masked=False), make_case(2, length=7 + rank, masked=False)
    for group in ("vocab_group", "sequence_group"):
        pairs = rf"labels: got \[2, 3\] pairs on the ranks of {group}, takes the same pairs on all"
        tokens = r"labels: got \[28, 32\] tokens on the ranks of vocab_group, takes the same tokens on all"
        for unlike, expected in ((more, pairs), (longer, tokens))[: 2 if group == "vocab_group" else 1]:
            try:
                linear_epsilon_dpo(*unlike.arguments()[0], **{group: dist.group.WORLD})
            except ValueError as error:
                assert re.fullmatch(expected, str(error)), error
            else:
                raise AssertionError("not refused")
    return 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    worst = {name: globals()[name](dist.get_rank(), dist.get_world_size()) for name in sys.argv[2:]}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(worst))
    gloo.leave()
