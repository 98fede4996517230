"""The README's swap-in loop, as it is written there: also compiled, with a hand-written step, and sharded."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epsdpo_kernels import EpsilonDPOLoss, epsilon_dpo_reference

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

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


def with_record(loop: str) -> str:
    """The loop with the lines that the README adds to it, taken from there as a patch."""
    section = (ROOT / "README.md").read_text().split("## See and trace every decision")[1].split("\n## ")[0]
    patched, left = [], loop.splitlines()
    for line in re.search(r"```diff\n(.*?)```", section, re.DOTALL).group(1).splitlines():
        sign, line = line[0], line[1:]
        if sign == "+":
            at = len(left) if line == "record.close()" else 0  # after the loop
            patched, left = [*patched, *left[:at], line], left[at:]
            continue
        (at,) = (i for i, own in enumerate(left) if own.startswith(line))
        patched, left = patched + left[: at + (sign == " ")], left[at + 1 :]
    return "\n".join(patched)


def test_the_loop_with_its_record(tiny, tmp_path, monkeypatch):
    """Five lines: what they append is what the loss said, and audit and report take it."""
    pytest.importorskip("pyarrow", reason="the extra 'record' is not installed")
    from epsdpo_kernels.__main__ import main
    from epsdpo_kernels.record import read
    from epsdpo_kernels.record.audit import audit

    assert len(with_record(swap_in()).splitlines()) == len(swap_in().splitlines()) + 4  # five, one in another's place
    monkeypatch.chdir(tmp_path)
    policy, reference = models(tiny)
    outs = []

    class Counting(EpsilonDPOLoss):
        def forward(self, *args):
            outs.append((self.beta.item(), super().forward(*args)))
            return outs[-1][1]

    monkeypatch.setattr("epsdpo_kernels.EpsilonDPOLoss", Counting)
    names = {
        "policy": policy, "reference": reference, "loader": batches(), "device": "cpu",
        "optimizer": torch.optim.AdamW(policy.parameters(), lr=1e-2),
    }  # fmt: skip
    exec(with_record(swap_in()), names)
    rows = read(tmp_path / "runs" / "mine" / "record").to_pylist()
    assert len(rows) == 24 and [row["step"] for row in rows] == [1 + i // 4 for i in range(24)]
    tokens = [(batch["labels"] != -100).sum(1).view(2, -1).T.tolist() for batch in batches()]
    for i, row in enumerate(rows):
        beta, out = outs[i // 4]
        assert row["beta"] == pytest.approx(beta, rel=1e-7) and row["decision"] == out.step[i % 4].item()
        assert [row["chosen_tokens"], row["rejected_tokens"]] == tokens[i // 4][i % 4]
        for name, figure in {
            "beta_used": "beta", "loss": "losses", "chosen_kl": "chosen_kl", "rejected_logp": "rejected_logps",
            "tightened_shift": "tightened_shift", "chosen_entropy": "chosen_entropy",
        }.items():  # fmt: skip
            assert row[name] == pytest.approx(getattr(out, figure)[i % 4].item(), rel=1e-6), name
        assert row["row"] is row["pair_id"] is row["epoch"] is None and row["split"] == "train"
    found = audit(tmp_path / "runs" / "mine")
    assert found.ok and {name for name, _ in found.limits} == {"no_row", "no_id", "no_epoch"}, str(found)
    assert main(["report", "runs/mine"]) == 0
    page = Path("runs/mine/report/report.html").read_text(encoding="utf-8")
    assert "trained in 6 steps: 24 rows of the record" in page and "24 rows of train have no id" in page
    with pytest.raises(ValueError, match="before loss_fn.update_beta"):
        names["record"].append(outs[0][1], step=7)


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
