"""Preference pairs: each form, each reason to drop a row, columns and report, batches, the demonstration file."""

import gzip
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from epsdpo_kernels.record.sources import texts  # noqa: E402
from pair_data import (  # noqa: E402
    CHAT,
    PLAIN,
    TEMPLATE,
    assistant,
    byte_tokenizer,
    decoded,
    drops,
    load,
    load_one,
    pair,
    user,
    write,
)
from train.data import Collator, Report, load_pairs  # noqa: E402
from train.demo import pairs as demo_data  # noqa: E402

HH = Path(__file__).parents[2] / "shared/data/hh_harmless.jsonl.gz"


# Forms


def test_strings_are_used_as_they_are(tmp_path):
    row = load_one(tmp_path, pair("Say it. ", " yes\n", "né"))
    assert decoded(row) == ["Say it. ", " yes\n<|end|>", "né<|end|>"]
    assert row["prompt_ids"] == PLAIN("Say it. ").input_ids
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == PLAIN.eos_token_id


def test_strings_get_no_template(tmp_path):
    assert decoded(load_one(tmp_path, pair(), CHAT)) == ["Q: ", "yes<|end|>", "no<|end|>"]


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Q: 2+2? A: four", "Q: 2+2? A: five", ("Q: 2+2? A:", " four", " five")),  # "f" is shared, but no whole word
        ("Q A: yes", "Q A: no", ("Q A:", " yes", " no")),
        ("The cat sat", "The cats sit", ("The", " cat sat", " cats sit")),
        ("Q A: 4.", "Q A: 4. And so on", ("Q A:", " 4.", " 4. And so on")),  # no completion is left empty
        ("Q?\n\n  yes", "Q?\n\n  no", ("Q?", "\n\n  yes", "\n\n  no")),
    ],
)
def test_shared_prefix_ends_before_its_last_whitespace(tmp_path, chosen, rejected, expected):
    path = write(tmp_path / "data.jsonl", {"chosen": chosen, "rejected": rejected})
    assert tuple(texts(path, [0])[0].values()) == expected
    assert decoded(load_pairs(path, PLAIN)[0][0]) == [expected[0], *(text + "<|end|>" for text in expected[1:])]


EXPECTED_CHAT = ["<|start|>user\nhi<|end|>\n<|start|>assistant\n", "yes<|end|>", "no<|end|>"]


