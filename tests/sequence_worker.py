"""What tests/test_sequence.py runs in several processes: rows whose tokens are on several ranks, against whole rows."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.functional import pad

import gloo
import test_packing
from cases import relative_error
from epsdpo_kernels import linear_epsilon_dpo
from epsdpo_kernels.integrations import attention, sequence
from epsdpo_kernels.integrations.attention import pack_rows, take_segments
from epsdpo_kernels.integrations.packing import pack
from epsdpo_kernels.integrations.transformers import head_inputs
from test_models import MODELS, SMALL, build
from test_packing import LENGTHS, MORE, OPTIONS, all_float64, dense, padded, shifted

# Rows of which some rank of four has no scored token, or no token at all; and one in which some rank of four has no
# position past 7, from where "longrope" is another rotation.
ROWS = [LENGTHS, [(3, 2, 1)], [(1, 1, 1)], [(3, 7, 1)]]
CPU = torch.device("cpu")
SINKS = torch.linspace(-1, 2, 8, dtype=torch.float64)


def attended(rank: int, ranks: int) -> float:
    """The attention function alone: as many keys as ranks, fewer, one; values of another width."""
    worst = 0.0
    for lengths, kv_heads, name in product(ROWS, (8, 4, 2, 1), OPTIONS):
        tokens = sum(map(sum, lengths))
        place, n = torch.arange(rank, tokens, ranks), -(-tokens // ranks) + 1
        whole = test_packing.row(lengths, heads=8, kv_heads=kv_heads, value_width=5)
        options = OPTIONS[name] | ({"sinks": SINKS} if "sinks" in OPTIONS[name] else {})
        expected = dense(*whole, lengths, **options)
        own = [pad(t.detach()[:, :, place], (0, 0, 0, n - len(place)), value=3.0).requires_grad_() for t in whole]
        segments = replace(test_packing.segments(lengths), group=dist.group.WORLD)
        out, _ = attention.packed_attention(
            "sdpa", nn.Identity(), *own, None, segments=segments, **test_packing.arguments(**options)
        )
        assert out.shape == (1, n, 8, 5)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=expected.dtype)
        gradients = torch.autograd.grad((expected * weights).sum(), whole)
        weights = pad(weights[:, place], (0, 0, 0, 0, 0, n - len(place)), value=1.0)
        for got, truth in zip(
            (out.transpose(1, 2), *torch.autograd.grad((out * weights).sum(), own)),
            (expected.transpose(1, 2), *gradients),
            strict=True,
        ):
            assert got[:, :, len(place) :].count_nonzero() == 0
            if len(place):
                worst = max(worst, relative_error(got[:, :, : len(place)], truth[:, :, place]))
    return worst


def make(name: str):
    """A small model in float64, of either table."""
    if name in MODELS:
        model = build(name, torch.float64)
    else:
        config_class, more = MORE[name]
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**(SMALL | {"max_position_embeddings": 32} | more))
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    take_segments(model)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # torch's grouped products have no float64
    return model


def run(policy, reference, row):
    """Loss, results and the policy's gradients of a packed row, or of this rank's share with gradients summed up."""
    with all_float64():
        ours = head_inputs(policy, row.input_ids, row)
        with torch.no_grad():
            ref = head_inputs(reference, row.input_ids, row)
    out = linear_epsilon_dpo(
        ours.hidden, ours.weight, row.labels, ref.hidden, ref.weight, bias=ours.bias, ref_bias=ref.bias,
        logit_scale=ours.logit_scale, softcap=ours.softcap, cu_seqlens=row.cu_seqlens, epsilon=0.05,
        sequence_group=row.segments.group,
    )  # fmt: skip
    loss = out.loss if ours.router_loss is None else out.loss + ours.router_loss
    gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    if row.segments.group is not None:
        for gradient in gradients:
            if gradient is not None:
                dist.all_reduce(gradient)
    return loss, out, gradients


def models(rank: int, ranks: int) -> float:
    """Whole models: windows, softcaps, sinks, latent attention, experts, rotary scalings by the longest position."""
    worst = 0.0
    for name in ("Llama tied", "Gemma2", "Mistral", "Mixtral", "gpt-oss", "DeepSeek-V3", "dynamic", "longrope"):
        policy, reference = make(name), shifted(make(name))
        for lengths in ROWS:
            row = pack(*padded(lengths))
            own = sequence.share(row, dist.group.WORLD, CPU)
            assert own.rows()[0].tolist() == row.rows()[0].tolist()
            loss, out, gradients = run(policy, reference, row)
            shared, results, shared_gradients = run(policy, reference, own)
            assert torch.equal(results.step, out.step)
            worst = max(worst, relative_error(shared, loss))
            for got, truth in zip(results, out, strict=True):
                if truth.is_floating_point():
                    worst = max(worst, (got - truth).abs().max().item())
            for got, truth in zip(shared_gradients, gradients, strict=True):
                assert (got is None) == (truth is None)
                if truth is not None:  # of answers that are the same token it is rounding
                    worst = max(worst, ((got - truth).norm() / (truth.norm() + 1e-6)).item())
    return worst


def measured(rank: int, ranks: int) -> float:
    """What a run finds out before it begins: heads that cannot be dealt out, and a forward that is not the whole's."""
    group = dist.group.WORLD
    assert pack_rows([build("Llama"), shifted(build("Mixtral"))], group) is None
    reason = pack_rows([build("Llama", more={"num_attention_heads": 2, "num_key_value_heads": 1})], group)
    assert reason == "ValueError: sp_size: got 4, takes a divisor of the model's 2 attention heads", reason
    exact = sequence.all_heads
    sequence.all_heads = lambda x, group: exact(x, group).roll(1, 2)
    assert "with a row's tokens on several ranks, the hidden states of LlamaFor" in pack_rows([build("Llama")], group)
    sequence.all_heads = exact
    return 0.0


def differ(rank: int, ranks: int) -> float:
    """Ranks that were given different pairs hear of it, all of them."""
    ids, mask, labels = padded(LENGTHS)
    ids[0, 0] += rank == ranks - 1
    try:
        sequence.share(pack(ids, mask, labels), dist.group.WORLD, CPU)
    except ValueError as error:
        assert re.search("train_dataset, data_collator: the ranks that share a row", str(error))
    else:
        raise AssertionError("not refused")
    return 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    worst = {name: globals()[name](dist.get_rank(), dist.get_world_size()) for name in sys.argv[2:]}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(worst))
    gloo.leave()
