"""What a run is told: every option of transformers is honoured or refused, and a YAML file says what it says."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from transformers.integrations import integration_utils  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_available  # noqa: E402

from epsdpo_kernels.integrations.batches import check_kept  # noqa: E402
from epsdpo_kernels.integrations.checks import NUMBERS, check_options  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.options import REFUSED, PairOptions, TrainingArguments, parse  # noqa: E402

NAMES = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
# By transformers.Trainer itself, which this trainer leaves to it.
HONOURED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy
    logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_do_concat_batches eval_use_gather_object eval_accumulation_steps save_only_model
    save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed skip_memory_metrics
    parallelism_config
""".split()  # fmt: skip
# By this trainer, which has an own way where transformers has one; each has a test below.
HONOURED_HERE = """
    eval_on_start include_num_input_tokens_seen dataloader_drop_last train_sampling_strategy accelerator_config do_eval
    resume_from_checkpoint
""".split()  # fmt: skip
# What they say is so whatever they say: a run trains, gives losses and no predictions, and stops at the first loss that
# is not finite; the launcher knows the rank.
IRRELEVANT = "do_train prediction_loss_only logging_nan_inf_filter local_rank".split()

# A value other than the one that is taken.
OTHERWISE = {
    "auto_find_batch_size": True, "average_tokens_across_devices": False, "batch_eval_metrics": True,
    "bf16_full_eval": True, "debug": "underflow_overflow", "do_predict": True, "enable_jit_checkpoint": True,
    "fp16_full_eval": True, "include_for_metrics": ["inputs"], "label_names": ["labels"],
    "label_smoothing_factor": 0.3, "length_column_name": "words", "liger_kernel_config": {"rope": True},
    "remove_unused_columns": True, "use_cache": True, "use_liger_kernel": True,
}  # fmt: skip


def test_every_option_is_honoured_or_refused():
    """Whatever version of transformers is there: a name of a newer one is in no list, one of the lists in no older."""
    known = [*HONOURED, *HONOURED_HERE, *IRRELEVANT, *REFUSED]
    assert len(known) == len(set(known)) and not set(NAMES) - set(known)
    assert OTHERWISE.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [name for name in OTHERWISE if name in NAMES])
def test_an_option_that_would_do_nothing_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: got .*, takes {re.escape(repr(REFUSED[name][0]))}: "):
        TrainingArguments(tmp_path, report_to="none", use_cpu=True, **{name: OTHERWISE[name]})


