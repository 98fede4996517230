"""The comparison, end to end on the tiny model."""

import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("matplotlib", reason="the trainer's extra is not installed")

from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.data import Collator, load_pairs  # noqa: E402
from train.options import parse  # noqa: E402
from train.studies import compare  # noqa: E402


@pytest.fixture
def passed_on(tiny, tmp_path, monkeypatch):
    """Flags that a comparison passes on to its runs."""
    root = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.chdir(root)
    more = flags(tiny, tmp_path, eval_fraction=0.25)
    return [flag for flag in more if not flag.startswith(("--output", "--seed", "--disab"))]


@pytest.fixture
def in_process(monkeypatch):
    """All runs but the first in this process, for a process of its own is slow to start."""
    real, commands = compare.subprocess.run, []

    def run(command, **kwargs):
        if command[1:3] != ["-m", "train"]:  # what a library asks of the system
            return real(command, **kwargs)
        commands.append(command)
        if len(commands) == 1:
            return real(command, **kwargs)
        try:
            main(command[3:])
        except Exception as error:
            raise compare.subprocess.CalledProcessError(1, command) from error

    monkeypatch.setattr(compare.subprocess, "run", run)
    # As in the processes, for sums over another number of threads round otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the table below a title, or the first table."""
    lines = text.split(title)[1].strip().splitlines() if title else text.splitlines()
    end = lines.index("") if "" in lines else len(lines)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:end]]


