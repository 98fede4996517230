"""What turns the loss's output into rows of the record, and the facts beside them."""

import json
from typing import Any

import numpy as np
import pytest
import torch

pa = pytest.importorskip("pyarrow", reason="the extra 'record' is not installed")

from epsdpo_kernels import EpsilonDPOLoss  # noqa: E402
from epsdpo_kernels.pair import losses_and_coefficients  # noqa: E402
from epsdpo_kernels.record import Record, parts, read, set_aside  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from epsdpo_kernels.record.recorder import write_part  # noqa: E402


def call(loss_fn, seed=0, pairs=3, tokens=5):
    """A call of the loss on random states near each other; row i has 1 + i modulo ``tokens`` scored ones."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2 * pairs, tokens, 8, generator=g), torch.randn(11, 8, generator=g)
    labels = torch.randint(0, 11, (2 * pairs, tokens), generator=g)
    labels[torch.arange(tokens) >= 1 + torch.arange(2 * pairs)[:, None] % tokens] = -100
    return loss_fn(x, w, labels, x + 0.1 * torch.randn(x.shape, generator=g), w)


def steps(record, loss_fn, first, last):
    for step in range(first, last + 1):
        out = call(loss_fn, seed=step)
        record.append(out, step=step, row=range(3), pair_id=["a", "b", "c"], epoch=float(step))
        loss_fn.update_beta()


def test_a_row_is_what_the_loss_returned(tmp_path):
    loss_fn = EpsilonDPOLoss(0.2, 0.05, "mean-beta", label_smoothing=0.1, max_entropy=2.3)
    record = Record(tmp_path, loss_fn, options={"dataset": "pairs.jsonl"}, facts={"pairs": {"train": 3}, "mine": 1})
    out = call(loss_fn)
    record.append(out, step=1, row=[5, -1, 7], pair_id=["a", "b", None], epoch=0.5)
    loss_fn.update_beta()
    loss_fn.eval()
    held_out = call(loss_fn, 9, 2)
    record.append(held_out, step=1)
    record.append(held_out, step=1)
    record.append(held_out, step=1, split="eval_b")
    record.close()
    rows = read(tmp_path / "record").to_pylist()
    assert [(row["split"], row["micro"], row["row"], row["pair_id"], row["epoch"]) for row in rows] == [
        ("train", 0, 5, "a", 0.5), ("train", 0, None, "b", 0.5), ("train", 0, 7, None, 0.5),
        *[("eval", micro, None, None, None) for micro in (0, 0, 1, 1)], *[("eval_b", 0, None, None, None)] * 2,
    ]  # fmt: skip
    logps = (out.chosen_logps, out.rejected_logps, out.ref_chosen_logps, out.ref_rejected_logps)
    _, coefficient = losses_and_coefficients(tuple(t.double() for t in logps), out.beta.double(), 0.1)
    for i, row in enumerate(rows[:3]):
        expected = {
            "chosen_tokens": 1 + i, "rejected_tokens": 1 + (3 + i) % 5, "chosen_logp": out.chosen_logps[i],
            "ref_rejected_logp": out.ref_rejected_logps[i], "relaxed_shift": out.relaxed_shift[i],
            "tightened_shift": out.tightened_shift[i], "decision": out.step[i], "vetoed": out.vetoed[i],
            "beta": 0.2, "beta_used": out.beta[i], "loss": out.losses[i], "coefficient": coefficient[i],
            "rejected_kl": out.rejected_kl[i], "chosen_entropy": out.chosen_entropy[i], "epsilon": 0.05,
            "label_smoothing": 0.1, "method": "eps-dpo",
        }  # fmt: skip
        for name, value in expected.items():
            assert row[name] == (value if isinstance(value, str) else pytest.approx(float(value), rel=1e-7)), name
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["options"] == {
        "method": "eps-dpo", "beta": 0.2, "epsilon": 0.05, "beta_update": "mean-beta", "label_smoothing": 0.1,
        "veto": ["entropy=2.3"], "dataset": "pairs.jsonl",
    }  # fmt: skip
    assert facts["mine"] == 1 and audit(tmp_path).ok, str(audit(tmp_path))


def test_a_loss_whose_numbers_are_numpys(tmp_path):
    Record(tmp_path, EpsilonDPOLoss(np.float32(0.25), np.float32(0.125))).close()
    facts = json.loads((tmp_path / "run.json").read_text())["options"]
    assert (facts["beta"], facts["epsilon"]) == (0.25, 0.125)


def test_a_batch_of_nothing_has_no_rows(tmp_path):
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    x, w = torch.randn(4, 3, 8), torch.randn(11, 8)
    record.append(loss_fn(x, w, torch.full((4, 3), -100), x, w), step=1)
    record.append(call(loss_fn), step=1)
    record.close()
    rows = read(tmp_path / "record")
    assert rows["micro"].to_pylist() == [0] * 3
    assert rows["chosen_tokens"].to_pylist() == [1, 2, 3] and rows["rejected_tokens"].to_pylist() == [4, 5, 1]


def test_ids_and_labels_come_from_the_pairs(tmp_path):
    pairs = {"row": [9, 2, 4], "pair_id": ["n", "t", "f"], "topic": ["x", None, "y"]}
    loss_fn = EpsilonDPOLoss()
    record = Record(tmp_path, loss_fn, pairs={"train": pairs, "eval": None}, label="topic")
    out = call(loss_fn)
    record.append(out, step=1, row=torch.tensor([4, 9, 2]), epoch=0)
    record.close()
    table = read(tmp_path / "record")
    assert table["pair_id"].to_pylist() == ["f", "n", "t"] and table["label"].to_pylist() == ["y", "x", None]
    assert json.loads((tmp_path / "run.json").read_text())["pairs"] == {"train": 3}


def test_a_pair_never_gets_the_id_of_another(tmp_path):
    """A row below 0 is unknown, and so are its id and label; one that the data don't have is refused, not rounded."""
    pairs = {"row": [5, 0, 2], "pair_id": ["five", "zero", "two"], "topic": ["a", "b", "c"]}
    loss_fn = EpsilonDPOLoss()
    record = Record(
        tmp_path, loss_fn, pairs={"train": pairs, "none": {"row": [], "pair_id": [], "topic": []}}, label="topic"
    )
    out = call(loss_fn)
    record.append(out, step=1, row=[-1, 5, -7])
    for split, row, named in (
        ("train", [0, 3, 2], r"row: got \[3\], which pairs\['train'\]"),
        ("train", torch.tensor([99, 5, 6]), r"row: got \[6, 99\]"),
        ("none", [1, -1, -1], r"row: got \[1\], which pairs\['none'\]"),
        ("train", [0.0, 2.6, 5.0], "row: got .*, takes 3 integers"),
        ("train", [0, None, 5], "row: got .*, takes 3 integers"),
        ("train", [0, 2], "row: got 2 rows, takes 3"),
    ):
        with pytest.raises(ValueError, match=named):
            record.append(out, step=1, split=split, row=row)
    record.append(out, step=1, split="none", row=[-1, -1, -1])
    record.close()
    table = read(tmp_path / "record")
    assert table["row"].to_pylist() == [None, 5, None, None, None, None]
    assert table["pair_id"].to_pylist() == [None, "five", None, None, None, None]
    assert table["label"].to_pylist() == [None, "a", None, None, None, None]


