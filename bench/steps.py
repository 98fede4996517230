"""The whole optimizer step: TRL's DPOTrainer, EpsilonDPOTrainer on padded rows, and the same on packed ones.

    python -m bench.steps DATA [times | memory | longest | lengths …]

DATA is a file of pairs, as HH-RLHF has them. Model and reference are SmolLM2-135M, fp32. A step is forward of both
models, loss, backward, and the optimizer's update. Each figure is written as it comes; the same command goes on where
it was stopped. On a GPU the same steps are a part of bench.gpu: bf16 models of random weights, and random tokens in
HH's lengths, so that neither model nor data has to be there.

    times    variants interleaved in one process a case; a round is one batch, the same for all
    memory   peak of one step, a process each
    longest  tokens of a pair, 7/8 of them prompt, up to the first that needs more than 20 GiB; hours on two cores
    lengths  writes hh_lengths.json, the tokens of DATA's first pairs
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from . import measure
from .cases import MODELS

VARIANTS = ("trl", "padded", "packed")
# (pairs a batch, rounds)
CASES = {"hh": (4, 12), "long prompts": (4, 5), "nothing to save": (4, 5)}
# Tokens of prompt, chosen and rejected; HH's are its own.
LENGTHS = {"long prompts": (512, 64, 64), "nothing to save": (1, 160, 160)}
# [prompt, chosen, rejected] of HH's first pairs, for machines that have neither the data nor the tokenizer.
HH_LENGTHS = Path(__file__).with_name("hh_lengths.json")
HH_PAIRS = 128
# On a GPU: model, case, pairs a batch, rounds.
ON_GPU = (
    ("SmolLM2-135M", "hh", 16, 6),
    ("Llama-3.2-1B", "hh", 16, 6),
    ("Llama-3.2-1B", "long prompts", 8, 6),
)
LONGEST = 20 << 30  # bytes of the whole process
START, STEP = 2048, 1.25
PATIENCE = 1800.0  # seconds; where the next step would take longer, it is not made

Pair = dict[str, list[int]]


def hh_pairs(data: str, tokenizer: Any, count: int) -> list[Pair]:
    """The first pairs of the file, in its order and through the chat template."""
    from train.data import load_pairs

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    with tempfile.NamedTemporaryFile("wb", suffix=".jsonl") as head, redirect_stdout(sys.stderr):
        with gzip.open(data) if data.endswith(".gz") else open(data, "rb") as whole:
            head.writelines(islice(whole, 2 * count))  # some rows are no pairs
        head.flush()
        pairs, _ = load_pairs(head.name, tokenizer, max_length=1024, max_prompt_length=512)
    return [{name: list(pairs[i][name]) for name in names} for i in range(min(count, len(pairs)))]


def cut_pairs(text: list[int], lengths: tuple[int, int, int], count: int) -> list[Pair]:
    """Pairs of given lengths out of one long text."""
    pairs, start = [], 0
    for _ in range(count):
        pair = {}
        for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True):
            pair[name] = [text[(start + i) % len(text)] for i in range(length)]
            start += length
        pairs.append(pair)
    return pairs


def warm_up(count: int) -> list[Pair]:
    """Small pairs, for a first step that makes the optimizer's states."""
    return cut_pairs(list(range(5, 500)), (8, 4, 4), count)


def make_pairs(data: str, tokenizer: Any, case: str, count: int) -> list[Pair]:
    if case == "hh":
        return hh_pairs(data, tokenizer, count)
    text = [token for pair in hh_pairs(data, tokenizer, 200) for ids in pair.values() for token in ids]
    return cut_pairs(text, LENGTHS[case], count)


def make_trainer(variant: str, model: Any, tokenizer: Any) -> Any:
    """A trainer that is ready for a step on its own copies of a model; it wants a data set, and is given batches.

    On a GPU it computes as TRL's does by default, in bf16.
    """
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer

    on_cpu = model.device.type == "cpu"
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_length": None, "report_to": "none", "use_cpu": on_cpu,
        "bf16": not on_cpu, "disable_tqdm": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    }  # fmt: skip
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer_class, config = DPOTrainer, DPOConfig(**options)
    if variant != "trl":
        trainer_class, config = EpsilonDPOTrainer, EpsilonDPOConfig(**options, packed=variant == "packed")
    # Copies of a model that no trainer has had: each puts a forward of its own on its models.
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    with redirect_stdout(sys.stderr):
        trainer = trainer_class(policy, reference, config, train_dataset=words, processing_class=tokenizer)
    trainer.create_optimizer()
    return trainer


