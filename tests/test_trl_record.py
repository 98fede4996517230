"""The record that EpsilonDPOTrainer writes: every pair, by its row in the data as they were given and by its texts."""

import json
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

import trl_runs  # noqa: E402
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402
from epsdpo_kernels.record import read, sources  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from epsdpo_kernels.record.report import report  # noqa: E402
from test_report import data_of  # noqa: E402

ROOT = Path(__file__).parent.parent
EPSILON = 0.05


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def make(tiny, run, data=None, config=EpsilonDPOConfig, **more):
    extra = {k: more.pop(k) for k in ("eval_dataset", "data_collator") if k in more}
    if config is EpsilonDPOConfig:
        more.setdefault("epsilon", EPSILON)
    return EpsilonDPOTrainer(
        model=trl_runs.model(tiny), args=config(**trl_runs.options(run, **more)),
        train_dataset=trl_runs.pairs(tiny) if data is None else data,
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny), **extra,
    )  # fmt: skip


def train(tiny, run, *args, **more):
    trainer = make(tiny, run, *args, **more)
    trainer.train()
    return trainer


def frame(run):
    return read(run / "record").to_pandas()


def ids(data) -> list[str]:
    return [sources.pair_of(dict(row)).id() for row in data]


def test_every_pair_is_on_record(tiny, tmp_path):
    """Shuffled, over two epochs, with two evaluation sets: against the log, which TRL averages by itself."""
    data = trl_runs.pairs(tiny).shuffle(seed=5)
    held_out = {"short": data.select(range(5)), "long": data.select(range(5, 12))}
    trainer = make(tiny, tmp_path, data, max_steps=8, eval_dataset=held_out, eval_strategy="steps", eval_steps=3)
    trainer.evaluate()
    trainer.train()
    found = audit(tmp_path)
    assert found.ok and not found.limits, str(found)
    rows, own = frame(tmp_path), ids(data)
    assert rows["pair_id"].tolist() == [
        own[row + 5 * (split == "eval_long")] for row, split in zip(rows["row"], rows["split"], strict=True)
    ]
    trained = rows.query("split == 'train'")
    assert len(trained) == 96 and trained.groupby(trained["epoch"] // 1)["row"].nunique().tolist() == [48, 48]
    assert trained["row"].tolist()[:48] != trained["row"].tolist()[48:]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (_, of) in zip(log, trained.groupby("step"), strict=True):
        assert entry["loss"] == pytest.approx(of["loss"].mean(), abs=2e-5)
        assert entry["kl/relaxed"] == pytest.approx((of["decision"] == 1).mean())
        assert entry["logps/chosen"] == pytest.approx(of["chosen_logp"].mean(), rel=1e-6)
        assert entry["kl/rejected"] == pytest.approx(of["rejected_kl"].mean(), rel=1e-6, abs=1e-9)
    assert trained["beta"].iloc[-1] != pytest.approx(0.1, rel=1e-3)
    for name, data in held_out.items():
        of = rows.query(f"split == 'eval_{name}'")
        assert of.groupby("step")["row"].apply(sorted).tolist() == [list(range(len(data)))] * 4
        assert of["step"].unique().tolist() == [0, 3, 6, 8]
        logged = [entry[f"eval_{name}_loss"] for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        # Training begins a log of its own.
        assert logged == pytest.approx(of.groupby("step")["loss"].mean().tolist()[1:], rel=1e-5)
    (shown,) = data_of(report([tmp_path]))["runs"]
    assert [one["name"] for one in shown["evaluation"]] == ["eval_long", "eval_short"]
    assert [one["step"] for one in shown["evaluation"]] == [[0, 3, 6, 8]] * 2 and shown["pairs"]["of"] == 48


def test_plain_configs_record_too_and_an_option_turns_it_off(tiny, tmp_path):
    train(tiny, tmp_path / "on", config=trl.DPOConfig, max_steps=2)
    assert audit(tmp_path / "on").ok and len(frame(tmp_path / "on")) == 24
    trainer = train(tiny, tmp_path / "off", record=False, max_steps=2)
    assert not (tmp_path / "off" / "record").exists() and not (tmp_path / "off" / "run.json").exists()
    assert trainer.record is None


def test_rows_are_those_of_the_data_as_given(tiny, tmp_path):
    """Whatever TRL leaves out, and whatever columns there are."""
    rows = trl_runs.pairs(tiny).to_list()
    for i in (0, 3, 17):
        rows[i]["prompt"] = "the sky is blue " * 8
    data = datasets.Dataset.from_list([row | {"row": "a column of theirs", "pair_id": i} for i, row in enumerate(rows)])
    for name, remove in (("a", True), ("b", False)):
        trainer = train(tiny, tmp_path / name, data, max_steps=4, remove_unused_columns=remove)
        assert len(trainer.train_dataset) == 45
        found, written = audit(tmp_path / name), frame(tmp_path / name)
        assert found.ok and not found.limits, str(found)
        assert sorted(written["row"][:45]) == sorted(set(range(48)) - {0, 3, 17})
        assert written["pair_id"].tolist() == [ids(rows)[row] for row in written["row"]]


def test_what_loses_the_row_is_said(tiny, tmp_path):
    class Halving:
        """Trains on every second pair, whatever it is given."""

        def __init__(self):
            self.plain = DataCollatorForPreference(pad_token_id=0, max_length=16)

        def __call__(self, examples):
            assert not {"epsdpo_row", "epsdpo_pair_id"} & examples[0].keys()
            return self.plain(examples[::2])

    train(tiny, tmp_path / "halved", max_steps=2, data_collator=Halving())
    found = audit(tmp_path / "halved")
    assert found.ok and {name for name, _ in found.limits} == {"no_row", "no_id"}, str(found)
    assert frame(tmp_path / "halved")["row"].isna().all() and len(found.table) == 16
    train(tiny, tmp_path / "other", max_steps=2, data_collator=DataCollatorForPreference(pad_token_id=0, max_length=16))
    assert audit(tmp_path / "other").limits == [("last_epoch", {"n": "24", "of": "48"})]

    # A pair that is none to the reader of texts: no id, and the row all the same.
    rows = trl_runs.pairs(tiny).to_list()
    rows[7]["rejected"] = rows[7]["chosen"]
    train(tiny, tmp_path / "identical", datasets.Dataset.from_list(rows), max_steps=4)
    found, written = audit(tmp_path / "identical"), frame(tmp_path / "identical")
    assert found.ok and found.limits == [("no_id", {"split": "train", "n": "1"})]
    assert written["row"][written["pair_id"].isna()].tolist() == [7]


def test_a_stream(tiny, tmp_path):
    """A row is a place in one pass; shuffled anew, the same place is another pair's in the next."""
    data = trl_runs.pairs(tiny)
    stream = data.to_iterable_dataset().shuffle(seed=1, buffer_size=16)
    train(tiny, tmp_path / "run", stream, max_steps=10)
    found, rows = audit(tmp_path / "run"), frame(tmp_path / "run")
    assert found.ok and found.limits == [("stream", {"split": "train"})], str(found)
    assert rows["row"].tolist() == (list(range(48)) * 3)[:120]
    assert (rows["epoch"] // 1).tolist() == [i // 48 for i in range(120)]
    places = {name: place for place, name in enumerate(ids(data))}
    passes = [[places[name] for name in rows["pair_id"][i : i + 48]] for i in (0, 48)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(48)) and passes[0] != passes[1]
    (shown,) = data_of(report([tmp_path / "run"], texts=True))["runs"]
    assert shown["pairs"]["of"] == 48 and set(shown["pairs"]["visits"]) == {2, 3}
    assert shown["texts"] == {} and any("came as a stream" in note for note in shown["notes"])

    # However many processes are to read its shards, which `datasets` puts into another order in every pass.
    for workers in (0, 2):
        train(
            tiny, tmp_path / str(workers), data.to_iterable_dataset(num_shards=5), max_steps=10,
            dataloader_num_workers=workers,
        )  # fmt: skip
    found = audit(tmp_path / "2")
    assert found.ok and found.limits == [("stream", {"split": "train"})], str(found)
    assert frame(tmp_path / "2").equals(frame(tmp_path / "0"))


def test_the_last_step_of_a_pass(tiny, tmp_path):
    """Of 10 pairs in steps of 8 has 2, in a stream too, where nobody knows that it comes."""
    data, found = trl_runs.pairs(tiny, 10), []
    more = {"per_device_train_batch_size": 2, "max_steps": 4, "train_sampling_strategy": "sequential"}
    for name, given in (("map", data), ("stream", data.to_iterable_dataset())):
        trainer = train(tiny, tmp_path / name, given, **more)
        rows = frame(tmp_path / name)
        assert rows.groupby("step")["row"].apply(list).to_dict() == {
            step: list(range(8)) if step % 2 else [8, 9] for step in (1, 2, 3, 4)
        }  # fmt: skip
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        figures = rows[["decision", "beta", "beta_used", "loss"]].to_numpy().ravel().tolist()
        figures += [entry[name] for entry in log for name in ("loss", "grad_norm", "kl/beta", "num_tokens")]
        found.append(figures)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_resumed_stream(tiny, tmp_path):
    """Of two steps a pass: within its third, which is in an order of its own, and where the first ends."""
    data = trl_runs.pairs(tiny)

    def run(pairs, shards=1, **more):
        stream = data.select(pairs).to_iterable_dataset(shards).shuffle(seed=1, buffer_size=16)
        more = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 7} | more
        return make(tiny, tmp_path, stream, **more)

    run(range(10)).train()
    whole = frame(tmp_path)
    assert whole.groupby(whole["epoch"] // 1)["row"].apply(list).to_dict() == {
        0: list(range(10)), 1: list(range(10)), 2: list(range(10)), 3: list(range(8))
    }  # fmt: skip
    for step in (2, 5):
        trainer = run(range(10))
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert frame(tmp_path).equals(whole)
        assert trainer.state.epoch == pytest.approx(3 + 1 / 7)
    # With more steps than it was to have, of which its share of a pass was another.
    trainer = run(range(10), max_steps=9)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    longer = frame(tmp_path)
    same = ["row", "pair_id", "decision", "epoch"]  # the learning rate is not
    assert longer[: len(whole)][same].equals(whole[same])
    assert longer[len(whole) :].groupby(["step", "epoch"])["row"].apply(list).to_dict() == {
        (8, 3): [8, 9], (9, 4): list(range(8))
    }  # fmt: skip
    with pytest.raises(ValueError, match="was 'a stream of 1 shards that begins with .* is 'a stream of 1 sh"):
        run(range(10, 20)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="train_dataset was 'a stream of 1 shards .* is 'a stream of 2 shards"):
        run(range(10), shards=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resumed_at_a_pass_s_end_it_is_not_evaluated_again(tiny, tmp_path):
    data = trl_runs.pairs(tiny)
    more = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 4, "per_device_train_batch_size": 2}

    def run():
        stream = data.select(range(10)).to_iterable_dataset()
        return make(tiny, tmp_path, stream, eval_dataset=data.select(range(10, 16)), **more)

    run().train()
    whole = frame(tmp_path)
    assert whole.query("split == 'eval'").groupby("step").size().to_dict() == {2: 6, 4: 6}
    trainer = run()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert frame(tmp_path).equals(whole)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4]

    class AtEveryStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.evaluate()

    # What somebody evaluates at a pass's last step is not that pass's evaluation.
    trainer = run()
    trainer.add_callback(AtEveryStep())
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2, 2, 3, 4, 4]