def test_compare(tiny, tmp_path, passed_on, in_process, capsys):
    arguments = ["--out", str(tmp_path), "--methods", "dpo", "eps-dpo", "--seeds", "5", "--micro-steps", "6"]
    compare.main([*arguments, *passed_on])
    printed = capsys.readouterr().out
    assert "written to" in printed and "run 2 of 2, eps-dpo-0.1-5: " in printed and "at this rate, 0 min" in printed
    text = (tmp_path / "comparison.md").read_text()
    assert [row[:3] for row in cells(text, "")] == [["dpo", "0.1", "5"], ["eps-dpo", "0.1", "5"]]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    run = compare.Run("eps-dpo", 0.1, 5)
    found = compare.collect(tmp_path, [run])[run]

    # The held-out figures, worked out again with all logits.
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, original = load(tmp_path / run.name, dtype=torch.float32), load(tiny, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    pairs, _ = load_pairs(tiny / "pairs.jsonl", tokenizer, max_length=16)
    pairs = pairs.train_test_split(0.25, seed=5)["test"]
    batch = Collator(0)(list(pairs))
    labels = batch["labels"]
    with torch.no_grad():
        p, q = (m(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1) for m in (policy, original))
    ratio = (p - q).gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0).sum(1)
    margins = ratio[:12] - ratio[12:]
    assert found["row"] == pairs["row"] and found["margin"] == pytest.approx(margins.tolist(), rel=1e-3, abs=1e-5)
    chosen = labels[:12] != -100
    assert found["tokens"] == chosen.sum(1).tolist()
    row = cells(text, "")[1]
    assert row[3:5] == [f"{(margins > 0).float().mean():.3f}", f"{margins.mean():.3f}"]
    for name, (x, y) in {"kl": (p, q), "reverse_kl": (q, p)}.items():
        kl = (x.exp() * (x - y)).sum(-1)[:12]
        assert found[name] == pytest.approx((kl * chosen).sum(1).tolist(), rel=1e-3, abs=1e-6)
        # Per token over all tokens, not a mean of means.
        assert sum(compare.per_pair(found, name)) / 12 == pytest.approx(kl[chosen].mean().item(), rel=1e-3)
    # Nobody said that the machine is idle, and one seed has no error.
    assert row[-2] == "–" and "nan" not in text
    assert cells(text, "their standard error:")[1][2:5] == ["1", *row[3:5]]

    # The batch in micro-batches: six steps of eight pairs, decided alike for ε-DPO; β-DPO's β is another.
    micro = cells(text, "in micro-batches:")
    assert [row[:2] for row in micro] == [[m, c] for m in ("eps-dpo", "beta-dpo") for c in ("1 × 8", "2 × 4", "8 × 1")]
    beta = [float(row[-1]) for row in micro]
    assert [row[2:5] for row in micro[:3]] == [["48", "0", "0.00%"]] * 3 and beta[0] == beta[1] == beta[2] != 0.1
    assert all(float(row[4].strip("%")) > 0 for row in micro[4:]) and len(set(beta[3:])) == 3
    decided = [
        read(tmp_path / "micro-batches" / f"eps-dpo-{count}x{size}" / "record").to_pandas().query("split == 'train'")
        for size, count in compare.MICRO_BATCHES
    ]
    steps = [run.set_index(["step", "row"])["decision"].sort_index() for run in decided]
    assert steps[0].equals(steps[1]) and steps[0].equals(steps[2]) and steps[0].any()

    # A run of other pairs under the same name is no comparison.
    broken = tmp_path / "micro-batches" / "eps-dpo-2x4"
    broken.rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "dpo-0.1-5", broken)
    with pytest.raises(ValueError, match="its steps are of other pairs than the first run's"):
        compare.micro_table(tmp_path)
    shutil.rmtree(broken)
    (tmp_path / "kept").rename(broken)

    # Nothing is run a second time.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("trainer_state.json")}
    start = time.perf_counter()
    compare.main([*arguments, "--discard-weights", *passed_on])
    assert {path: path.stat().st_mtime_ns for path in before} == before and time.perf_counter() - start < 20
    assert capsys.readouterr().out.count("done before") == 2
    assert (tmp_path / "comparison.md").read_text() == text
    assert not list(tmp_path.glob("*-5/*.safetensors")) and (tmp_path / run.name / "record").is_dir()
    assert found["made"]["bytes"] > 2**27

    # Nor elsewhere, where there are but the files of figures.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in tmp_path.glob("*-5.json"):
        shutil.copy(path, elsewhere)
    compare.main(["--out", str(elsewhere), *arguments[2:-2], "--micro-steps", "0", *passed_on])
    assert (elsewhere / "comparison.md").read_text().strip() == text.split("\n\nThe same eight")[0]
    assert not (elsewhere / run.name).exists()
    other = json.loads((elsewhere / f"{run.name}.json").read_text())
    other["settings"]["max_steps"] = 7
    (elsewhere / f"{run.name}.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="max_steps: got -1, takes 7, as .*/eps-dpo-0.1-5 was made. Give"):
        compare.main(["--out", str(elsewhere), *arguments[2:-2], "--micro-steps", "0", *passed_on])


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path, passed_on, in_process, capsys, monkeypatch):
    """One run was cut after a checkpoint, one before it had any, and one cannot run at all: the rest is done."""
    steps = ["--save_strategy=steps", "--save_steps=3", "--num_train_epochs=2"]
    whole = compare.parse(["--out", str(tmp_path), "--seeds", "5", *passed_on, *steps])[1]
    compare.train(tmp_path / "whole", compare.Run("lsc-dpo", 0.1, 5).words(whole))
    shutil.copytree(tmp_path / "whole", tmp_path / "lsc-dpo-0.1-5")
    for path in (tmp_path / "lsc-dpo-0.1-5").iterdir():
        if path.name not in ("checkpoint-3", "record", "run.json", "output.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tmp_path / "whole" / "record", tmp_path / "dpo-0.1-5" / "record")
    real = compare.train
    broken = ["--model", str(tmp_path / "nothing")]

    def train(run, words):
        return real(run, [*words, *(broken if run.name == "eps-dpo-0.1-5" else [])])

    monkeypatch.setattr(compare, "train", train)
    arguments = ["--out", str(tmp_path), "--methods", "dpo", "lsc-dpo", "eps-dpo", "--seeds", "5", "--idle"]
    with pytest.raises(SystemExit, match="error: 1 of 3 runs failed: eps-dpo-0.1-5; the same words try them again"):
        compare.main([*arguments, "--micro-steps", "0", *passed_on, *steps])
    assert "FAILED with status 1, see" in capsys.readouterr().out
    ours, theirs = (
        read(tmp_path / name / "record").to_pandas().sort_values(["split", "step", "row"], ignore_index=True)
        for name in ("lsc-dpo-0.1-5", "whole")
    )
    assert ours.equals(theirs) and ours["step"].max() == 12
    text = (tmp_path / "comparison.md").read_text()
    rows = {row[0]: row for row in cells(text, "")}
    assert set(rows) == {"dpo", "lsc-dpo"}  # the tables hold what is done
    assert float(rows["dpo"][-2]) > 0 and rows["lsc-dpo"][-2] == "–"  # the time of a resumed run is not its own
    broken.clear()
    compare.main([*arguments, "--micro-steps", "0", *passed_on, *steps])
    assert capsys.readouterr().out.count("done before") == 2
    assert len(cells((tmp_path / "comparison.md").read_text(), "")) == 3


def told(folder: Path, words: list[str]) -> Path:
    """A run that is done, as far as its settings go."""
    options, args = parse(words)
    folder.mkdir(parents=True)
    facts = {"options": vars(options), "training_arguments": args.to_sanitized_dict()}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "trainer_state.json").write_text("{}")
    return folder


