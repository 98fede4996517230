"""The README's swap-in loop, as it is written there: also compiled, with a hand-written step, and sharded."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from epsdpo_kernels import epsilon_dpo_reference

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")

ROOT = Path(__file__).parent.parent
BETA, EPSILON = 0.1, 0.01  # the README's


def swap_in() -> str:
    """The first Python block under the heading."""
    section = (ROOT / "README.md").read_text().split("## Swap it in")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def batches(count=6) -> list[dict]:
    g = torch.Generator().manual_seed(2)
    out = []
    for _ in range(count):
        ids = torch.randint(3, 20, (8, 9), generator=g)
        lengths = torch.randint(5, 10, (8, 1), generator=g)
        mask = (torch.arange(9) < lengths).long()
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
        labels[:, :2] = -100
        out.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return out


def models(tiny):
    policy = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    return policy, reference


class ByHand:
    """Gradient descent, without torch.optim."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    def step(self):
        with torch.no_grad():
            for p in self.parameters:
                p -= self.lr * p.grad

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def truth(tiny, make_optimizer, lr, epsilon=EPSILON):
    """The loop with all logits in memory: the policy and β in the end."""
    policy, reference = models(tiny)
    optimizer = make_optimizer(policy.parameters(), lr=lr)
    beta = BETA
    for batch in batches():
        inputs = batch["input_ids"], batch["attention_mask"]
        out = epsilon_dpo_reference(
            policy.model(*inputs).last_hidden_state, policy.lm_head.weight, batch["labels"],
            reference.model(*inputs).last_hidden_state, reference.lm_head.weight, beta=beta, epsilon=epsilon,
        )  # fmt: skip
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        beta /= 1 + epsilon * out.step.double().mean().item()
    assert beta != BETA
    return policy, beta


@pytest.mark.parametrize(
    "make_optimizer, lr, compiled",
    [(torch.optim.AdamW, 1e-2, False), (ByHand, 0.5, False), (torch.optim.AdamW, 1e-2, True)],
    ids=["as written", "step by hand", "compiled"],
)
def test_the_loop(tiny, make_optimizer, lr, compiled):
    expected, beta = truth(tiny, make_optimizer, lr)
    policy, reference = models(tiny)
    optimizer = make_optimizer(policy.parameters(), lr=lr)
    graphs = []
    if compiled:

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        for model in (policy, reference):
            model.model.compile(backend=backend)
    names = {
        "torch": torch, "policy": policy, "reference": reference, "optimizer": optimizer, "loader": batches(),
        "device": "cpu",
    }  # fmt: skip
    exec(swap_in(), names)
    assert names["loss_fn"].beta.item() == pytest.approx(beta, rel=1e-6)
    for p, q in zip(policy.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert bool(graphs) == compiled
    out = names["out"]
    assert out.step.dtype == torch.int8 and (out.chosen_kl > 0).all()


def launch(tiny, folder, how):
    for i, batch in enumerate(batches()):
        save_file(batch, folder / f"batch-{i}.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(ROOT / "tests" / "fsdp_loop_worker.py"), str(tiny), str(folder), how]
    return subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=300)


def test_under_fsdp2(tiny, tmp_path):
    """What docs/migrating.md says: the loss inside the sharded model's forward, in two processes on gloo."""
    done = launch(tiny, tmp_path, "in forward")
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "result.safetensors")
    expected, beta = truth(tiny, torch.optim.SGD, 0.5, epsilon=0.05)
    assert found["beta"].item() == pytest.approx(beta, rel=1e-6) and found["step"].any()
    for name, p in expected.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)


def test_fsdp2_as_written_fails_rather_than_train_wrongly(tiny, tmp_path):
    done = launch(tiny, tmp_path, "as written")
    assert done.returncode != 0 and not (tmp_path / "result.safetensors").exists()
    assert "DTensor" in done.stderr


def test_the_figures_of_migrating(capsys):
    """The page's script prints what the page says; naive fp32 may round one pair's check otherwise elsewhere."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL)
    (place,) = (i for i, block in enumerate(blocks) if "def decisions" in block)
    exec(blocks[place], {})
    printed, stated = capsys.readouterr().out.splitlines(), blocks[place + 1].splitlines()
    assert len(printed) == len(stated) == 3
    for ours, theirs in zip(printed, stated, strict=True):
        ours, theirs = ([float(n) for n in re.findall(r"(?<![a-z\d])\d+\.?\d*", line)] for line in (ours, theirs))
        _, _, package, fp32, bf16, kept, _ = ours
        assert (package, bf16, kept) == (0, 40, 40)
        assert ours[:3] + ours[4:] == theirs[:3] + theirs[4:] and abs(fp32 - theirs[3]) <= 2