@pytest.mark.parametrize(
    ("pair_id", "named"),
    [
        ("abc", "got 'abc', takes 3 strings"),
        ([1, 2, 3], r"got \[1, 2, 3\], takes 3 strings"),
        (["a"], "got 1 ids, takes 3"),
    ],
)
def test_ids_are_one_a_pair(tmp_path, pair_id, named):
    """A string is not a list of ids, each of them the whole of it."""
    loss_fn = EpsilonDPOLoss()
    out = call(loss_fn)
    with pytest.raises(ValueError, match=f"pair_id: {named}"):
        Record(tmp_path, loss_fn).append(out, step=1, pair_id=pair_id)


def test_an_evaluation_of_an_earlier_checkpoint_says_so(tmp_path):
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    steps(record, loss_fn, 1, 2)
    after = loss_fn.beta.item()
    steps(record, loss_fn, 3, 6)
    out = call(loss_fn)
    for split, policy_step, taken in (
        ("train", 2, "takes 5"),
        ("eval", 7, "takes 0 to 6"),
        ("eval", -1, "takes 0 to 6"),
    ):
        with pytest.raises(ValueError, match=f"policy_step: got {policy_step} at step 6 of {split!r}, {taken}"):
            record.append(out, step=6, split=split, policy_step=policy_step)
    loss_fn.eval()
    record.append(call(loss_fn), step=6)
    loss_fn.beta.fill_(after)
    record.append(call(loss_fn), step=6, policy_step=2)
    record.close()
    found = audit(tmp_path)
    assert found.ok, str(found)
    assert found.table["policy_step"].to_pylist() == [step for step in (0, 1, 2, 3, 4, 5, 6, 2) for _ in range(3)]


