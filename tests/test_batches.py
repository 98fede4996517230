"""What a batch's layout may not change: a step's pairs, its decisions, β. And what a run says of it."""

import contextlib
import copy
import json
import re
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset  # noqa: E402
from transformers.integrations import neftune  # noqa: E402

import trl_runs  # noqa: E402
from epsdpo_kernels.integrations import batches, memory  # noqa: E402
from epsdpo_kernels.integrations.batches import DealtSampler, deal, pair_lengths  # noqa: E402
from epsdpo_kernels.integrations.memory import expected_memory, kept_of_forward  # noqa: E402
from epsdpo_kernels.integrations.transformers import head_inputs, positions, rows_alone_up_to  # noqa: E402
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from test_models import build  # noqa: E402
from train.__main__ import build as build_run  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.options import parse  # noqa: E402


def test_deal():
    tokens = [9, 1, 5, 5, 2, 8, 3].__getitem__
    # 9 and 8 lie apart, and the batch that is short stays the last.
    dealt = deal([0, 1, 2, 3, 4, 5, 6], tokens, 2)
    assert sorted(dealt) == list(range(7))
    sums = [sum(map(tokens, dealt[i : i + 2])) for i in (0, 2, 4)]
    assert sums == [10, 10, 8] and dealt[6:] == [3]
    assert deal([], tokens, 2) == []


def test_a_dealt_epoch_keeps_every_steps_pairs():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (50,), generator=g).tolist()
    order = torch.randperm(52, generator=g).tolist()  # two blanks past the end
    dealt = list(DealtSampler(order, tokens, batch_size=3, batches=4))
    for start in range(0, 52, 12):
        assert sorted(dealt[start : start + 12]) == sorted(order[start : start + 12])
        if start + 12 <= 52:
            loads = [sum(tokens[i] for i in dealt[at : at + 3] if i < 50) for at in range(start, start + 12, 3)]
            given = [sum(tokens[i] for i in order[at : at + 3] if i < 50) for at in range(start, start + 12, 3)]
            assert max(loads) <= max(given)
            assert max(loads) - min(loads) <= max(tokens)


def test_lengths_of_data_sets_and_lists():
    rows = [
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r} for p, c, r in [(1, 2, 3), (4, 1, 1)]
    ]
    assert pair_lengths(rows).tolist() == [[1, 2, 3], [4, 1, 1]]
    data = Dataset.from_list(rows + rows).select([2, 1])  # rows by way of an index
    assert pair_lengths(data).tolist() == [[1, 2, 3], [4, 1, 1]]


def record_of(run):
    """(split, step, pair) -> (decision, β of the run, β used), and each optimizer step's pairs."""
    rows = read(run / "record").to_pylist()
    return {(r["split"], r["step"], r["row"]): (r["decision"], r["beta"], r["beta_used"]) for r in rows}


@pytest.mark.parametrize(
    "more", [{}, {"lora_r": 4}, {"gradient_checkpointing": True}], ids=["full", "lora", "checkpointing"]
)
def test_no_layout_changes_a_decision(tiny, tmp_path, more):
    """Padded, packed, and cut at 30 and at 60 tokens: the same pairs a step, the same decisions, the same β."""
    layouts = {"padded": {"packed": False}, "packed": {}, "cut": {"max_tokens_per_batch": 30},
               "padded, cut": {"packed": False, "max_tokens_per_batch": 60}}  # fmt: skip
    found, logs = {}, {}
    for name, layout in layouts.items():
        run = main(flags(tiny, tmp_path / name, eval_fraction=0.2, logging_steps=1, **layout, **more))
        found[name] = record_of(tmp_path / name)
        logs[name] = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(found["padded"]) > 40 and {d for d, *_ in found["padded"].values()} >= {0, 1}
    for name in layouts:
        assert found[name].keys() == found["padded"].keys()
        for place, (decision, beta, used) in found["padded"].items():
            assert found[name][place][0] == decision, (name, place)
            assert found[name][place][1:] == pytest.approx((beta, used), rel=1e-6)
        for a, b in zip(logs[name], logs["padded"], strict=True):
            for what in ("loss", "grad_norm", "kl/chosen", "rewards/margins"):
                assert a[what] == pytest.approx(b[what], rel=1e-3, abs=1e-5), (name, what)
    saved = [entry["padding_saved"] for entry in logs["packed"]]
    assert all(0.2 < share < 0.9 for share in saved)
    assert all(entry["padding_saved"] == 0 for entry in logs["padded"])
    assert all(entry["tokens_per_second"] > 0 for entry in logs["packed"])
    assert sum(e["tokens"] for e in logs["cut"]) == sum(e["tokens"] for e in logs["packed"])
    assert sum(e["tokens"] for e in logs["packed"]) < sum(e["tokens"] for e in logs["padded"])