def refused(folder: Path, run: compare.Run, flags: list[str], veto: str = "kl=2") -> str | None:
    try:
        compare.check_settings(folder, run.words(flags, [veto]))
    except ValueError as error:
        said, *what_to_do = str(error).split(f", as {folder} was made. ")
        assert what_to_do == ["Give another --out, or remove that folder and its .json"]
        return said
    return None


def test_other_words_than_a_run_was_told_are_refused(tiny, tmp_path, passed_on):
    dpo, veto, lsc = (compare.Run(method, 0.1, 5) for method in ("dpo", compare.VETO, "lsc-dpo"))
    assert refused(tmp_path / "dpo", dpo, passed_on) is None  # nothing is there
    resumed = ["--resume_from_checkpoint=last", f"--output_dir={tmp_path}"]
    folder = told(tmp_path / "dpo", dpo.words([*passed_on, *resumed]))
    assert refused(folder, dpo, passed_on) is None
    for more, said in {
        "--learning_rate=0.1": "learning_rate: got 0.1, takes 0.001",
        f"--model={tmp_path}": f"model: got '{tmp_path}', takes '{tiny}'",
        "--optim=sgd --max_prompt_length=2": "max_prompt_length: got 2, takes None; optim: got 'sgd', takes "
        "'adamw_torch_fused'",
        "--lora_alpha=8": "lora_alpha: got 8, takes 32",
        "--dataloader_drop_last=true": "dataloader_drop_last: got True, takes False",
        # What only others read, what is kept and said on the way, and what a run is made on.
        "--epsilon=0.3 --beta_update=none --lsc_eta=0.2 --sync_steps=3 --beta_dpo_keep=0.5": None,
        "--save_strategy=steps --save_steps=9 --cache_reference=x --use_cpu=false --run_name=x": None,
    }.items():
        assert refused(folder, dpo, [*passed_on, *more.split()]) == said
    assert refused(folder, dpo._replace(seed=6), passed_on) == "seed: got 6, takes 5"
    # The best checkpoint is one of those that there are.
    best = [*passed_on, "--load_best_model_at_end=true", "--eval_strategy=steps", "--save_strategy=steps"]
    best += ["--eval_steps=2", "--save_steps=2"]
    folder = told(tmp_path / "best", dpo.words(best))
    assert refused(folder, dpo, [*best, "--save_steps=4"]) == "save_steps: got 4, takes 2"
    # Each method's own, a veto's bounds among them.
    folder = told(tmp_path / "veto", veto.words(passed_on, ["kl=2"]))
    assert refused(folder, veto, passed_on) is None
    assert refused(folder, veto, passed_on, veto="kl=3") == "veto: got ['kl=3'], takes ['kl=2']"
    assert refused(folder, veto, [*passed_on, "--epsilon=0.3"]) == "epsilon: got 0.3, takes 0.05"
    folder = told(tmp_path / "lsc", lsc.words(passed_on))
    assert refused(folder, lsc, [*passed_on, "--lsc_eta=0.2"]) == "lsc_eta: got 0.2, takes 0.1"
    # A file of figures goes before the folder, and one of an earlier version has fewer settings.
    (tmp_path / "lsc.json").write_text(json.dumps({"settings": {"learning_rate": 0.01, "epsilon": 9}}))
    assert refused(folder, lsc, [*passed_on, "--optim=sgd"]) == "learning_rate: got 0.001, takes 0.01"
    assert refused(folder, lsc, [*passed_on, "--learning_rate=0.01", "--optim=sgd"]) is None