@pytest.mark.parametrize(
    "row",
    [
        pair([user("hi")], [assistant("yes")], [assistant("no")]),
        pair([user("hi")], "yes", "no"),
        pair("hi", [assistant("yes")], [assistant("no")]),
        pair("hi", [user("hi"), assistant("yes")], [user("hi"), assistant("no")]),
        {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
    ],
)
def test_messages_go_through_the_template(tmp_path, row):
    found = load_one(tmp_path, row, CHAT)
    assert decoded(found, CHAT) == EXPECTED_CHAT
    # One EOS, the template's own; the newline that follows it in the template is left off.
    assert found["chosen_ids"].count(CHAT.eos_token_id) == 1
    assert texts(tmp_path / "data.jsonl", [0]) == [{"prompt": "user: hi", "chosen": "yes", "rejected": "no"}]


def test_template_without_an_end_of_turn_gets_eos(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>\n", "\n"))
    row = load_one(tmp_path, pair([user("hi")], "yes", "no"), tokenizer)
    assert decoded(row) == ["<|start|>user\nhi\n<|start|>assistant\n", "yes\n<|end|>", "no\n<|end|>"]


def test_template_whose_end_of_turn_is_not_eos(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE, eos="</s>")
    row = load_one(tmp_path, pair([user("hi")], "yes", "no"), tokenizer)
    assert decoded(row, tokenizer)[1:] == ["yes<|end|>", "no<|end|>"]


def test_transcripts_as_raw_text_and_as_messages(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: ok?\n\nAssistant:"
    row = {"chosen": start + " Yes.", "rejected": start + " No."}
    assert decoded(load_one(tmp_path, row)) == [start, " Yes.<|end|>", " No.<|end|>"]
    prompt = "".join(
        f"<|start|>{role}\n{text}<|end|>\n" for role, text in [("user", "hi"), ("assistant", "Hello."), ("user", "ok?")]
    )
    assert decoded(load_one(tmp_path, row, CHAT), CHAT) == [
        prompt + "<|start|>assistant\n",
        "Yes.<|end|>",
        "No.<|end|>",
    ]


def test_a_prompt_that_strings_repeat_is_there_once(tmp_path):
    asked, once = "Q: hi A:", ["Q: hi A:", " yes<|end|>", " no<|end|>"]
    rows = [pair(asked, asked + " yes", asked + " no"), pair(asked, " yes", " no")]
    assert [decoded(row) for row in load(tmp_path, *rows)[0]] == [once, once]
    found = load_one(tmp_path, pair("首都は？\n", "首都は？\n東京", "首都は？\n京都"))
    assert decoded(found) == ["首都は？\n", "東京<|end|>", "京都<|end|>"]


def test_strings_that_hold_the_prompt_in_another_way(tmp_path):
    rows = [
        pair("Q: hi A:\n", "Q: hi A: yes", "Q: hi A: no"),
        pair("hi", "Human: hi\n\nAssistant: yes", "Human: hi\n\nAssistant: no"),
        pair(" hi?", "### hi?\nyes", "### hi?\nno"),
    ]
    # One that echoes, words that begin alike, and the same words at different places are answers.
    answers = [pair("Q: hi", "Q: hi, you", "no"), pair("1", "12", "13"), pair("hi", "This is", "This was")]
    answers.append(pair("four", "It is four.", "It was four."))
    assert drops(tmp_path, *answers, *rows) == {
        "completions that repeat the prompt after other text or space": [4, 5, 6]
    }
    assert [decoded(row) for row in load_pairs(tmp_path / "data.jsonl", PLAIN)[0]] == [
        [row["prompt"], row["chosen"] + "<|end|>", row["rejected"] + "<|end|>"] for row in answers
    ]


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["raw", "chat"])
def test_transcripts_beside_their_prompt(tmp_path, tokenizer):
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: ok?\n\nAssistant:"
    sides = {"chosen": start + " Yes.", "rejected": start + " No."}
    alone = load_one(tmp_path, sides, tokenizer)
    for prompt in ("ok?", " hi\n", start, "", None):
        assert load_one(tmp_path, {"prompt": prompt} | sides, tokenizer) == alone
    rows = [{"prompt": "ho?"} | sides, pair("ok?", sides["chosen"], " No.")]
    rows += [{"prompt": [user("ok?")]} | sides, pair(start, [assistant("Yes.")], [assistant("No.")])]
    assert drops(tmp_path, sides, *rows, tokenizer=CHAT) == {
        "a prompt that is not in its conversations": [1],
        "malformed row": [2],
        "a transcript beside messages; make it messages": [3, 4],
    }


def test_raw_text_begins_as_the_tokenizer_begins_it(tmp_path):
    row = load_one(tmp_path, pair(), byte_tokenizer(bos=True))
    assert decoded(row) == ["<bos>Q: ", "yes<|end|>", "no<|end|>"]


def test_no_form_fits(tmp_path):
    with pytest.raises(ValueError, match="columns 'question', 'good', takes chosen and rejected"):
        load_pairs(write(tmp_path / "a.jsonl", {"question": "?", "good": "!"}), PLAIN)
    with pytest.raises(ValueError, match="columns 'chosen', 'rejected'"):
        load_pairs(write(tmp_path / "b.jsonl", {"chosen": 1, "rejected": 2}), PLAIN)


@pytest.mark.parametrize(
    "row",
    [
        pair([user("hi")], *({"role": "model", "content": text} for text in ("yes", "no"))),
        pair([user("hi")], tools={"name": "f"}),
    ],
)
def test_messages_in_a_form_of_their_own(tmp_path, row):
    with pytest.raises(
        ValueError, match="messages of role and content, .* end with the role assistant; tools as a list"
    ):
        load_one(tmp_path, row, CHAT)


def test_tokenizers_that_lack_something(tmp_path):
    path = write(tmp_path / "data.jsonl", pair([user("hi")]))
    with pytest.raises(ValueError, match="tokenizer: .* chat template"):
        load_pairs(path, PLAIN)
    bare = byte_tokenizer(TEMPLATE)
    bare.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: .* EOS"):
        load_pairs(path, bare)


# Reasons to drop a row


def test_broken_lines_are_numbered_from_one(tmp_path):
    deep = b"[" * 100_000
    bad_utf8 = b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}'
    rows = [pair(), b'{"prompt": ', b"", bad_utf8, b'"text"', b"[1]", deep, pair()]
    assert drops(tmp_path, *rows) == {"broken line": [2, 4, 5, 6, 7]}
    assert load_pairs(tmp_path / "data.jsonl", PLAIN)[0]["row"][:] == [0, 7]


def test_malformed_rows(tmp_path):
    lone_surrogate = b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'
    rows = [pair(), pair(None), pair(chosen=3), {"prompt": "x", "chosen": "y"}, pair(7), lone_surrogate, {}]
    assert drops(tmp_path, *rows) == {"malformed row": [1, 2, 3, 4, 5, 6]}


def test_malformed_messages(tmp_path):
    prompt, good = [user("hi")], [assistant("yes")]
    bad = [[user("hi")], [], [{"role": "assistant"}], [{"role": "assistant", "content": None}], ["yes"], 5, None]
    rows = [pair(prompt, good, "no"), *(pair(prompt, side, "no") for side in bad), pair(None, "yes", "no")]
    assert drops(tmp_path, *rows, tokenizer=CHAT) == {"malformed row": list(range(1, 9))}


def test_different_prompts(tmp_path):
    assert drops(tmp_path, {"chosen": "a b", "rejected": "a c"}, {"chosen": "x y", "rejected": "z y"}) == {
        "different prompts": [1]
    }
    turns = [{"chosen": [user(q), assistant("yes")], "rejected": [user("hi"), assistant("no")]} for q in ("hi", "ho")]
    assert drops(tmp_path, *turns, tokenizer=CHAT) == {"different prompts": [1]}
    start = "\n\nHuman: hi\n\nAssistant:"
    rows = [
        {"chosen": start + " a", "rejected": start + " b"},
        {"chosen": start + " a", "rejected": "\n\nHuman: ho\n\nAssistant: b"},
        {"chosen": start + " a", "rejected": "Assistant: b"},
        {"chosen": start + " a", "rejected": start + " a\n\nHuman: more"},
    ]
    assert drops(tmp_path, *rows) == {"different prompts": [1], "malformed row": [2, 3]}


def test_empty_and_identical(tmp_path):
    rows = [pair(), pair(chosen=" \n"), pair(rejected=""), pair(chosen="no"), pair(prompt="")]
    assert drops(tmp_path, *rows) == {"empty completion": [1, 2], "identical pair": [3], "empty prompt": [4]}
    assert drops(tmp_path, {"chosen": "a b", "rejected": "a c"}, {"chosen": "x", "rejected": "x"}) == {
        "identical pair": [1]
    }


def test_empty_prompt_is_one_where_the_tokenizer_begins_a_text(tmp_path):
    assert decoded(load_one(tmp_path, pair(""), byte_tokenizer(bos=True)))[0] == "<bos>"


def test_identical_after_truncation(tmp_path):
    rows = [pair("abcd", "samestart 1", "samestart 2"), pair("abcd", "1", "2")]
    assert drops(tmp_path, *rows, max_length=10) == {"identical after truncation": [0]}


def test_refused_by_the_template(tmp_path):
    tokenizer = byte_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE)
    rows = [pair([user("hi")]), pair([{"role": "system", "content": "be"}, user("hi")])]
    assert drops(tmp_path, *rows, tokenizer=tokenizer) == {"refused by the chat template": [1]}