def test_pairs_are_dealt_as_max_length_leaves_them(tiny, tmp_path, monkeypatch):
    """Two prompts of over a thousand tokens are cut to 64 by TRL's collator, like eight more."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    lengths = [1000] * 2 + [60] * 8 + [2] * 6
    rows = [{"prompt": "the sky", "chosen": " is" * n + " yes", "rejected": " is" * n + " no"} for n in lengths]
    more = {"max_length": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = EpsilonDPOTrainer(
        trl_runs.model(tiny), args=EpsilonDPOConfig(**trl_runs.options(tmp_path, **more)),
        train_dataset=Dataset.from_list(rows), processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
    )  # fmt: skip
    tokens = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()]
    # Pairs of 128 and of 12 tokens: two batches of three long ones, two of two.
    assert sorted(tokens) == [280, 280, 396, 396]


def test_tokens_per_second_are_those_of_steps(tiny, tmp_path, monkeypatch):
    """Whatever evaluations and checkpoints take between them."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    now = iter(range(10**9))  # every look at the clock is a second later
    waited = [0]
    monkeypatch.setattr(batches.time, "perf_counter", lambda: next(now) + waited[0])

    class Slow(transformers.TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            waited[0] += 1000

        on_save = on_evaluate

    held_out = trl_runs.pairs(tiny, 4)
    found = []
    for every in (8, 1):
        args = EpsilonDPOConfig(**trl_runs.options(
            tmp_path / str(every), max_steps=8, logging_steps=4, eval_strategy="steps", eval_steps=every,
            save_strategy="steps", save_steps=every,
        ))  # fmt: skip
        trainer = EpsilonDPOTrainer(
            trl_runs.model(tiny), args=args, train_dataset=trl_runs.pairs(tiny), callbacks=[Slow()],
            eval_dataset={"a": held_out, "b": held_out},
            processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
        )  # fmt: skip
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([entry["tokens"] / entry["tokens_per_second"] for entry in log])
    (first, second), (_, evaluated) = found
    assert first < 10 and second < 10 and evaluated < 20


@pytest.mark.parametrize("trainer", ["train", "trl"])
def test_micro_batches_are_bounded(tiny, tmp_path, monkeypatch, trainer):
    """In training and in evaluation."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    sizes = {True: [], False: []}
    whole = batches.PackedBatches.packing_of

    def packing_of(self, batch):
        packing = whole(self, batch)
        sizes[self.model.training].append((packing.input_ids.numel(), len(packing.segments.lengths)))
        return packing

    monkeypatch.setattr(batches.PackedBatches, "packing_of", packing_of)
    if trainer == "train":
        main(flags(tiny, tmp_path / "run", max_tokens_per_batch=40, eval_fraction=0.25))
        pairs = {True: 36, False: 12}
    else:
        trl_run(tiny, tmp_path / "run", max_tokens_per_batch=40, max_steps=4)
        pairs = {True: 48, False: 10}
    for training, found in sizes.items():
        assert sum(n for _, n in found) == pairs[training]
        assert all(tokens <= 40 or n == 1 for tokens, n in found)
        assert any(n > 1 for _, n in found)


def trl_run(tiny, folder, **more):
    args = EpsilonDPOConfig(**trl_runs.options(folder, **({"epsilon": 0.05} | more)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    trainer = EpsilonDPOTrainer(
        trl_runs.model(tiny), args=args, train_dataset=trl_runs.pairs(tiny), eval_dataset=trl_runs.pairs(tiny, 10),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.evaluate()


def test_no_layout_changes_a_run_of_trl(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    first, evaluated = trl_run(tiny, tmp_path / "padded", packed=False, pad_to_multiple_of=8)
    for more in ({}, {"max_tokens_per_batch": 30}, {"packed": False, "max_tokens_per_batch": 60}):
        trainer, metrics = trl_run(tiny, tmp_path / "other", **more)
        assert trainer.packed == more.get("packed", True)
        assert trainer.loss_fn.beta.item() == pytest.approx(first.loss_fn.beta.item(), rel=1e-6)
        for a, b in zip(trainer.state.log_history[:-1], first.state.log_history[:-1], strict=True):
            of_pairs = ("loss", "grad_norm", "kl/relaxed", "kl/tightened", "kl/beta", "kl/chosen", "logps/rejected")
            for name in (*of_pairs, "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens"):
                if name in b:
                    assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        for name in ("eval_loss", "eval_kl/chosen", "eval_rewards/margins", "eval_logits/rejected"):
            assert metrics[name] == pytest.approx(evaluated[name], rel=1e-3, abs=1e-5), name


def test_a_run_says_what_it_does_and_needs(tiny, tmp_path, capsys):
    main(flags(tiny, tmp_path / "packed", max_steps=1))
    said = capsys.readouterr().out
    assert "rows: packed, attention by by_segment" in said
    assert "memory: about 0.00 GiB are needed (weights 0.00, gradients 0.00" in said
    assert "the longest micro-batch has at most" in said


def test_a_forecast_that_fails_is_said_and_stops_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batches, "expected_memory", lambda *_, **__: 1 / 0)
    assert main(flags(tiny, tmp_path, max_steps=1)).state.global_step == 1
    assert "memory: not foreseen (ZeroDivisionError: division by zero); the longest" in capsys.readouterr().out


def test_sparse_weights_are_no_activations():
    peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")

    def needed(model):
        return expected_memory(model, None, tokens=1000, scored=400, optimizer="sgd").activations

    plain = needed(build("Llama"))
    sparse = needed(peft.get_peft_model(build("Llama"), peft.ShiraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    assert 0.5 * plain < sparse < 2 * plain


def gpt2(tiny, folder, places=24, words=23):
    """A model with a table of positions, and its tokenizer's folder."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=words, n_positions=places, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    rows = [{"prompt": "the sky is " * 5, "chosen": " yes" * n, "rejected": " no" * n} for n in (1, 3, 13)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def in_train(folder, run, max_length):
    return main(flags(folder, run, max_length=max_length, max_prompt_length=max_length - 1, max_steps=1))


def in_cache(folder, run, max_length):
    more = {"max_length": max_length, "max_prompt_length": max_length - 1, "max_steps": 1}
    return main(flags(folder, run, **more, cache_reference=run / "cache"))


def in_trl(folder, run, max_length):
    return trl_run(folder, run, max_steps=1, max_length=max_length)[0]


@pytest.mark.parametrize("run", [in_train, in_cache, in_trl])
def test_rows_that_a_model_has_no_place_for_are_refused(tiny, tmp_path, run):
    folder = gpt2(tiny, tmp_path / "places")
    with pytest.raises(
        ValueError, match="dataset: got rows of (28|29|30) tokens, takes up to 24, the positions of GPT2LM"
    ):
        run(folder, tmp_path / "a", 64)
    assert run(folder, tmp_path / "b", 24).state.global_step == 1
    folder = gpt2(tiny, tmp_path / "words", words=20)
    with pytest.raises(ValueError, match="dataset: got the token id 20, takes ids below 20, the vocabulary of GPT2LM"):
        run(folder, tmp_path / "c", 24)


def test_which_models_have_a_table_of_positions():
    """Those that fail past its end, and no other."""
    small = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    common = small | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
    }
    gpt = small | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    configs = [
        (transformers.GPT2Config(**gpt), True),
        (transformers.GPTJConfig(**gpt, rotary_dim=8), True),
        (transformers.CodeGenConfig(**gpt, rotary_dim=8), True),
        (transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32), True),
        (transformers.GPTNeoXConfig(**common, intermediate_size=48), False),
        (transformers.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4), False),
        (transformers.LlamaConfig(**common, intermediate_size=48), False),
    ]
    for config, table in configs:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert positions(model) == (24 if table else None), type(model)
        ids = torch.full((1, 25), 7)
        with pytest.raises((IndexError, RuntimeError)) if table else contextlib.nullcontext():
            head_inputs(model, ids, torch.ones_like(ids))
        head_inputs(model, ids[:, 1:], torch.ones_like(ids[:, 1:]))