def test_resumed_with_the_facts_of_its_start(tmp_path):
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn, facts={"pairs": {"train": 3}})
    steps(record, loss_fn, 1, 4)
    record.flush()
    state = loss_fn.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    steps(record, loss_fn, 5, 6)
    record.flush()  # and killed
    assert [name for name, _ in audit(tmp_path).limits] == ["open"]

    again = EpsilonDPOLoss(0.1, 0.05)
    again.load_state_dict(state)
    assert again.beta != 0.1
    with pytest.raises(FileExistsError, match="resume_step"):
        Record(tmp_path, again)
    record = Record(tmp_path, again, facts={"pairs": {"train": 3}}, resume_step=4)
    steps(record, again, 5, 8)
    record.close()
    found = audit(tmp_path)
    assert found.ok and not found.limits and found.steps == 8, str(found)
    assert found.facts["options"]["beta"] == 0.1
    assert len(parts(tmp_path / "record")) == 2 and again.beta == pytest.approx(loss_fn.beta.item(), abs=0.01)

    # Where there was no record before, it begins there, and says so.
    later = EpsilonDPOLoss(0.1, 0.05)
    later.load_state_dict(state)
    record = Record(tmp_path / "late", later, facts={"pairs": {"train": 3}}, resume_step=4)
    steps(record, later, 5, 8)
    record.close()
    found = audit(tmp_path / "late")
    assert found.ok and found.limits == [("begins_after", {"step": 4})], str(found)


def test_a_loop_that_leaves_pairs_out(tmp_path):
    """Of 7 pairs, 6 an epoch: where the run never said how many there are, none is missing, and the audit says why."""
    found = []
    for name, facts in (("unsaid", {}), ("taken", {"pairs": {"train": 6}}), ("there", {"pairs": {"train": 7}})):
        loss_fn = EpsilonDPOLoss(0.1, 0.05)
        record = Record(tmp_path / name, loss_fn, facts=facts)
        for step in range(1, 7):
            epoch = (step - 1) // 2
            row = np.random.default_rng(epoch).permutation(7)[(step - 1) % 2 * 3 :][:3]
            out = call(loss_fn, seed=step)
            record.append(out, step=step, row=row, pair_id=[f"{n}" for n in row], epoch=float(epoch))
            loss_fn.update_beta()
        record.close()
        found.append(audit(tmp_path / name))
    assert [f.ok for f in found] == [True, True, False], "\n".join(map(str, found))
    last = ("last_epoch", {"n": "6", "of": "7"})
    assert [f.limits for f in found] == [[("no_pairs", {"split": "train"})], [], [last]]
    missing = [("missing", epoch, "6", "7") for epoch in (0, 1)]  # the third may have been told to end there
    assert [(f.kind, f.epoch, f.holds, f.follows) for f in found[2].findings] == missing