def step(trainer: Any, pairs: list[Pair]) -> None:
    """One optimizer step on a batch of pairs."""
    # What Trainer's loop does around a step of one micro-batch, which accelerate's loader has put on the device.
    batch = trainer._prepare_inputs(trainer.data_collator(pairs))
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = 1
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batch, items)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def model_and_tokenizer() -> tuple[Any, Any]:
    from train.models import load_model

    return load_model("smollm2-135m", "float32")


def random_model(name: str, device: str) -> Any:
    """A model of one of MODELS' shapes and of random weights: a step takes as long with them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODELS[name], max_position_embeddings=1 << 17)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def words_tokenizer() -> Any:
    """A tokenizer for a trainer to hold; the batches are of token ids."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "a", "b", "c"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def random_pairs(case: str, count: int, vocabulary: int) -> list[Pair]:
    """Pairs of random tokens, in HH's lengths or in the case's."""
    lengths = json.loads(HH_LENGTHS.read_text()) if case == "hh" else [LENGTHS[case]]
    g = torch.Generator().manual_seed(0)
    return [
        {name: torch.randint(3, vocabulary, (length,), generator=g).tolist()
         for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), each, strict=True)}
        for each in islice(cycle(lengths), count)
    ]  # fmt: skip


def time_case(data: str, case: str, first: int) -> Iterator[dict[str, Any]]:
    """A record a round of a case on the CPU, from round ``first`` on."""
    size, rounds = CASES[case]
    model, tokenizer = model_and_tokenizer()
    pairs = make_pairs(data, tokenizer, case, size * rounds)
    trainers = {variant: make_trainer(variant, model, tokenizer) for variant in VARIANTS}
    for trainer in trainers.values():
        step(trainer, warm_up(size))
    for i in range(first, rounds):
        yield {"round": i} | time_round(trainers, pairs[size * i : size * (i + 1)], i, "cpu")


def time_round(trainers: dict[str, Any], batch: list[Pair], i: int, device: str) -> dict[str, Any]:
    """Tokens of the batch and every variant's seconds of a step on it; round ``i`` says which of them goes first."""
    taken = {}
    for variant in VARIANTS[i % 3 :] + VARIANTS[: i % 3]:
        gc.collect()
        taken[variant] = measure.seconds(partial(step, trainers[variant], batch), device)
    lengths = [[len(ids) for ids in pair.values()] for pair in batch]
    padded = 2 * len(batch) * max(p + max(c, r) for p, c, r in lengths)
    return {"tokens": {"padded": padded, "packed": sum(map(sum, lengths))}, "seconds": taken}


def memory_of(data: str, variant: str, case: str, length: int = 0) -> dict[str, Any]:
    """Peak of one step beyond what was held before it, of the whole process, and its seconds."""

    def work() -> dict[str, Any]:
        model, tokenizer = model_and_tokenizer()
        if length:
            answer = length // 8
            text = [token for pair in hh_pairs(data, tokenizer, 200) for ids in pair.values() for token in ids]
            batch = cut_pairs(text, (length - answer, answer, answer), 1)
        else:
            size, rounds = CASES[case]
            pairs = make_pairs(data, tokenizer, case, size * rounds)
            # The batch with the longest row.
            batches = [pairs[size * i : size * (i + 1)] for i in range(rounds)]
            batch = max(batches, key=lambda b: max(sum(map(len, pair.values())) for pair in b))
        trainer = make_trainer(variant, model, tokenizer)
        # The optimizer's states are there from its first step on.
        step(trainer, warm_up(len(batch)))
        taken: list[float] = []
        peak = measure.peak_bytes(lambda: taken.append(measure.seconds(lambda: step(trainer, batch), "cpu")), "cpu")
        return {"bytes": peak, "process": measure._status("VmHWM"), "seconds": taken[0]}

    if length:
        resource.setrlimit(resource.RLIMIT_DATA, (LONGEST, LONGEST))
    return measure.outcome(work)