def test_a_model_that_cannot_trains_on_padded_rows_and_says_so(tiny, tmp_path, capsys):
    config = transformers.BloomConfig(vocab_size=23, hidden_size=32, n_layer=2, n_head=4)
    folder = tmp_path / "bloom"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    run = main(flags(tiny, tmp_path / "run", model=folder, max_steps=2))
    assert not run.packed
    assert (
        "rows: padded. ValueError: the layers of BloomForCausalLM do not call transformers' " in capsys.readouterr().out
    )


@pytest.mark.parametrize("run", ["train", "trl"])
def test_noise_is_that_of_padded_rows(tiny, tmp_path, capsys, monkeypatch, run):
    """transformers scales NEFTune's by a row's length, and a packed row is longer than a pair's."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    made, plain = [], neftune.neftune_post_forward_hook

    def hook(module, args, output):
        noisy = plain(module, args, output)
        if module.training:
            made.append((noisy - output).abs().max().item())
        return noisy

    monkeypatch.setattr(neftune, "neftune_post_forward_hook", hook)
    found = []
    for more in ({}, {"packed": False}):
        options = {"max_steps": 1, "neftune_noise_alpha": 5.0} | more
        if run == "train":
            trainer = main(flags(tiny, tmp_path / str(len(found)), **options))
        else:
            trainer, _ = trl_run(tiny, tmp_path / str(len(found)), **options)
        found.append(made.copy())
        made.clear()
    assert found[0] == found[1] and len(found[0]) == trainer.args.gradient_accumulation_steps
    said = capsys.readouterr().out
    assert "rows: padded. neftune_noise_alpha: transformers makes its noise the weaker, the longer a row is" in said


def test_bounds_that_cannot_be(tiny, tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_batch: got 0, takes a positive number"):
        main(flags(tiny, tmp_path / "none", max_tokens_per_batch=0))
    with pytest.raises(ValueError, match="max_tokens_per_batch: got a loss whose β is a batch's"):
        main(flags(tiny, tmp_path / "beta", max_tokens_per_batch=30, method="beta-dpo"))


def test_expected_memory():
    """Weights, gradients and states to the byte; activations as autograd keeps them."""
    policy = build("Llama tied")
    reference = copy.deepcopy(policy).requires_grad_(False)
    size = sum(p.numel() * 4 for p in policy.parameters())
    expected = expected_memory(policy, reference, tokens=1000, scored=400, optimizer="adamw_torch")
    assert expected[:3] == (2 * size, size, 2 * size)
    assert expected_memory(policy, None, tokens=1000, scored=400, optimizer="lomo").optimizer is None
    assert expected_memory(policy, None, tokens=1, scored=1, optimizer="adamw_8bit").optimizer == size // 2
    assert expected_memory(policy, None, tokens=1000, scored=400, optimizer="sgd", shards=2).gradients == size // 2
    # Of each of two layers, at least its norms' and products' inputs.
    assert 2 * 1000 * (4 * 32 + 3 * 48) * 4 < expected.activations < 2 * 1000 * 100 * 48 * 4
    double = expected_memory(policy, None, tokens=2000, scored=400, optimizer="sgd").activations
    assert double == pytest.approx(2 * expected.activations, rel=1e-3)
    assert expected.loss == 4 * (2 * 400 * 97 + 400 * 32 + 97 * 32)
    again = expected_memory(policy, None, tokens=1000, scored=400, optimizer="sgd", checkpointing=True)
    assert again.activations < expected.activations
    assert "memory: about" in str(expected) and json.dumps(expected._asdict())
    assert "GiB and what the optimizer keeps are needed" in str(expected._replace(optimizer=None))


def test_weights_that_autocast_has_cast_are_kept():
    """Once, whatever the tokens: of the layers' products here, in half of the bits."""
    policy = build("Llama tied")
    with torch.autocast("cpu", torch.bfloat16):
        fixed, token = kept_of_forward(policy)
    linear = sum(p.numel() for name, p in policy.named_parameters() if "proj" in name)
    assert 2 * linear <= fixed < 2 * linear + 128 * token * 0.05
    assert kept_of_forward(policy)[0] < 4 * 4 * 128