@pytest.mark.parametrize(
    "more, said",
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy: got 'group_by_length', takes one of",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: got 'batch_rebalance'"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: got split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: got dispatch_batches"),
    ],
)
def test_another_order_or_other_batches_are_refused(tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        TrainingArguments(tmp_path, report_to="none", use_cpu=True, **more)


@pytest.mark.parametrize(
    "more", [{"do_eval": True}, {"eval_strategy": "epoch"}, {"eval_on_start": True, "do_eval": True}]
)
def test_an_evaluation_of_nothing_is_refused(tiny, tmp_path, more):
    with pytest.raises(ValueError, match="do_eval, eval_strategy: got an evaluation to make"):
        main(flags(tiny, tmp_path, **more))


def test_options_that_need_another_are_refused(tiny, tmp_path):
    for more, said in (
        ({"eval_fraction": 0.5, "eval_dataset": tiny / "pairs.jsonl"}, "eval_fraction: got 0.5 beside an eval_dataset"),
        ({"lora_r": -1}, "lora_r: got -1, takes a rank, or 0"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules: got some without lora_r"),
    ):
        with pytest.raises(ValueError, match=said):
            main(flags(tiny, tmp_path, **more))


@pytest.mark.parametrize("name", ["wandb", "mlflow", "flyte", "paper"])
def test_a_report_to_what_is_not_there_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(integration_utils, f"is_{'flytekit' if name == 'flyte' else name}_available", bool, False)
    for given in (name, ["tensorboard", name]):
        said = re.escape(f"report_to: got {[name] if given == name else given}, takes none, all, or some of ")
        with pytest.raises(ValueError, match=f"{said}.*tensorboard.*: .*{name}.*(install|supported)"):
            TrainingArguments(tmp_path, report_to=given, use_cpu=True)
    assert "tensorboard" in TrainingArguments(tmp_path, report_to="all", use_cpu=True).report_to


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused(tmp_path, name):
    """In the words of the option, before anything of the run is made."""
    said = f"{name}: got .*, takes {re.escape(NUMBERS[name][1])}"
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, eval_strategy="steps", save_strategy="steps")
    for value in (-2, 0, float("nan")):
        vars(args)[name] = value
        with contextlib.nullcontext() if NUMBERS[name][0](value) else pytest.raises(ValueError, match=said):
            check_options(args)


def test_numbers_that_nothing_reads_may_be_anything(tmp_path):
    never = {f"{what}_strategy": "no" for what in ("save", "eval", "logging")}
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, max_steps=3, num_train_epochs=-1, **never)
    args.save_steps = args.eval_steps = args.logging_steps = 0
    check_options(args)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: got 0, takes a positive number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0, takes a positive number"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size: got -1, takes a positive number"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps: got 0, takes a positive number"),
        ({"max_steps": 0}, "max_steps: got 0, takes a positive number, or -1"),
        ({"learning_rate": -1}, "learning_rate: got -1.0, takes 0 or a positive finite number"),
        ({"adam_beta2": 1}, r"adam_beta2: got 1.0, takes a number in \[0, 1\)"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha: got -1.0, takes 0 or"),
        ({"seed": -1}, "seed: got -1, takes an integer in"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, takes a positive number"),
        ({"torch_compile_backend": "none-such"}, "torch_compile_backend: got 'none-such', takes one of .*inductor"),
        ({"parallelism_config": '{"sp_size": 2.0}'}, "parallelism_config: .*sp_size is 2.0, no integer"),
        ({"parallelism_config": "2"}, "parallelism_config: got '2', takes accelerate's sizes by name"),
        ({"parallelism_config": '{"tp_size": 2}'}, "got sizes of 2 processes together in a run of 1, takes"),
        ({"parallelism_config": '{"cp_size": 2}'}, "parallelism_config: got sizes of 2 processes"),
        ({"parallelism_config": '{"dp_shard_size": 2}'}, "parallelism_config: got sizes of 2 processes"),
    ],
)  # fmt: skip
def test_a_run_that_could_not_begin_is_refused(tiny, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        parse(flags(tiny, tmp_path, **more))


@pytest.mark.skipif(is_deepspeed_available(), reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="deepspeed: got 'zero.json', takes none: DeepSpeed is not installed"):
        parse(flags(tiny, tmp_path, deepspeed="zero.json"))


def losses(trainer):
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


SAME = {
    "eval_do_concat_batches": False, "eval_use_gather_object": True, "eval_accumulation_steps": 1,
    "prediction_loss_only": True, "skip_memory_metrics": False, "torch_empty_cache_steps": 1,
    "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "fork", "save_on_each_node": True, "log_on_each_node": False,
    "log_level": "error", "logging_first_step": True, "run_name": "same", "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True, "ddp_timeout": 60, "ddp_find_unused_parameters": True,
    "logging_nan_inf_filter": False, "do_train": True, "do_eval": True, "activation_checkpointing": True,
    "accelerator_config": '{"even_batches": false, "use_seedable_sampler": false}',
}  # fmt: skip
OTHER = [
    {"neftune_noise_alpha": 5}, {"weight_decay": 100}, {"max_grad_norm": 1e-3}, {"bf16": True},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-3}'}, {"label_smoothing": 0.3},
]  # fmt: skip


