"""What tests/test_trl_distributed.py runs in several processes: ``torchrun … trl_worker.py FOLDER``.

The folder holds the arguments of a run as JSON; its log and the full weights at the end go back into it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import transformers
import trl.trainer.base_trainer
from accelerate import ParallelismConfig
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import gloo
import trl_runs
import vision
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer
from fsdp_on_cpu import shard_on_cpu
from tensor_on_cpu import split_on_cpu
from zero_on_cpu import zero_on_cpu


def data(job: dict, pairs: int, split: str):
    """The job's first pairs, about pictures where it names a model that sees; a stream where it names the split."""
    found = trl_runs.pairs(Path(job["tiny"]), pairs)
    if job["long"]:  # so many of the first have a prompt that fills max_length
        found = found.map(lambda row, i: {"prompt": row["prompt"] * (30 if i < job["long"] else 1)}, with_indices=True)
    if job["sees"]:
        found = vision.pairs(job["sees"], found, pairs)
    if split not in job["streams"]:
        return found
    stream = found.to_iterable_dataset(job["shards"])
    return split_dataset_by_node(stream, rank=int(os.environ["RANK"]), world_size=2) if job["by_node"] else stream


def whole(p: Tensor) -> Tensor:
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(p):
            return p.detach().clone()
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def main(folder: Path) -> None:
    trl.trainer.base_trainer.send_telemetry = lambda *_, **__: None
    job = json.loads((folder / "job.json").read_text())
    if job["options"].get("fsdp"):
        shard_on_cpu(EpsilonDPOTrainer)
    if job["options"].get("deepspeed"):
        zero_on_cpu()
    split = DistributedConfig(tp_size=2) if job["tensor"] else None
    if job["tensor"]:
        split_on_cpu()
    if job["tensor"] == "both":  # TRL loads the reference as it does the policy
        job["options"]["model_init_kwargs"] = {"distributed_config": split, "dtype": "float32"}
    if sizes := job["options"].get("parallelism_config"):
        job["options"]["parallelism_config"] = ParallelismConfig(**sizes)
    args = EpsilonDPOConfig(**job["options"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tiny"])
    models = [job["tiny"] if job["tensor"] == "both" else trl_runs.model(Path(job["tiny"]), split), None]
    if job["sees"]:
        tokenizer = vision.processor(job["sees"], job["tiny"])
        image = tokenizer.tokenizer.convert_tokens_to_ids("<image>")
        models = [vision.build(job["sees"], image) for _ in models]
    trainer = EpsilonDPOTrainer(
        *models,
        args=args,
        data_collator=trl_runs.Masked(job["masked"], args.process_index, args.world_size) if job["masked"] else None,
        train_dataset=data(job, job["pairs"], "train"),
        eval_dataset=data(job, 7, "eval"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if job["lora"] else None,
    )
    for _ in range(job["trainings"]):
        trainer.train(resume_from_checkpoint=job.get("resume"))
    if "test" in job["streams"]:
        trainer.predict(data(job, 7, "test"))
    if job["given"]:
        pairs = Dataset.from_list(trl_runs.pairs(Path(job["tiny"]), 12).to_list())
        trainer.evaluate(pairs.select(range(7)))
        trainer.evaluate(pairs.select(range(7)).to_iterable_dataset())
        trainer.evaluate(pairs.select(range(7, 12)).to_iterable_dataset())
    parameters = dict(trainer.model.named_parameters())
    sharded = sorted(name for name, p in parameters.items() if isinstance(p, DTensor) or hasattr(p, "ds_id"))
    weights = {name: whole(p) for name, p in parameters.items() if p.requires_grad}
    facts = {"evaluation": trainer.evaluate(), "log": trainer.state.log_history, "sharded": sharded}
    facts["packed"] = trainer.packed
    if trainer.is_world_process_zero():
        save_file(weights, folder / "weights.safetensors")
        (folder / "result.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gloo.leave_at_once()
