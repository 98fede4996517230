"""Whose decisions are float64's: steps, gradients and β by dtype and variant, against drift from the reference.

    python -m bench.fidelity [synthetic | model] [--out FILE]

Truth is float64 from the very inputs that a variant gets. A step that differs from it counts as wrong unless a shift
lies below the fp32 bound, where fp32 sums may fall either way; those pairs are counted apart. The model is
SmolLM2-135M, trained for some steps of DPO on real pairs and asked about pairs that it was not trained on.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epsdpo_kernels import epsilon_dpo_reference, linear_epsilon_dpo
from epsdpo_kernels.pair import perturbation_step

from . import measure, variants
from .cases import Inputs
from .variants import BETA, EPSILON

DATA = measure.ROOT.parent / "shared" / "data" / "hh_harmless.jsonl.gz"
STATES = measure.ROOT / "build" / "fidelity"
DRIFTS = (0.003, 0.01, 0.03, 0.1, 0.3)
STEPS = (1, 3, 10, 30)
HELD_OUT, MAX_LENGTH, PAIRS_A_STEP, LEARNING_RATE = 60, 96, 2, 5e-6
GRADIENT_PAIRS = 3
RESUME = "resume.safetensors"


def ours(inputs: Inputs) -> tuple[Tensor, ...]:
    out = linear_epsilon_dpo(*inputs[:5], beta=BETA, epsilon=EPSILON)
    return out.step, out.relaxed_shift, out.tightened_shift


def throughout(inputs: Inputs) -> tuple[Tensor, ...]:
    """Logits, log-softmaxes and sums all in the inputs' dtype."""
    out = epsilon_dpo_reference(*inputs[:5], beta=BETA, epsilon=EPSILON)
    return out.step, out.relaxed_shift, out.tightened_shift


def rounded_logits(inputs: Inputs) -> tuple[Tensor, ...]:
    """Logits in the inputs' dtype, as a model's head gives them under mixed precision; all that follows in fp32."""
    a, b = (
        (x.detach() @ w.detach().t()).float()
        for x, w in ((inputs.hidden, inputs.weight), (inputs.ref_hidden, inputs.ref_weight))
    )
    index, scored = inputs.labels.clamp_min(0)[..., None], inputs.labels != -100

    def ratio(logits: Tensor) -> Tensor:
        chosen, rejected = (logits.log_softmax(-1).gather(-1, index)[..., 0] * scored).sum(-1).chunk(2)
        return chosen - rejected

    z = ratio(a)
    shifts = (ratio((1 + EPSILON) * a - EPSILON * b) - z, ratio((1 - EPSILON) * a + EPSILON * b) - z)
    return perturbation_step(*shifts), *shifts


def composed(inputs: Inputs) -> tuple[Tensor, ...]:
    *_, shifts = variants.composed_parts(inputs)
    return perturbation_step(*shifts), *shifts


# (variant, dtype of the head's inputs)
DECIDERS: dict[str, tuple[Callable[[Inputs], tuple[Tensor, ...]], torch.dtype]] = {
    "ours, fp32": (ours, torch.float32),
    "ours, bf16": (ours, torch.bfloat16),
    "ours, fp16": (ours, torch.float16),
    "all logits, fp32 throughout": (throughout, torch.float32),
    "bf16 logits, then fp32": (rounded_logits, torch.bfloat16),
    "composed from a log-prob kernel, bf16": (composed, torch.bfloat16),
    "bf16 throughout": (throughout, torch.bfloat16),
}


def fp32_bound(inputs: Inputs) -> Tensor:
    """(B,) |shift| below which fp32 may decide otherwise: half a dozen roundings a token, of random sign."""
    largest = float((inputs.hidden @ inputs.weight.t()).abs().max())
    tokens = (inputs.labels != -100).sum(1).view(2, -1).sum(0).double()
    return 6 * EPSILON * 2**-24 * largest * tokens.sqrt()