def test_first_twenty_places(tmp_path):
    report = load_pairs(write(tmp_path / "data.jsonl", *[b"{"] * 30, pair()), PLAIN)[1]
    assert report.dropped == {"broken line": 30} and report.where["broken line"] == list(range(1, 21))
    assert "19, 20, …)" in str(report)


def test_nothing_left_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no pair is left\n.*kept 0 of 2 rows\n.*2  broken line \(line 1, 2\)"):
        load_pairs(write(tmp_path / "data.jsonl", b"{", b"}"), PLAIN)
    with pytest.raises(ValueError, match="kept 0 of 1 rows\n.*identical pair"):
        load_pairs(write(tmp_path / "data.jsonl", pair(chosen="no")), PLAIN)
    with pytest.raises(ValueError, match="kept 0 of 0 rows"):
        load_pairs(write(tmp_path / "data.jsonl"), PLAIN)


# Rows of the result


def test_pair_id_is_a_hash_of_the_texts(tmp_path):
    rows = [pair(), pair("Q", ": yes", ": no"), pair(topic="x"), pair(rejected="yes", chosen="no")]
    ids = load_pairs(write(tmp_path / "data.jsonl", *rows), PLAIN)[0]["pair_id"][:]
    assert ids[0] == ids[2] and len(set(ids)) == 3 and all(len(i) == 16 and int(i, 16) >= 0 for i in ids)
    assert ids[0] == "f89a1e7327205465"  # for good: decisions are joined to texts by it
    again = load_pairs(write(tmp_path / "other.jsonl", *rows[::-1]), CHAT, max_length=9)[0]["pair_id"][:]
    assert again == ids[::-1]


