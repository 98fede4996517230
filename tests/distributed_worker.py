"""What tests/test_distributed.py runs in several processes: ``torchrun … distributed_worker.py CASE FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import gloo
from epsdpo_kernels import EpsilonDPOLoss
from epsdpo_kernels.integrations.checks import NotFiniteError
from epsdpo_kernels.integrations.transformers import causal_lm, frozen_reference, run_loss_in_forward
from fsdp_on_cpu import shard_on_cpu
from tensor_on_cpu import split_on_cpu
from train.__main__ import build, leave_process_group, main
from train.options import parse
from train.trainer import PairTrainer
from zero_on_cpu import zero_on_cpu


def ddp(folder: Path) -> None:
    """The trainer, with the flags that the folder holds."""
    trainer = main(json.loads((folder / "flags.json").read_text()))
    assert trainer.args.world_size == torch.distributed.get_world_size()


def tensor(folder: Path) -> None:
    """The same, its model's layers and vocabulary split by transformers."""
    split_on_cpu()
    trainer = main(json.loads((folder / "flags.json").read_text()))
    head = trainer.model.get_output_embeddings().weight
    assert isinstance(head, DTensor) and len(head.to_local()) < len(head)


def fsdp(folder: Path) -> None:
    """The same, sharded by accelerate's own FSDP2."""
    shard_on_cpu(PairTrainer)
    trainer = main(json.loads((folder / "flags.json").read_text()))
    assert all(isinstance(p, DTensor) for model in trainer._models for p in model.parameters())


def zero(folder: Path) -> None:
    """The same in DeepSpeed's hands; ZeRO-3 splits every weight of policy and reference."""
    zero_on_cpu()
    trainer = main(json.loads((folder / "flags.json").read_text()))
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    for model in trainer._models:
        assert {hasattr(p, "ds_id") for p in model.parameters()} == {stage == 3}
        # The head is not gathered by DeepSpeed's getter, which would keep it to the end of backward.
        kept = {key for module in model.modules() for key in getattr(module, "_external_params", ())}
        assert not kept & {id(p) for p in causal_lm(model).get_output_embeddings().parameters()}


class BreakingAfter(TrainerCallback):
    """From the second step on the gradient of the first weight is NaN."""

    def on_step_end(self, args, state, control, model, **kwargs):
        next(iter(model.parameters())).register_hook(lambda gradient: gradient * torch.nan)


def broken(folder: Path) -> None:
    """A gradient that is not finite, in DeepSpeed's hands."""
    zero_on_cpu()
    trainer = build(*parse(json.loads((folder / "flags.json").read_text())))
    trainer.add_callback(BreakingAfter())
    try:
        trainer.train()
    except NotFiniteError as error:
        (folder / "error.txt").write_text(str(error))


class BreakingOnOne(TrainerCallback):
    """From the third step on a weight of the first rank alone is NaN."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 2 and args.process_index == 0:
            with torch.no_grad():
                model.model.norm.weight.fill_(torch.nan)


def broken_on_one(folder: Path) -> None:
    """A loss that is not finite, on one rank of two."""
    trainer = build(*parse(json.loads((folder / "flags.json").read_text())))
    trainer.add_callback(BreakingOnOne())
    try:
        trainer.train()
    except NotFiniteError as error:
        (folder / f"error-{trainer.args.process_index}.txt").write_text(str(error))


class InTiles(EpsilonDPOLoss):
    """A tile holds a few tokens only, so that a call has many."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, max_tile_bytes=1 << 10)


def policy(folder: Path) -> tuple[torch.nn.Module, EpsilonDPOLoss]:
    """The folder's model, its loss within its forward; the reference is a perturbed copy."""
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    loss_fn = InTiles(0.1, 0.05)
    run_loss_in_forward(model, frozen_reference(reference), loss_fn)
    return model, loss_fn


def gradients(folder: Path) -> None:
    """One step's gradients, a micro-batch a rank, with the model wrapped as the folder says."""
    facts = json.loads((folder / "facts.json").read_text())
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, loss_fn = policy(Path(facts["model"]))
    wrapped = model
    if facts["wrap"] == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        # A head that is sharded apart is not gathered by anybody's forward; else the root gathers it.
        for part in (*model.model.layers, *([model.lm_head] if facts["wrap"] == "head apart" else [])):
            fully_shard(part)
        fully_shard(model)
    counted = count_gathers()
    batch = load_file(folder / f"batch-{rank}.safetensors")
    out = wrapped(**batch)
    scored = int((batch["pair_labels"] != -100).any()) * len(batch["row"])
    (out.loss * (scored * world / facts["pairs"])).backward()
    assert len(counted) == (facts["wrap"] == "head apart"), counted
    loss_fn.update_beta()
    found = {"beta": loss_fn.beta}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor) == (facts["wrap"] != "ddp"), name
        found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    steps = [torch.zeros_like(out.step) for _ in range(world)]
    torch.distributed.all_gather(steps, out.step)
    if rank == 0:
        save_file(found | {"step": torch.cat(steps)}, folder / "found.safetensors")


def count_gathers() -> list[tuple[int, ...]]:
    """The shapes of parameters that are gathered by hand from now on."""
    shapes: list[tuple[int, ...]] = []
    full_tensor = DTensor.full_tensor

    def counting(self, **kwargs):
        if "grad_placements" in kwargs:
            shapes.append(tuple(self.shape))
        return full_tensor(self, **kwargs)

    DTensor.full_tensor = counting
    return shapes


if __name__ == "__main__":
    cases = {
        "ddp": ddp, "fsdp": fsdp, "tensor": tensor, "zero": zero, "broken": broken, "broken on one": broken_on_one,
        "gradients": gradients,
    }  # fmt: skip
    cases[sys.argv[1]](Path(sys.argv[2]))
    if sys.argv[1] == "ddp":
        gloo.leave(leave_process_group)
    else:
        gloo.leave_at_once()