def test_a_shift_that_is_not_finite(tmp_path):
    """The log-probs are sound, the check is not: loss and coefficient are NaN, and so they must be."""
    loss_fn = EpsilonDPOLoss(0.1, 0.5)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 4, 8, generator=g), torch.randn(30, 8, generator=g)
    hidden[[1, 3]] = hidden[[0, 2]]
    labels = torch.randint(0, 30, (4, 4), generator=g)
    far = torch.full((30,), 100.0)
    out = loss_fn(hidden, weight, labels, hidden, weight, bias=far, ref_bias=torch.zeros(30))
    assert torch.isfinite(out.chosen_logps).all() and out.tightened_shift.isnan().all()
    assert out.losses.isnan().all()
    record = Record(tmp_path, loss_fn)
    record.append(out, step=1)
    record.close()
    rows = read(tmp_path / "record")
    assert np.isnan(rows["loss"].to_numpy()).all() and np.isnan(rows["coefficient"].to_numpy()).all()
    assert audit(tmp_path).ok, str(audit(tmp_path))
    # And a loss that is a number there does not follow.
    part = parts(tmp_path / "record")[0]
    at = rows.schema.get_field_index("loss")
    write_part(rows.set_column(at, rows.schema.field(at), pa.array([0.5, np.nan], pa.float32())), part, "")
    assert [(f.column, f.place, f.holds, f.follows) for f in audit(tmp_path).findings if f.kind == "value"] == [
        ("loss", 0, "0.5", "nan")
    ]


def test_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for n in (1, 2):
        loss_fn = EpsilonDPOLoss(0.1, 0.05 * n)
        record = Record(tmp_path, loss_fn)
        steps(record, loss_fn, 1, n)
        record.close()
        assert set_aside(tmp_path) == tmp_path / f"earlier-{n}"
        found = audit(tmp_path / f"earlier-{n}")
        assert found.ok and found.steps == n and found.facts["options"]["epsilon"] == pytest.approx(0.05 * n)
        assert not (tmp_path / "record").exists()


def test_refusals(tmp_path):
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    out = next(o for o in (call(loss_fn, seed) for seed in range(9)) if o.step.any() and o.step.sum())
    record.append(out, step=3)
    loss_fn.update_beta()
    with pytest.raises(ValueError, match=r"beta: got 0\.1\d+, .* before loss_fn.update_beta|beta: got 0\.09\d+, .*"):
        record.append(out, step=3)
    record.append(out, step=3, beta=torch.tensor(0.1))
    with pytest.raises(ValueError, match="step: got 2 after 3"):
        record.append(out, step=2, beta=0.1)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ({"step": 0}, "step: got 0 of 'train', takes optimizer steps, counted from 1"),
        ({"step": -1, "split": "eval"}, "step: got -1 of 'eval', takes optimizer steps done before, from 0"),
        ({"step": 2**31}, f"step: got {2**31} of 'train'"),
        *[({"step": 1, "epoch": value}, f"epoch: got {value}, takes passes over the data")
          for value in (-1.0, float("inf"), float("nan"))],
    ],
)  # fmt: skip
def test_a_place_that_no_run_has_is_refused_while_it_trains(tmp_path, place, named):
    """And not by the audit, of a record that can't be read any more."""
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    out = call(loss_fn)
    with pytest.raises(ValueError, match=named):
        record.append(out, **place)
    steps(record, loss_fn, 1, 2)
    record.close()
    assert audit(tmp_path).ok and audit(tmp_path).steps == 2


def test_an_honest_loop_of_batches_of_any_size(tmp_path):
    """And one that draws its pairs anew at every step: no run said that each comes once."""
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record, at = Record(tmp_path / "sizes", loss_fn, facts={"pairs": {"train": 29}}), 0
    for step, pairs in enumerate((3, 4, 5, 4, 6, 4, 3), 1):
        out = call(loss_fn, step, pairs)
        ids = [f"p{n}" for n in range(at, at + pairs)]
        record.append(out, step=step, row=range(at, at + pairs), pair_id=ids, epoch=at / 29)
        loss_fn.update_beta()
        at += pairs
    record.close()
    found = audit(tmp_path / "sizes")
    assert found.ok and found.limits == [("no_batch_size", {"n": "1", "usual": "4"})], str(found)

    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path / "drawn", loss_fn)
    for step in range(1, 6):
        out = call(loss_fn, step)
        record.append(out, step=step, row=[2, 2, step + 5], pair_id=["b", "b", f"{step}"], epoch=step / 10)
        loss_fn.update_beta()
    record.close()
    found = audit(tmp_path / "drawn")
    assert found.ok and found.limits == [("no_pairs", {"split": "train"})], str(found)