def test_columns_carried_through(tmp_path):
    rows = [
        pair(topic="a", size=1, good=True, score=0.5, long="x" * 65, mixed=1, row="own", huge=2**70, tags=["t"]),
        pair(topic=None, size=2, good=False, score=1.5, long="x", mixed="1", row="own", none=None, huge=1, tags=[]),
    ]
    path = write(tmp_path / "data.jsonl", *rows, pair(chosen="no", topic="z" * 99))
    found, _ = load_pairs(path, PLAIN)
    assert found.column_names == ["pair_id", "row", "prompt_ids", "chosen_ids", "rejected_ids", "topic", "size", "good"]
    assert found["topic"][:] == ["a", None] and found["size"][:] == [1, 2] and found["good"][:] == [True, False]
    assert found["row"][:] == [0, 1]
    assert load_pairs(path, PLAIN, keep_columns=["size"])[0].column_names[5:] == ["size"]
    with pytest.raises(ValueError, match="keep_columns: got 'score'"):
        load_pairs(path, PLAIN, keep_columns=["score"])


def test_columns_of_any_name_are_carried(tmp_path):
    names = ("note", "line", "labels", "input_ids", "chosen_input_ids", "index", "source")
    row = load_one(tmp_path, pair(**{name: name[0] for name in names}))
    assert {name: row[name] for name in names} == {name: name[0] for name in names}
    assert decoded(row) == ["Q: ", "yes<|end|>", "no<|end|>"]


def test_report(tmp_path):
    rows = [pair("x" * n, "y" * n, "z") for n in range(1, 101)]
    _, report = load_pairs(write(tmp_path / "data.jsonl", *rows), PLAIN)
    assert report.lengths == {
        "prompt": {"p50": 51, "p95": 96, "max": 100},
        "chosen": {"p50": 52, "p95": 97, "max": 101},
        "rejected": {"p50": 2, "p95": 2, "max": 2},
    }
    assert Report(**json.loads(json.dumps(report.as_dict()))) == report
    assert str(report).splitlines()[0] == f"{tmp_path / 'data.jsonl'}: kept 100 of 100 rows"
    assert str(report).splitlines()[-1].split() == ["rejected", "2", "2", "2"]


def test_texts_of_a_row_that_holds_no_pair(tmp_path):
    path = write(tmp_path / "data.jsonl", pair(), b"{", pair(chosen="no"))
    for row, reason in [(1, "broken line"), (2, "identical pair"), (9, "broken line")]:
        with pytest.raises(ValueError, match=rf"rows: got {row}, .* \({reason}\)"):
            texts(path, [0, row])


# Batches


def test_collator_lays_pairs_out_with_shifted_labels():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "row": 7, "topic": "a"},
        {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8, 9, 10], "row": 3, "topic": "b"},
    ]
    batch = Collator(pad_token_id=0)(rows)
    expected = {
        "input_ids": [[1, 2, 3, 4], [6, 7, 0, 0], [1, 2, 5, 0], [6, 8, 9, 10]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, 3, 4, -100], [7, -100, -100, -100], [-100, 5, -100, -100], [8, 9, 10, -100]],
        "row": [7, 3],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collator_pads_to_a_multiple():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [5], "row": 0}]
    assert Collator(0, pad_to_multiple_of=4)(rows)["labels"].shape == (2, 8)
    rows[0]["chosen_ids"] = [3, 4]
    assert Collator(0, pad_to_multiple_of=4)(rows)["labels"].shape == (2, 4)