@pytest.mark.parametrize("packed", [True, False])
def test_activations_of_a_batch_are_foreseen(tiny, tmp_path, packed):
    """What autograd keeps of a real one, in the layout that it has."""
    options, args = parse(flags(tiny, tmp_path, packed=packed))
    trainer = build_run(options, args)
    batch = trainer._packed(trainer.data_collator([trainer.train_dataset.pairs[i] for i in range(48)]))
    kept, own = {}, {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = batch["packing"] if packed else batch["attention_mask"]
        out = head_inputs(trainer.model, batch["input_ids"], mask)
    tokens = batch["packing"].segments.tokens if packed else batch["input_ids"].numel()
    fixed, token = kept_of_forward(trainer.model, packed)
    assert out.hidden.requires_grad and fixed + token * tokens == pytest.approx(sum(kept.values()), rel=0.1)


def said(capsys) -> dict[str, int]:
    """Bytes and tokens of the forecast that a run printed."""
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("memory: "))
    names = "weights|gradients|optimizer|activations|loss"
    found = {name: int(float(count)) for name, count in re.findall(rf"({names}) ([0-9.]+)", line)}
    return found | {"tokens": int(re.search(r"at most ([0-9,]+) tokens", line)[1].replace(",", ""))}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adagrad", "rmsprop", "sgd"])
