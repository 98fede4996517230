"""A loop of one's own under FSDP2, as docs/migrating.md says: ``torchrun … fsdp_loop_worker.py TINY FOLDER HOW``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import gloo
from epsdpo_kernels import EpsilonDPOLoss
from epsdpo_kernels.integrations.transformers import frozen_reference, run_loss_in_forward


def main(tiny: Path, folder: Path, how: str) -> None:
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    loss_fn = EpsilonDPOLoss(beta=0.1, epsilon=0.05)
    if how == "in forward":
        run_loss_in_forward(policy, frozen_reference(reference), loss_fn)
    for layer in policy.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    assert isinstance(policy.lm_head.weight, DTensor)
    steps = []
    for path in sorted(folder.glob("batch-*.safetensors")):
        tensors = load_file(path)
        pairs = len(tensors["labels"]) // 2 // ranks
        rows = torch.cat([torch.arange(pairs) + rank * pairs + half * pairs * ranks for half in (0, 1)])
        ids, mask, labels = (tensors[key][rows] for key in ("input_ids", "attention_mask", "labels"))
        if how == "in forward":
            out = policy(input_ids=ids, attention_mask=mask, pair_labels=labels)
        else:
            hidden = policy.model(ids, mask).last_hidden_state
            ref_hidden = reference.model(ids, mask).last_hidden_state
            out = loss_fn(hidden, policy.lm_head.weight, labels, ref_hidden, reference.lm_head.weight)
        out.loss.backward()
        optimizer.step(), optimizer.zero_grad(), loss_fn.update_beta()
        steps.append(out.step)
    weights = {name: p.full_tensor().detach() for name, p in policy.named_parameters()}
    if rank == 0:
        save_file(weights | {"beta": loss_fn.beta, "step": torch.cat(steps)}, folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    gloo.leave_at_once()
