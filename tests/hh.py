"""A run of TRL on real pairs, killed twice: what tests/test_trl_hh.py and the browser's test look at.

`python tests/hh.py FOLDER [resume]` trains in FOLDER, and kills itself as FOLDER/kill.json says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import torch
import transformers

import trl_runs

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "hh_harmless.jsonl.gz"
STEPS, PAIRS, SEED = 30, 120, 3
SAME = {
    "max_length": 320, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.0, "warmup_steps": 0,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "epsilon": 0.05,
    "save_steps": 5, "seed": SEED,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """A tiny model, a tokenizer that has learnt from the data, and short pairs of them as prompt and completions."""
    import tokenizers

    from epsdpo_kernels.record import rows, sources

    found = []
    for _, record in rows.read_rows(str(DATA), "train"):
        try:
            pair = sources.pair_of(record)
        except sources.NoPair:
            continue
        # So short that nothing has to be cut.
        if len(pair.prompt) < 200 and max(len(pair.chosen), len(pair.rejected)) < 100:
            found.append({name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")})
        if len(found) == PAIRS:
            break
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    learn = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator((text for row in found for text in row.values()), learn)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def train(folder: Path, resume: bool) -> None:
    from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer
    from train.trainer import PairSampler

    # The batches of python -m train.
    data = datasets.load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    data = data.select(list(PairSampler(PAIRS, 1, SEED)))
    args = EpsilonDPOConfig(**trl_runs.options(
        folder / "run", **SAME, save_strategy="steps", train_sampling_strategy="sequential"
    ))  # fmt: skip
    trainer = EpsilonDPOTrainer(
        model=trl_runs.model(folder), args=args, train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()


def kill_at(moment: dict) -> None:
    """Has this process killed when it writes its n-th part, or in the middle of a step."""
    if "part" in moment:
        rename, written = os.replace, []

        def replace(source, target):
            if "part-" in str(target):
                written.append(target)
                if len(written) == moment["part"]:
                    os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace
    else:
        from epsdpo_kernels.integrations.trl import EpsilonDPOTrainer

        step = EpsilonDPOTrainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == moment["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)

        EpsilonDPOTrainer.training_step = training_step


def launch(folder: Path, moment: dict, resume: bool) -> int:
    """The exit status of a run in a process of its own that is killed at a moment."""
    (folder / "kill.json").write_text(json.dumps(moment))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(folder), *(["resume"] if resume else [])]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    kill_at(json.loads((Path(sys.argv[1]) / "kill.json").read_text()))
    train(Path(sys.argv[1]), resume="resume" in sys.argv)