def in_process(*arguments: str) -> Iterator[dict[str, Any]]:
    """Runs this file in a process of its own, and gives every record as it comes."""
    command = [sys.executable, "-m", "bench.steps", "--here", *arguments]
    with subprocess.Popen(
        command, cwd=measure.ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode < 0:
        yield {"outcome": "out of memory", "reason": f"killed by signal {-process.returncode}"}
    elif process.returncode:
        raise RuntimeError(f"bench.steps {' '.join(arguments)}: exit status {process.returncode}")


def times(data: str, results: measure.Results, progress: measure.Progress) -> None:
    for case, (_, rounds) in CASES.items():
        done = sum(r["kind"] == "step" and r["case"] == case for r in results.data["records"])
        if done < rounds:
            for record in in_process("times", data, case, str(done)):
                results.add(kind="step", case=case, **record)
                said = ", ".join(f"{name} {s:.2f} s" for name, s in record["seconds"].items())
                progress(f"{case}, round {record['round'] + 1} of {rounds}: {said}")


def memories(data: str, results: measure.Results, progress: measure.Progress) -> None:
    for case in CASES:
        for variant in VARIANTS:
            if results.find(kind="step memory", case=case, variant=variant) is None:
                for record in in_process("memory", data, variant, case, "0"):
                    results.add(kind="step memory", case=case, variant=variant, **record)
                    progress(f"{case}, {variant}: {record}")


def longest(data: str, results: measure.Results, progress: measure.Progress) -> None:
    """Climbs by a quarter, rounded to 256 tokens, to the first length that does not fit."""
    for variant in VARIANTS:
        length, last = START, None
        while last is None or last["outcome"] == "ok":
            last = results.find(kind="longest", variant=variant, length=length)
            if last is None:
                (outcome,) = in_process("memory", data, variant, "longest", str(length))
                last = results.add(kind="longest", variant=variant, length=length, **outcome)
                progress(f"longest, {variant}, {length} tokens: {outcome}")
            if last["outcome"] == "ok" and last["seconds"] * STEP**2 > PATIENCE:
                break
            length = round(length * STEP / 256) * 256


def lengths(data: str, results: measure.Results, progress: measure.Progress) -> None:
    _, tokenizer = model_and_tokenizer()
    pairs = hh_pairs(data, tokenizer, HH_PAIRS)
    HH_LENGTHS.write_text(json.dumps([[len(ids) for ids in pair.values()] for pair in pairs]) + "\n")
    progress(f"{HH_LENGTHS.name}: {len(pairs)} pairs")


def faster(rounds: list[measure.Record], variant: str) -> dict[str, float]:
    """How many times the packed step's time a variant takes, round by round."""
    return measure.ratio([r["seconds"][variant] for r in rounds], [r["seconds"]["packed"] for r in rounds])


def here(what: str, data: str, *rest: str) -> None:
    """A child's part: records on standard output."""
    if what == "times":
        for record in time_case(data, rest[0], int(rest[1])):
            print(json.dumps(record), flush=True)
    else:
        print(json.dumps(memory_of(data, rest[0], rest[1], int(rest[2]))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="pairs as HH-RLHF has them: .jsonl or .jsonl.gz")
    parser.add_argument(
        "what", nargs="*", default=[], help="times, memory, longest, lengths; by default the first three"
    )
    if sys.argv[1:2] == ["--here"]:
        return here(*sys.argv[2:])
    options = parser.parse_args()
    parts = {"times": times, "memory": memories, "longest": longest, "lengths": lengths}
    if unknown := set(options.what) - set(parts):
        parser.error(f"{', '.join(sorted(unknown))}: takes {', '.join(parts)}")
    results = measure.Results(measure.RESULTS / measure.device_name("cpu") / "steps.json", "cpu")
    progress = measure.Progress()
    data = os.path.abspath(options.data)
    for name, run in parts.items():
        if name in (options.what or ("times", "memory", "longest")):
            run(data, results, progress)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