def test_options_do_what_they_say(tiny, tmp_path):
    """Some change how a run goes and not what it gives; of the others each changes what it gives."""
    more = {"eval_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2}
    plain = losses(main(flags(tiny, tmp_path / "plain", **more)))
    assert losses(main(flags(tiny, tmp_path / "same", **more, **SAME))) == pytest.approx(plain, abs=1e-6)
    for i, other in enumerate(OTHER):
        found = losses(main(flags(tiny, tmp_path / str(i), **(more | other))))
        assert len(found) >= 8 and max(abs(a - b) for a, b in zip(found, plain, strict=False)) > 1e-5, other


def order(run):
    """Rows in the order of steps; within one, where all pairs weigh alike, in the data's."""
    rows = read(run / "record").to_pandas().sort_values(["step", "row"])
    return rows[rows.split == "train"].row.tolist()


def test_pairs_in_the_order_of_the_data(tiny, tmp_path):
    main(flags(tiny, tmp_path / "a", train_sampling_strategy="sequential", num_train_epochs=2))
    assert order(tmp_path / "a") == [*range(48)] * 2
    main(flags(tiny, tmp_path / "b"))
    assert order(tmp_path / "b") != [*range(48)] and sorted(order(tmp_path / "b")) == [*range(48)]
    main(flags(tiny, tmp_path / "c", seed=4, data_seed=3))
    assert order(tmp_path / "c") == order(tmp_path / "b")


def test_a_short_last_batch_can_be_dropped(tiny, tmp_path):
    more = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1, "dataloader_drop_last": True}
    trainer = main(flags(tiny, tmp_path, **more))
    assert trainer.state.global_step == 9 and len(order(tmp_path)) == 45


@pytest.mark.parametrize(
    "more, said",
    [
        ({"per_device_train_batch_size": 49, "max_steps": 1}, "got True with 48 pairs in train_dataset, .* least 49"),
        ({"eval_fraction": 0.125}, "got True with 6 pairs in eval_dataset, .*: takes at least 8, a batch of 8$"),
    ],
)
def test_pairs_that_would_all_be_dropped_are_refused(tiny, tmp_path, more, said):
    with pytest.raises(ValueError, match=f"dataloader_drop_last: {said}"):
        main(flags(tiny, tmp_path, dataloader_drop_last=True, **more))


@pytest.mark.parametrize(
    "lines, more, said",
    [
        (0, {}, "dataset: of .*none.jsonl no pair is left\n.*kept 0 of 0 rows"),
        (0, {"dataset": None, "eval_dataset": "none.jsonl"}, "eval_dataset: of .*none.jsonl no pair is left\n"),
        (3, {"max_length": 2}, "dataset: of .*none.jsonl no pair is left\n.*kept 0 of 3 rows\n.*identical after"),
        (None, {}, "dataset: there is no file .*none.jsonl"),
        (
            4,
            {"eval_fraction": 0.9},
            "eval_fraction: got 0.9 of 4 pairs, takes a share that leaves at least one to train",
        ),
    ],
    ids=["empty", "nothing held out", "all dropped", "no file", "all held out"],
)
def test_data_of_nothing_are_refused(tiny, tmp_path, lines, more, said):
    path = tmp_path / "none.jsonl"
    if lines is not None:
        row = {"prompt": "what is", "chosen": "so yes", "rejected": "so no"}
        path.write_text("".join(json.dumps(row | {"prompt": f"{i} is"}) + "\n" for i in range(lines)))
    named = {name: (tiny / "pairs.jsonl" if of is None else path) for name, of in more.items() if "dataset" in name}
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{said}"):
        main(flags(tiny, tmp_path / "run", **{"dataset": path} | more | named))