def test_a_stream_of_another_format(tiny, tmp_path):
    data = trl_runs.pairs(tiny, 12)
    for name, given in (
        ("plain", data.to_iterable_dataset()),
        ("numpy", data.to_iterable_dataset().with_format("numpy")),
    ):
        train(tiny, tmp_path / name, given, max_steps=2)
    assert frame(tmp_path / "numpy").equals(frame(tmp_path / "plain"))


def test_resumed_without_gap_or_double(tiny, tmp_path):
    train(tiny, tmp_path / "whole", max_steps=9)
    train(tiny, tmp_path / "run", max_steps=5, save_strategy="steps", save_steps=3)  # steps 4 and 5 come again
    make(tiny, tmp_path / "run", max_steps=9, save_strategy="steps", save_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    found = audit(tmp_path / "run")
    assert found.ok and found.limits == [("last_epoch", {"n": "12", "of": "48"})], str(found)
    assert frame(tmp_path / "run").equals(frame(tmp_path / "whole"))

    # In another folder, what came before is in another record, and said to be.
    make(tiny, tmp_path / "other", max_steps=9).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    found = audit(tmp_path / "other")
    assert found.ok and found.limits == [("begins_after", {"step": 3}), ("last_epoch", {"n": "12", "of": "48"})]
    whole = frame(tmp_path / "whole").query("step > 3").reset_index(drop=True)
    assert frame(tmp_path / "other").equals(whole)


def test_grouped_by_length_and_resumed(tiny, tmp_path):
    """In the second epoch, which is grouped anew and alike."""
    data = trl_runs.pairs(tiny, 12)
    data = data.add_column("length", [len(row["chosen"]) for row in data])
    more = {
        "train_sampling_strategy": "group_by_length", "remove_unused_columns": False, "max_steps": 8,
        "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 6,
    }  # fmt: skip
    train(tiny, tmp_path, data, **more)
    whole = frame(tmp_path)
    epochs = [whole["row"].tolist()[i : i + 12] for i in (0, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
    make(tiny, tmp_path, data, **more).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert frame(tmp_path).equals(whole)


def test_begun_anew_in_the_same_folder(tiny, tmp_path):
    """As people run a script again: nothing is lost, and nothing of the first run counts for the second."""
    train(tiny, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    first = frame(tmp_path)
    (tmp_path / "checkpoint-9").mkdir()  # of another trainer
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}')
    with pytest.warns(UserWarning, match="held the record of another run, which is now in .*earlier-1"):
        trainer = train(tiny, tmp_path, max_steps=2, epsilon=0.1)
    found = audit(tmp_path)
    assert found.ok and found.steps == 2, str(found)
    assert [name for name, _ in found.limits] == ["states_of_others", "last_epoch"]
    assert "checkpoint-9" in str(found)
    assert (tmp_path / "earlier-1" / "checkpoint-4").is_dir()  # which the audit of that run reads
    earlier = audit(tmp_path / "earlier-1")
    assert earlier.ok and earlier.facts["options"]["epsilon"] == EPSILON and frame(tmp_path / "earlier-1").equals(first)
    # Training a second time with the same trainer is a run of its own too.
    with pytest.warns(UserWarning, match="earlier-2"):
        trainer.train()
    assert audit(tmp_path).ok and audit(tmp_path / "earlier-2").ok


def test_evaluations_outside_of_training(tiny, tmp_path):
    data = trl_runs.pairs(tiny)
    trainer = train(tiny, tmp_path / "run", data, max_steps=3, eval_dataset=data.select(range(6)))
    trainer.evaluate()
    trainer.evaluate(data.select(range(10, 18)))
    trainer.evaluate({"x": data.select(range(4)), "y": data.select(range(7))})
    found, rows = audit(tmp_path / "run"), frame(tmp_path / "run")
    assert found.ok and {name for name, _ in found.limits} == {"no_pairs", "last_epoch"}, str(found)
    assert all("@" in values["split"] for name, values in found.limits if name == "no_pairs")
    counts = rows.query("split != 'train'").groupby("split").size().to_dict()
    # Of data that were given, rows of the same name are others: the name says of which.
    assert sorted((name.split("@")[0], "@" in name, n) for name, n in counts.items()) == [
        ("eval", False, 6), ("eval", True, 8), ("eval_x", True, 4), ("eval_y", True, 7)
    ]  # fmt: skip
    given = rows[rows["split"].str.startswith("eval@")]
    assert given["pair_id"].tolist() == ids(data)[10:18] and given["row"].tolist() == list(range(8))

    # Streams too, which have no other name than that of their first pairs.
    for first in (20, 30, 20):
        trainer.evaluate(data.select(range(first, first + 4)).to_iterable_dataset())
    before, rows = set(rows["split"]), frame(tmp_path / "run")
    streams = rows[~rows["split"].isin(before)]
    assert streams["row"].isna().all() and sorted(streams.groupby("split").size()) == [4, 8]

    # An evaluation alone is no run to set another one's record aside for.
    with pytest.warns(UserWarning, match="holds the record of another run; this evaluation is not recorded"):
        make(tiny, tmp_path / "run", data, eval_dataset=data.select(range(6))).evaluate()
    assert frame(tmp_path / "run").equals(rows)
    make(tiny, tmp_path / "alone", data, eval_dataset=data.select(range(6))).evaluate()
    assert audit(tmp_path / "alone").ok and len(frame(tmp_path / "alone")) == 6


def test_the_best_checkpoint_is_evaluated_as_what_it_is(tiny, tmp_path):
    """Its policy and its β, after the last step; a resumed run, or another training, begins with its own again."""
    data = trl_runs.pairs(tiny)
    sets = {"a": data.select(range(4)), "b": data.select(range(5))}
    # β falls, so the first evaluation is the best by it.
    best = {
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_kl/beta", "greater_is_better": True,
    }  # fmt: skip
    trainer = make(tiny, tmp_path, data, eval_dataset=sets, max_steps=6, **best)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(data.select(range(6)))
    trainer.predict(trainer.eval_dataset["b"])
    found = audit(tmp_path)
    assert found.ok, str(found)
    rows = found.table.to_pandas()
    held_out = rows[rows["split"] != "train"].assign(split=lambda of: of["split"].str.split("@").str[0])
    assert held_out.groupby(["split", "step", "policy_step"]).size().to_dict() == {
        ("eval", 6, 3): 6, ("eval_a", 3, 3): 4, ("eval_a", 6, 3): 4, ("eval_a", 6, 6): 4, ("eval_b", 3, 3): 5,
        ("eval_b", 6, 3): 5, ("eval_b", 6, 6): 5, ("test", 6, 3): 5,
    }  # fmt: skip
    again, then = (held_out.query(f"split == 'eval_a' and step == {step} and policy_step == 3") for step in (6, 3))
    for name in ("row", "beta", "beta_used", "margin", "loss", "decision"):
        assert again[name].tolist() == then[name].tolist(), name
    assert (held_out.query("policy_step == 6")["beta"] < again["beta"].iloc[0]).all()
    # The report draws it where the policy is from.
    (shown,) = data_of(report([tmp_path]))["runs"]
    assert [one["step"] for one in shown["evaluation"] if one["name"] == "eval_a"] == [[3, 6]]

    trainer = make(tiny, tmp_path, data, eval_dataset=sets, max_steps=8, **best | {"load_best_model_at_end": False})
    trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()
    found = audit(tmp_path)
    assert found.ok, str(found)
    rows = found.table.to_pandas().query("split == 'eval_a'")
    assert rows.groupby(["step", "policy_step"]).size().to_dict() == {(3, 3): 4, (6, 3): 4, (6, 6): 4, (8, 8): 8}


def test_an_evaluation_does_not_take_the_trainings_name(tiny, tmp_path):
    data = trl_runs.pairs(tiny)
    trainer = make(tiny, tmp_path, data, eval_dataset=data.select(range(4)), max_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="metric_key_prefix: got 'train', which is the training's own name in the rec"):
        trainer.evaluate(metric_key_prefix="train")
    trainer.evaluate(data.select(range(6)), metric_key_prefix="train")  # of other data, which its name says
    found = audit(tmp_path)
    assert found.ok, str(found)
    splits = [split.split("@")[0] for split in found.table["split"].to_pylist()]
    assert splits == ["train"] * (len(splits) - 6) + ["train"] * 6


def test_texts_are_found_again(tiny, tmp_path, monkeypatch):
    """In the file that `datasets` keeps of the data, whatever order they were put in since."""
    rows = trl_runs.pairs(tiny).to_list()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    data = data.shuffle(seed=2).select(range(30))
    train(tiny, tmp_path / "run", data, max_steps=3)
    (shown,) = data_of(report([tmp_path / "run"], texts=True))["runs"]
    assert len(shown["texts"]) == 30
    for place, row in enumerate(shown["pairs"]["row"]):
        assert shown["texts"][str(place)] == [data[row][name] for name in ("prompt", "chosen", "rejected")]

    train(tiny, tmp_path / "memory", datasets.Dataset.from_list(rows), max_steps=2)
    (shown,) = data_of(report([tmp_path / "memory"], texts=True))["runs"]
    assert shown["texts"] == {} and any("made in memory" in note for note in shown["notes"])


def test_what_stops_a_run_is_on_record(tiny, tmp_path):
    trainer = make(tiny, tmp_path)
    step, plain = trainer.training_step, []

    def stop(*args, **kwargs):
        plain.append(step(*args, **kwargs))
        if len(plain) == 7:
            raise KeyboardInterrupt
        return plain[-1]

    trainer.training_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    rows = frame(tmp_path)
    assert len(rows) == 21 and rows["step"].max() == 2
    assert [name for name, _ in audit(tmp_path).limits] == ["open"]