def test_what_an_optimizer_keeps_is_foreseen(tiny, tmp_path, capsys, monkeypatch, optim):
    monkeypatch.setattr(memory, "GIB", 1)
    trainer = main(flags(tiny, tmp_path, max_steps=1, optim=optim))
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    assert said(capsys)["optimizer"] == sum(t.numel() * t.element_size() for t in states)


def test_a_run_that_runs_its_layers_again_needs_less(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "GIB", 1)
    found = []
    for again in (False, True):
        main(flags(tiny, tmp_path / str(again), max_steps=1, gradient_checkpointing=again))
        found.append(said(capsys))
    layer, state = found[0]["activations"] / 2, 2 * 4 * 32 * found[0]["tokens"]
    assert found[1]["activations"] == pytest.approx(layer + state, rel=1e-3)


@pytest.mark.parametrize(
    "more", [{}, {"truncation_mode": "keep_end"}, {"packed": False}, {"max_length": None}], ids=str
)
def test_rows_that_are_cut_later_are_foreseen_so(tiny, tmp_path, capsys, monkeypatch, more):
    """In TRL's trainer the collator cuts them."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    options = {"max_length": 8, "per_device_train_batch_size": 48, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer, _ = trl_run(tiny, tmp_path, **(options | more))
    found, ran = said(capsys)["tokens"], trainer.state.log_history[0]["tokens"]
    assert found == ran if more != {"truncation_mode": "keep_end"} else ran <= found <= 96 * 8


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_go_by_the_longest_row_of_a_batch(tiny, tmp_path, kind):
    """A row's states then depend on the rows beside it, which cutting and caching change; shorter rows are as ever."""
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"original_max_position_embeddings": 12, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    model = shutil.copytree(tiny, tmp_path / "scaled")
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_parameters": scaling, "max_position_embeddings": 12 if kind == "dynamic" else 64}
    (model / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    row, g = torch.tensor([[4, 5, 6, 7]]), torch.Generator().manual_seed(0)
    alone = loaded(row).logits
    for longest, own in ((12, True), (13, False)):
        beside = torch.randint(3, 20, (1, longest), generator=g)
        batch = torch.cat((torch.nn.functional.pad(row, (0, longest - 4)), beside))
        assert torch.allclose(loaded(batch).logits[:1, :4], alone, atol=1e-6) == own
    assert (
        rows_alone_up_to(loaded) == 12
        and rows_alone_up_to(transformers.AutoModelForCausalLM.from_pretrained(tiny)) is None
    )
    said = "got rows of 16 tokens in dataset, takes up to 12 with LlamaForCausalLM, whose rotary positions go by"
    plain = {"max_tokens_per_batch": {"model": model}, "cache_reference": {"model": tiny, "ref_model": model}}
    for name, more in plain.items():
        more |= {name: 35 if name == "max_tokens_per_batch" else tmp_path / "cache"}
        with pytest.raises(ValueError, match=f"{name}: {said}".replace("dataset", "(train_)?dataset")):
            main(flags(tiny, tmp_path / "run", **more))
        main(flags(tiny, tmp_path / name, max_length=12, max_steps=1, **more))