def cast(inputs: Inputs, dtype: torch.dtype, grad: bool = False) -> Inputs:
    make = lambda t, g=False: t.detach().to(dtype, copy=True).requires_grad_(g)  # noqa: E731
    hidden, weight = make(inputs.hidden, grad), make(inputs.weight, grad)
    return Inputs(hidden, weight, inputs.labels, make(inputs.ref_hidden), make(inputs.ref_weight), None)


def gradients(loss: Callable[[Inputs], Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    own = cast(inputs, dtype, grad=True)
    return list(torch.autograd.grad(loss(own), [own.hidden, own.weight]))


def _gradients_record(loss: Callable[[Inputs], Tensor], inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    return {"g": gradients(loss, inputs, dtype)}


# What a training step would use, by variant: the gradient of plain DPO at the same β, so that a wrong step does not
# hide a rounding error or the other way round.
GRADIENTS: dict[str, tuple[Callable[[Inputs], Tensor], torch.dtype]] = {
    "ours, fp32": (lambda i: variants.ours(i, epsilon=0.0), torch.float32),
    "ours, bf16": (lambda i: variants.ours(i, epsilon=0.0), torch.bfloat16),
    "bf16 throughout": (lambda i: epsilon_dpo_reference(*i[:5], beta=BETA, epsilon=0.0).loss, torch.bfloat16),
    "trl, bf16": (variants.trl, torch.bfloat16),
    "liger, bf16": (variants.liger, torch.bfloat16),
    "torch, bf16": (variants.torch_cross_entropy, torch.bfloat16),
}


def decide_all(batches: Iterable[Inputs], report: Callable[[str], None], what: str) -> dict[str, Any]:
    """Counts of right and wrong steps of every variant, and gradient errors on the first pairs.

    Inputs have values that bf16 holds exactly, so that every dtype sees the same numbers.
    """
    wrong: Counter[str] = Counter()
    near_wrong: Counter[str] = Counter()
    pairs, near_count = 0, 0
    margins: list[float] = []
    steps: dict[str, Counter[int]] = {name: Counter() for name in ("float64", *DECIDERS)}
    errors: dict[str, list[list[float]]] = {name: [] for name in GRADIENTS}
    for inputs in batches:
        with torch.no_grad():
            double = cast(inputs, torch.float64)
            truth = epsilon_dpo_reference(*double[:5], beta=BETA, epsilon=EPSILON)
            bound = fp32_bound(double)
            near = torch.minimum(truth.relaxed_shift.abs(), truth.tightened_shift.abs()) < bound
            steps["float64"].update(truth.step.tolist())
            margins += (truth.chosen_rewards - truth.rejected_rewards).abs().div(BETA).tolist()
            pairs += len(near)
            near_count += int(near.sum())
            for name, (decider, dtype) in DECIDERS.items():
                if dtype == torch.float16 and max(t.abs().max() for t in (inputs.hidden, inputs.weight)) > 6e4:
                    continue
                step = decider(cast(inputs, dtype))[0]
                steps[name].update(step.tolist())
                wrong[name] += int(((step != truth.step) & ~near).sum())
                near_wrong[name] += int(((step != truth.step) & near).sum())
        if pairs <= GRADIENT_PAIRS:
            exact = gradients(
                lambda i: epsilon_dpo_reference(*i[:5], beta=BETA, epsilon=0.0).loss, inputs, torch.float64
            )
            for name, (loss, dtype) in GRADIENTS.items():
                result = measure.outcome(partial(_gradients_record, loss, inputs, dtype))
                if result["outcome"] == "ok":
                    errors[name].append(
                        [float((g.double() - t).norm() / t.norm()) for g, t in zip(result["g"], exact, strict=True)]
                    )
        report(f"{what}: {pairs} pairs, wrong so far {dict(wrong)}")
    return {
        "pairs": pairs,
        "near": near_count,
        "mean_abs_margin": sum(margins) / len(margins),
        "wrong": {name: wrong[name] for name in DECIDERS if steps[name]},
        "near_wrong": {name: near_wrong[name] for name in DECIDERS if steps[name]},
        "steps": {name: {"relaxed": s[1], "kept": s[0], "tightened": s[-1]} for name, s in steps.items() if s},
        "gradient_error": {
            name: {part: max(e[k] for e in rows) for k, part in enumerate(("hidden", "weight"))}
            for name, rows in errors.items()
            if rows
        },
    }


def synthetic(
    drift: float, batches: int = 20, pairs: int = 10, vocabulary: int = 16384, width: int = 64, device: str = "cpu"
) -> Iterator[Inputs]:
    """Batches of pairs of 2 × 64 tokens whose policy is the reference plus noise, logits of about unit variance."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).bfloat16().float().to(device)

    ref_weight = normal(vocabulary, width, std=width**-0.5)
    weight = (ref_weight + drift * normal(vocabulary, width, std=width**-0.5)).bfloat16().float()
    for _ in range(batches):
        ref_hidden = normal(2 * pairs, 64, width)
        hidden = (ref_hidden + drift * normal(*ref_hidden.shape)).bfloat16().float()
        labels = torch.randint(0, vocabulary, (2 * pairs, 64), generator=g).to(device)
        yield Inputs(hidden, weight, labels, ref_hidden, ref_weight, None)


# The model


def load_pairs(tokenizer, count: int):
    """The first pairs of the data set, tokenised by the trainer's own code."""
    from train import data

    STATES.mkdir(parents=True, exist_ok=True)
    some = STATES / "pairs.jsonl"
    with gzip.open(DATA, "rt", encoding="utf-8", errors="replace") as lines:
        some.write_text("".join(itertools.islice(lines, 2 * count)), encoding="utf-8")
    pairs, _ = data.load_pairs(some, tokenizer, max_length=MAX_LENGTH)
    if len(pairs) < count:
        raise ValueError(f"count: got {count}, takes at most the {len(pairs)} pairs that are left of {DATA.name}")
    return pairs.select(range(count)), data.Collator(tokenizer.pad_token_id or 0)


def head_states(model, batch: dict[str, Tensor]) -> Tensor:
    return model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state


def train_and_keep(report: Callable[[str], None]) -> dict[str, list[float]]:
    """Trains, and keeps the head's inputs of the held-out pairs after each of STEPS steps; gives β's courses.

    Goes on from the last of these steps that is there already.
    """
    from train.__main__ import load_model

    torch.manual_seed(0)
    policy, tokenizer = load_model("smollm2-135m", "float32")
    pairs, collate = load_pairs(tokenizer, HELD_OUT + PAIRS_A_STEP * max(STEPS))
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    held_out = [collate([pairs[i]]) for i in range(HELD_OUT)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    # The check does not read β, so all courses belong to one and the same run.
    deciders = {name: DECIDERS[name] for name in ("ours, bf16", "bf16 logits, then fp32", "bf16 throughout")}
    courses = {name: [BETA] for name in ("float64", *deciders)}
    done = max((step for step in STEPS if (STATES / f"step-{step}.safetensors").exists()), default=0)
    if done:
        courses = resume(policy, optimizer)
        report(f"going on after step {done}")
    for step in range(done + 1, max(STEPS) + 1):
        first = HELD_OUT + PAIRS_A_STEP * (step - 1)
        batch = collate([pairs[i] for i in range(first, first + PAIRS_A_STEP)])
        hidden, weight = head_states(policy, batch), policy.lm_head.weight
        with torch.no_grad():
            ref_hidden = head_states(reference, batch)
        inputs = Inputs(hidden, weight, batch["labels"], ref_hidden, reference.lm_head.weight, None)
        loss = linear_epsilon_dpo(*inputs[:5], beta=BETA, epsilon=0.0).loss
        loss.backward()
        for name, mean in mean_steps(inputs, deciders).items():
            courses[name].append(courses[name][-1] / (1 + EPSILON * mean))
        optimizer.step()
        optimizer.zero_grad()
        report(f"step {step} of {max(STEPS)}: loss {loss.item():.4f}")
        if step in STEPS:
            keep_for_resuming(policy, optimizer, courses)
            kept = {"weight": weight.detach().bfloat16(), "ref_weight": reference.lm_head.weight.bfloat16()}
            with torch.no_grad():
                for i, data in enumerate(held_out):
                    kept[f"hidden.{i}"] = head_states(policy, data).bfloat16()
                    kept[f"ref_hidden.{i}"] = head_states(reference, data).bfloat16()
                    kept[f"labels.{i}"] = data["labels"]
            save(kept, STATES / f"step-{step}.safetensors")
    return courses


def mean_steps(inputs: Inputs, deciders: dict[str, Any]) -> dict[str, float]:
    """The mean step of a batch's pairs by float64 and by each decider, from the same bf16 inputs."""
    found: dict[str, list[float]] = {name: [] for name in ("float64", *deciders)}
    pairs = len(inputs.labels) // 2
    with torch.no_grad():
        for i in range(pairs):
            rows = [i, i + pairs]
            pair = inputs._replace(
                hidden=inputs.hidden[rows], labels=inputs.labels[rows], ref_hidden=inputs.ref_hidden[rows]
            )
            pair = scored_only(cast(pair, torch.bfloat16))
            found["float64"].append(throughout(cast(pair, torch.float64))[0].item())
            for name, (decider, dtype) in deciders.items():
                found[name].append(decider(cast(pair, dtype))[0].item())
    return {name: sum(steps) / pairs for name, steps in found.items()}


def save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
    partial.replace(path)


def keep_for_resuming(policy, optimizer: torch.optim.Optimizer, courses: dict[str, list[float]]) -> None:
    state = {f"model.{name}": p.detach() for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters():
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    save(state | {f"course.{n}": torch.tensor(c, dtype=torch.float64) for n, c in courses.items()}, STATES / RESUME)


def resume(policy, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    state = load_file(STATES / RESUME)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(state[f"model.{name}"])
            prefix = f"optimizer.{name}."
            optimizer.state[p] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {n.removeprefix("course."): c.tolist() for n, c in state.items() if n.startswith("course.")}


def scored_only(inputs: Inputs) -> Inputs:
    """The same pair without the tokens that no variant scores: they would only cost time."""
    used = (inputs.labels != -100).any(0)
    return inputs._replace(
        hidden=inputs.hidden[:, used], ref_hidden=inputs.ref_hidden[:, used], labels=inputs.labels[:, used]
    )


def kept_pairs(step: int) -> Iterable[Inputs]:
    from safetensors.torch import load_file

    kept = load_file(STATES / f"step-{step}.safetensors")
    weight, ref_weight = kept["weight"].float(), kept["ref_weight"].float()
    for i in range(HELD_OUT):
        hidden, ref_hidden = kept[f"hidden.{i}"].float(), kept[f"ref_hidden.{i}"].float()
        yield scored_only(Inputs(hidden, weight, kept[f"labels.{i}"], ref_hidden, ref_weight, None))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["synthetic", "model"], help="by default both")
    parser.add_argument("--out", type=Path, help="results file, by default bench/results/<device>/fidelity.json")
    options = parser.parse_args()
    path = options.out or measure.RESULTS / measure.device_name("cpu") / "fidelity.json"
    results, progress = measure.Results(path, "cpu"), measure.Progress()
    if options.part != "model":
        for drift in DRIFTS:
            if not results.find(kind="synthetic", drift=drift):
                found = decide_all(synthetic(drift), progress, f"drift {drift}")
                results.add(kind="synthetic", drift=drift, **found)
    if options.part != "synthetic":
        if not DATA.exists():
            progress(f"no {DATA.name} beside the project: real pairs left out")
            return
        if not results.find(kind="beta"):
            results.add(kind="beta", courses=train_and_keep(progress))
        for step in STEPS:
            if not results.find(kind="model", after=step):
                results.add(kind="model", after=step, **decide_all(kept_pairs(step), progress, f"after {step} steps"))


if __name__ == "__main__":
    main()