def test_the_number_of_ranks_is_written(tmp_path):
    """By a loop of one process by itself; of several, as the loop says, for some may share their pairs."""
    for name, more, ranks in (("a", {}, 1), ("b", {"rank": 0}, None), ("c", {"rank": 0, "facts": {"ranks": 2}}, 2)):
        loss_fn = EpsilonDPOLoss(0.1, 0.05)
        record = Record(tmp_path / name, loss_fn, **more)
        steps(record, loss_fn, 1, 2)
        record.close()
        assert json.loads((tmp_path / name / "run.json").read_text()).get("ranks") == ranks
        found = audit(tmp_path / name)
        assert found.ok == (ranks != 2) and (("no_ranks", {}) in found.limits) == (ranks is None), str(found)


def test_an_attempt_of_more_ranks_that_left_no_part(tmp_path):
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    for rank in range(4):
        Record(tmp_path, loss_fn, rank=rank, facts={"ranks": 4})
    records = [Record(tmp_path, loss_fn, rank=rank, facts={"ranks": 2}) for rank in (1, 0)]
    out = call(loss_fn)
    for record in records:
        record.append(out, step=1)
        record.close()
    assert sorted(path.name for path in (tmp_path / "record").glob("end-*")) == ["end-000.json", "end-001.json"]
    found = audit(tmp_path)
    assert found.ok, str(found)


def test_epochs_that_were_summed(tmp_path):
    """Ten times 0.1 is less than one in floats, and three of them more than 0.3."""
    loss_fn, epoch = EpsilonDPOLoss(0.1, 0.05), 0.0
    record = Record(tmp_path, loss_fn, facts={"pairs": {"train": 30}})
    for step in range(1, 21):
        out = call(loss_fn, step)
        first = (step - 1) % 10 * 3
        row = range(first, first + 3)
        record.append(out, step=step, row=row, pair_id=[f"p{n}" for n in row], epoch=epoch)
        loss_fn.update_beta()
        epoch += 0.1
        assert (step, epoch < 1) != (10, False)
    record.close()
    found = audit(tmp_path)
    assert found.ok and not found.limits, str(found)


@pytest.mark.parametrize("kind", ["a mapping", "datasets"])
def test_pairs_without_a_column_are_refused(tmp_path, kind):
    whole = {"row": [0], "pair_id": ["a"], "topic": ["x"]}
    for missing in whole:
        part: Any = {name: column for name, column in whole.items() if name != missing}
        there = ", ".join(map(repr, part))
        if kind == "datasets":
            part = pytest.importorskip("datasets").Dataset.from_dict(part)
        with pytest.raises(ValueError, match=rf"pairs\['eval'\]: got {there} without '{missing}', takes row, pair_id,"):
            Record(tmp_path, EpsilonDPOLoss(), pairs={"train": whole, "eval": part}, label="topic")


def test_what_run_json_does_not_take_is_refused_where_it_is_written(tmp_path):
    """A run learns at its start, not from the audit after its end; and what was on record is still there."""
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    steps(record, loss_fn, 1, 2)
    record.close()
    for options, facts, named in (
        ({"method": "mine"}, {}, "facts: options.method: got 'mine', takes one of eps-dpo"),
        ({"veto": ["kl"]}, {}, "facts: options.veto"),
        ({}, {"pairs": {"train": 2.5}}, "facts: pairs: got .'train': 2.5., takes"),
    ):
        with pytest.raises(ValueError, match=named):
            Record(tmp_path, loss_fn, options=options, facts=facts, resume_step=0)
    assert len(read(tmp_path / "record")) == 6 and audit(tmp_path).ok
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json: can't be read as JSON"):
        Record(tmp_path, loss_fn, resume_step=1)


def test_appended_after_it_was_closed(tmp_path):
    """An evaluation after training: until it is closed again, the record says that it is open."""
    loss_fn = EpsilonDPOLoss(0.1, 0.05)
    record = Record(tmp_path, loss_fn)
    steps(record, loss_fn, 1, 2)
    record.close()
    end = tmp_path / "record" / "end-000.json"
    assert json.loads(end.read_text())["closed"]
    loss_fn.eval()
    out = call(loss_fn)
    record.append(out, step=2)
    assert not json.loads(end.read_text())["closed"]
    record.close()
    assert json.loads(end.read_text())["closed"] and audit(tmp_path).ok
    assert np.unique(read(tmp_path / "record")["split"].to_numpy()).tolist() == ["eval", "train"]