def test_collator_refuses_an_empty_prompt():
    with pytest.raises(ValueError, match="rows: got one with empty prompt_ids"):
        Collator(0)([{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2], "row": 0}])


def test_labels_of_a_loaded_batch_are_the_completions(tmp_path):
    rows = [pair("Q: ", "yes, indeed", "no"), pair("What? ", "this", "that, or so")]
    found, _ = load_pairs(write(tmp_path / "data.jsonl", *rows), PLAIN)
    batch = Collator(PLAIN.pad_token_id)([found[0], found[1]])
    scored = [PLAIN.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert scored == ["yes, indeed<|end|>", "this<|end|>", "no<|end|>", "that, or so<|end|>"]
    ahead = batch["input_ids"].roll(-1, 1)
    assert torch.equal(ahead[batch["labels"] != -100], batch["labels"][batch["labels"] != -100])
    # Both sides of a pair begin with the same prompt.
    for i, row in enumerate(found):
        for side in (i, i + 2):
            assert batch["input_ids"][side, : len(row["prompt_ids"])].tolist() == row["prompt_ids"]


# Files that are there


def test_demo_file_is_what_the_script_writes(tmp_path):
    demo_data.write(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == demo_data.PATH.read_bytes()


def test_demo_file_loads_whole_and_is_varied():
    found, report = load_pairs(demo_data.PATH, CHAT)
    assert (report.read, report.kept, len(found)) == (360, 360, 360)
    assert len(set(found["pair_id"])) == len({tuple(ids) for ids in found["prompt_ids"]}) == 360
    topics = "advice arithmetic capitals definitions facts politeness summaries units"
    assert sorted(set(found["topic"])) == topics.split()
    assert sum(found["mislabelled"]) == 51
    longer = sum((len(row["chosen_ids"]) > len(row["rejected_ids"])) != row["mislabelled"] for row in found)
    assert 0.3 < longer / 360 < 0.7  # length does not give the preferred answer away


def test_demo_arithmetic_is_right():
    sums = 0
    for topic, question, subject, answer in demo_data.questions():
        if topic == "arithmetic":
            left, sign, right = subject.split()
            left, right, stated = int(left), int(right), int(answer.rstrip(".").split()[-1])
            value = {"+": left + right, "-": left - right, "×": left * right, "÷": left / right}[sign]
            assert subject in question and stated == value
            sums += 1
    assert sums == 48


@pytest.mark.skipif(not HH.exists(), reason="the 1,500 real transcripts are not beside the project")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["raw", "chat"])
def test_real_transcripts(tokenizer):
    marker = "\n\nAssistant:"
    expected = {"different prompts": [], "empty completion": [], "identical pair": []}
    lines = gzip.decompress(HH.read_bytes()).decode().splitlines()
    for row, line in enumerate(lines):
        chosen, rejected = (json.loads(line)[side] for side in ("chosen", "rejected"))
        cut = chosen.rindex(marker)
        if cut != rejected.rindex(marker) or chosen[:cut] != rejected[:cut]:
            expected["different prompts"].append(row)
        elif chosen.endswith(marker + " ") or rejected.endswith(marker + " "):
            expected["empty completion"].append(row)
        elif chosen == rejected:
            expected["identical pair"].append(row)
    found, report = load_pairs(HH, tokenizer, max_length=8192)
    assert report.where == {reason: rows for reason, rows in expected.items() if rows}
    assert report.read == len(lines) == report.kept + sum(report.dropped.values())
    gone = {row for rows in expected.values() for row in rows}
    assert found["row"][:] == [row for row in range(len(lines)) if row not in gone]
    assert all(row["chosen_ids"][-1] == tokenizer.eos_token_id for row in found if len(row["chosen_ids"]) < 4096)
    first = texts(HH, [0])[0]
    assert json.loads(lines[0]) == {side: first["prompt"] + first[side] for side in ("chosen", "rejected")}