def test_fewer_pairs_than_a_batch_are_a_short_one(tiny, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text((tiny / "pairs.jsonl").read_text().splitlines(keepends=True)[0])
    trainer = main(flags(tiny, tmp_path / "run", dataset=path, gradient_accumulation_steps=100))
    assert trainer.state.global_step == 1 and order(tmp_path / "run") == [0]


def test_every_rank_has_to_get_a_batch():
    check_kept(10, "eval_dataset", 5, 2)
    with pytest.raises(ValueError, match="got True with 9 pairs in eval_dataset.* 10, a batch of 5 on each of 2 ranks"):
        check_kept(9, "eval_dataset", 5, 2)


def labelled(path, **columns):
    pairs = ({"prompt": "what is ", "chosen": "yes " + "and " * i, "rejected": "no"} | columns for i in range(8))
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return path


def test_a_label_that_a_data_set_lacks_is_refused(tiny, tmp_path):
    """By the name of the data set; one that can't be carried, and the row's own number, are none."""
    topic = labelled(tmp_path / "topic.jsonl", topic="x", kind=3)
    plain = labelled(tmp_path / "plain.jsonl", words="x " * 64, row=1)
    for data, held_out, label, said in (
        (topic, topic, "topics", r"got 'topics', .* dataset \(.*topic.jsonl\) has: 'topic', 'kind'"),
        (topic, plain, "topic", r"got 'topic', .* eval_dataset \(.*plain.jsonl\) has: none"),
        (plain, topic, "topic", r"got 'topic', .* dataset \(.*plain.jsonl\) has: none"),
        (plain, plain, "words", r"got 'words', takes a column of short strings, integers or booleans"),
        (plain, plain, "row", r"got 'row'"),
    ):
        with pytest.raises(ValueError, match=f"label_column: {said}"):
            main(flags(tiny, tmp_path / "run", dataset=data, eval_dataset=held_out, label_column=label))
    main(flags(tiny, tmp_path / "run", dataset=topic, label_column="kind", max_steps=1))
    assert set(read(tmp_path / "run" / "record")["label"].to_pylist()) == {"3"}


def test_tokens_are_counted(tiny, tmp_path):
    trainer = main(flags(tiny, tmp_path, include_num_input_tokens_seen=True))
    count = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
    assert trainer.state.num_input_tokens_seen == trainer.state.log_history[-2]["num_input_tokens_seen"] == count


def test_evaluated_at_the_start(tiny, tmp_path):
    more = {"eval_fraction": 0.25, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 3}
    trainer = main(flags(tiny, tmp_path, **more))
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [0, 3, 6] and trainer.state.global_step == 6
    assert trainer.state.log_history[0]["eval_kl/chosen"] == 0


YAML = {
    "gradient_checkpointing_kwargs:\n  use_reentrant: false": (
        "gradient_checkpointing_kwargs",
        {"use_reentrant": False},
    ),
    "lr_scheduler_kwargs: {min_lr: 1.0e-7}": ("lr_scheduler_kwargs", {"min_lr": 1e-7}),
    "lr_scheduler_kwargs: {min_lr: 1e-7}": ("lr_scheduler_kwargs", {"min_lr": 1e-7}),
    "optim_args: null": ("optim_args", None),
    "cache_reference: null": ("cache_reference", None),
    "ref_model: ~": ("ref_model", None),
    "resume_from_checkpoint: null": ("resume_from_checkpoint", None),
    "resume_from_checkpoint: last": ("resume_from_checkpoint", "last"),
    "max_prompt_length: null": ("max_prompt_length", None),
    "max_prompt_length: 7": ("max_prompt_length", 7),
    "max-length: 99": ("max_length", 99),
    "learning_rate: 3e-5": ("learning_rate", 3e-5),
    "learning_rate: 1": ("learning_rate", 1.0),
    "save_strategy: no": ("save_strategy", "no"),
    "eval_strategy: no": ("eval_strategy", "no"),
    "bf16: false": ("bf16", False),
    "gradient_checkpointing: yes": ("gradient_checkpointing", True),
    "dropout: true": ("dropout", True),
    "veto: [entropy=3.5, kl=40]": ("veto", ["entropy=3.5", "kl=40"]),
    "lora_r: 4\nlora_target_modules:\n- q_proj\n- v_proj": ("lora_target_modules", ["q_proj", "v_proj"]),
    "lora_r: 4\nlora_target_modules: q_proj": ("lora_target_modules", ["q_proj"]),
    "run_name: 5": ("run_name", "5"),
    "run_name: a run, with words": ("run_name", "a run, with words"),
    "report_to: [tensorboard]": ("report_to", ["tensorboard"]),
    "report_to: null": ("report_to", []),
    "trackio_static_space_id: false": ("trackio_static_space_id", False),
    "fsdp: false": ("fsdp", False),
    "fsdp: true": ("fsdp", True),
    # What YAML 1.1 has for octal, base 60 and dates, and Python writes otherwise than it reads.
    "seed: 010": ("seed", 10),
    "seed: 0x10": ("seed", 16),
    "seed: 0o10": ("seed", 8),
    "seed: 1_000": ("seed", 1000),
    "learning_rate: 010": ("learning_rate", 10.0),
    "max_grad_norm: .inf": ("max_grad_norm", float("inf")),
    "lr_scheduler_kwargs: {num_cycles: 010, at: 1:30, on: 2026-01-02}": (
        "lr_scheduler_kwargs",
        {"num_cycles": 10, "at": "1:30", "on": "2026-01-02"},
    ),
    "run_name: 12:30:00": ("run_name", "12:30:00"),
    "run_name: 1.10": ("run_name", "1.10"),
    "run_name: 2026-1-2 3:04:05": ("run_name", "2026-1-2 3:04:05"),
    "run_name: TRUE": ("run_name", "TRUE"),
    "label_column: 007": ("label_column", "007"),
    "output_dir: 1e5": ("output_dir", "1e5"),
    "hub_token: 0x10": ("hub_token", "0x10"),
    "lora_r: 4\nlora_target_modules: 007": ("lora_target_modules", ["007"]),
    "lora_r: 4\nlora_target_modules: [010, 1.10, true]": ("lora_target_modules", ["010", "1.10", "true"]),
    "beta: 0.3": ("beta", 0.3),
}


def from_yaml(tmp_path, text, *more):
    path = tmp_path / "run.yaml"
    plain = "" if "report_to" in text else "report_to: none\n"
    path.write_text(f"model: {tmp_path}\ndataset: {tmp_path}\nuse_cpu: true\n{plain}{text}\n")
    options, args = parse([str(path), *more])
    return vars(options) | vars(args)


@pytest.mark.parametrize("text", YAML)
def test_values_of_a_yaml_file_keep_their_type(tmp_path, text):
    name, value = YAML[text]
    got = from_yaml(tmp_path, text)[name]
    assert got == value and isinstance(got, type(value))


def test_flags_overrule_a_yaml_file(tmp_path):
    text = "beta: 0.3\nref_model: null\nlora_r: 4\nlora_target_modules: [q_proj]\nlr_scheduler_kwargs: {min_lr: 1e-7}"
    more = "--beta=0.4 --ref_model other --lora_target_modules k_proj v_proj".split()
    got = from_yaml(tmp_path, text, *more, "--lr_scheduler_kwargs", '{"min_lr": 1e-6}')
    assert (got["beta"], got["ref_model"], got["lora_target_modules"]) == (0.4, "other", ["k_proj", "v_proj"])
    assert got["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    "text, said",
    [
        ("betta: 0.3", "got 'betta', which is no option"),
        ("beta: null", "beta: got null, takes float"),
        ("beta: [0.1, 0.2]", "beta: got a list, takes float"),
        ("model: {name: x}", "model: got a dict, takes str"),
        ("max_length: [3]", "max_length: got a list, takes int"),
        ("veto: [{entropy: 3}]", "veto: got a list, takes list.str."),
        ("- a\n- b", "run.yaml"),
        ("a: [", "run.yaml"),
    ],
)
def test_a_yaml_file_that_says_something_else_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        from_yaml(tmp_path, text)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("- model\n")
    with pytest.raises(ValueError, match="got list, takes names of options with values"):
        parse([str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "text", ["max_length: 12.5", "beta: much", "method: ppo", "dtype: int8", "bf16: perhaps", "seed: 12:30"]
)
def test_plain_values_are_checked_as_flags_are(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        from_yaml(tmp_path, text)
    assert f"argument --{text.split(':')[0]}" in capsys.readouterr().err


def test_what_training_computes_in(tmp_path):
    for more, dtype in (({}, None), ({"bf16": True}, torch.bfloat16)):
        assert TrainingArguments(tmp_path, report_to="none", use_cpu=True, **more).autocast_dtype == dtype
    assert {field.name for field in dataclasses.fields(PairOptions)}.isdisjoint(vars(TrainingArguments(tmp_path)))