def test_nothing_is_run_beside_what_was_told_otherwise(tmp_path, passed_on, monkeypatch):
    """Of a later seed, of one cut short, and of micro-batches: it is said before hours of training."""
    arguments = ["--out", str(tmp_path), "--methods", "dpo", "--seeds", "5", "6", *passed_on]
    options, flags = compare.parse(arguments)
    monkeypatch.setattr(compare, "train", None)
    later = told(tmp_path / "dpo-0.1-6", compare.Run("dpo", 0.1, 6).words(flags))
    with pytest.raises(ValueError, match="learning_rate: got 0.1, takes 0.001, as .*dpo-0.1-6 was made"):
        compare.main([*arguments, "--learning_rate=0.1"])
    (later / "checkpoint-3").mkdir()
    (later / "trainer_state.json").rename(later / "checkpoint-3" / "trainer_state.json")
    (later / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(ValueError, match="learning_rate: got 0.1, takes 0.001, as .*dpo-0.1-6 was made"):
        compare.main([*arguments, "--learning_rate=0.1"])
    shutil.rmtree(later)
    last, words = list(compare.micro_words(options, flags).items())[-1]
    told(last, words)
    for more, said in (
        ("--micro-steps=9", "max_steps: got 9, takes 12"),
        ("--optim=sgd", "optim: got 'sgd', takes 'adamw_torch_fused'"),
        ("--betas=0.2", "beta: got 0.2, takes 0.1"),
    ):
        with pytest.raises(ValueError, match=f"{said}, as .*micro-batches/beta-dpo-8x1 was made"):
            compare.main([*arguments, more])


def made_up(margins: list[float], kl: list[float], beta: float = 0.1) -> dict:
    steps = {"running": [beta] * 2, "relaxed": [0.5] * 2, "tightened": [0.25] * 2}
    return {
        "row": list(range(len(margins))), "margin": margins, "kl": kl, "reverse_kl": kl, "tokens": [2, 4, 6, 8],
        "steps": steps, "seconds": 1.5, "made": {"bytes": 2**30, "bound_only": True, "resumed": False},
    }  # fmt: skip


def test_differences_are_of_the_same_pairs():
    """Hand-worked: two seeds of four pairs."""
    runs = [compare.Run(method, 0.1, seed) for seed in (0, 1) for method in ("dpo", "lsc-dpo")]
    done = dict(zip(runs, (
        made_up([1.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]), made_up([2.0, 1.0, 3.0, 3.5], [2.0, 1.0, 1.0, 1.0]),
        made_up([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]), made_up([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 2.0]),
    ), strict=True))  # fmt: skip
    own = runs[1::2]
    over, error = compare.difference(done, own, "margin")
    # By seed: 1, 2, 1, 3 with mean 1.75 and variance 11/12; and 1 four times.
    assert over.value == pytest.approx(1.375) and over.error == pytest.approx(0.375)
    assert error == pytest.approx(math.sqrt(11 / 12 / 4) / 2)
    over, error = compare.difference(done, own, "accuracy")
    assert over.value == pytest.approx(0.25) and over.error == pytest.approx(0.0)  # one pair of four in both
    over, error = compare.difference(done, own, "kl")
    assert over.value == pytest.approx(1 / 20) and error == pytest.approx(math.sqrt(4 / 3 * 4 * (0.5 / 20) ** 2) / 2)
    text = compare.tables(done, idle=True)
    assert cells(text, "held-out pairs of all seeds:") == [
        [
            "lsc-dpo",
            "0.1",
            "2",
            "+0.250 ± 0.000 (0.144)",
            "+1.375 ± 0.375 (0.239)",
            *["+0.05000 ± 0.00000 (0.02887)"] * 2,
        ]
    ]
    assert cells(text, "their standard error:")[0][:5] == ["dpo", "0.1", "2", "0.750 ± 0.000", "1.062 ± 0.438"]
    assert cells(text, "")[0][-5:] == ["0.1000", "50%", "25%", "1.5", "≤ 1.00"]
    done[runs[1]]["row"] = [9, 1, 2, 3]
    with pytest.raises(ValueError, match="lsc-dpo-0.1-0: its held-out pairs are not those of dpo-0.1-0"):
        compare.difference(done, own, "margin")


def test_the_committed_comparison():
    """docs/comparison.md has what is made of the figures beside it."""
    out = Path(__file__).parent.parent / "docs" / "comparison"
    text = out.with_suffix(".md").read_text()
    command = shlex.split(text.split("```")[1].replace("\\\n", " "))
    options, flags = compare.parse([*command[command.index("--out") :], "--out", str(out)])
    runs = [run for run in compare.plan(options) if compare.figures_path(out / run.name).exists()]
    assert len(runs) == len(list(out.iterdir())) > 20
    for run in runs:
        compare.check_settings(out / run.name, run.words(flags))
    assert compare.tables(compare.collect(out, runs), options.idle) in text


def test_margins_at_equal_kl():
    """DPO's are 2·√KL between its first two β₀. Every pair has the same KL a token: errors are of margins alone."""

    def with_kl(margins: list[float], kl: float) -> dict:
        return made_up(margins, [kl * tokens for tokens in (2, 4, 6, 8)])

    dpo = {beta: compare.Run("dpo", beta, 0) for beta in (1.0, 0.1, 0.01)}
    runs = [compare.Run("eps-dpo", beta, 0) for beta in (1.0, 0.1, 0.01)]
    done = {
        dpo[0.1]: with_kl([0.8] * 4, 0.16), dpo[1.0]: with_kl([0.2] * 4, 0.01), dpo[0.01]: with_kl([0.9] * 4, 0.64),
        compare.Run("dpo", 0.05, 1): with_kl([9.0] * 4, 0.05),  # another seed's
        runs[0]: with_kl([0.3, 0.5, 0.4, 0.48], 0.04), runs[1]: with_kl([0.85] * 4, 0.32),
        runs[2]: with_kl([1.0] * 4, 0.7),
    }  # fmt: skip
    more, error = compare.at_equal_kl(done, runs[0])
    assert more == pytest.approx(0.42 / 0.4 - 1)
    # The jackknife of a mean is its standard error.
    assert error == pytest.approx(compare.mean([0.3, 0.5, 0.4, 0.48]).error / 0.4)
    more, error = compare.at_equal_kl(done, runs[1])
    assert more == pytest.approx(0.85 / math.sqrt(0.8 * 0.9) - 1) and error == pytest.approx(0, abs=1e-12)
    assert math.isnan(compare.at_equal_kl(done, runs[2])[0])  # further than DPO gets
    text = compare.tables(done, idle=True)
    assert cells(text, "error over pairs:") == [
        ["eps-dpo", "1", "0", "+5.0 ± 11.4 %"], ["eps-dpo", "0.1", "0", "+0.2 ± 0.0 %"]
    ]  # fmt: skip
    done[runs[1]]["margin"] = [-1.0] * 4
    assert math.isnan(compare.at_equal_kl(done, runs[1])[0])
    # Where all move together, so does the error: the pair that is left out is left out of all.
    for run in (*dpo.values(), runs[0]):
        done[run]["margin"] = [done[run]["margin"][0] * factor for factor in (1.0, 2.0, 3.0, 4.0)]
    assert compare.at_equal_kl(done, runs[0])[1] == pytest.approx(0, abs=1e-12)
    done[dpo[1.0]]["row"] = [9, 1, 2, 3]
    with pytest.raises(ValueError, match="eps-dpo-1-0: its held-out pairs are not those of dpo-1-0"):
        compare.at_equal_kl(done, runs[0])


def test_the_other_betas_are_of_three_methods(tmp_path):
    options, passed = compare.parse(
        ["--out", "x", "--betas", "0.1", "0.01", "--seeds", "0", "1", "--veto", "kl=1", "--beta_update=none"]
    )
    runs = compare.plan(options)
    assert [run.name for run in runs[:9]] == [
        "eps-dpo-0.1-0", "dpo-0.1-0", "beta-dpo-0.1-0", "tr-dpo-0.1-0", "lsc-dpo-0.1-0", "eps-dpo-veto-0.1-0",
        "eps-dpo-0.01-0", "dpo-0.01-0", "lsc-dpo-0.01-0",
    ]  # fmt: skip
    assert len(runs) == len(set(runs)) == 18 and passed == ["--beta_update=none"]
    margins = [1.0, 2.0, 3.0, 4.0]
    done = {run: made_up([m / run.beta for m in margins], [1.0] * 4, run.beta) for run in runs}
    compare.picture(done, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 40_000
