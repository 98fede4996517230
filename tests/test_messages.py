"""Conversations: every field of a message, tools, several turns, columns beside them, and rows of several forms."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest

datasets = pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from epsdpo_kernels.record.sources import NoPair, pair_of, texts  # noqa: E402
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
from train.data import load_pairs  # noqa: E402

# As the templates of models that call tools: it writes all fields, and content that is null or a list of texts.
FULL = (
    "{% if tools %}{{ '<|start|>tools\n' + tools|tojson + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + (' ' + m.name if m.name else '') + '\n' }}"
    "{% if m.reasoning_content and think is not false %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + c.function.arguments|tojson + ']' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOOLS = byte_tokenizer(FULL)


def call(**arguments):
    return [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]


def tool(name="weather"):
    return {"type": "function", "function": {"name": name, "parameters": {"city": {"type": "string"}}}}


ASKED = [user("Weather?"), assistant(None, tool_calls=call(city="Oslo")), {"role": "tool", "content": "4 degrees"}]
ROW = {
    "prompt": ASKED,
    "chosen": [assistant("It is 4.", tool_calls=call(city="Oslo"), reasoning_content="read it")],
    "rejected": [assistant("No idea.")],
    "tools": [tool()],
    "chat_template_kwargs": {"think": True},
}


def expected(row, tokenizer, side, **options):
    """The ids of a prompt and a completion that the tokenizer's own method gives, without the newline at the end."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False, **options)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False, **options)
    assert tokenizer.decode(whole[-1:]) == "\n"
    n = len(os.path.commonprefix((prompt, whole)))
    return prompt[:n], whole[n:-1]


@pytest.mark.parametrize("tools", [[tool()], json.dumps([tool()]), [json.dumps(tool())]])
@pytest.mark.parametrize("kwargs", [{"think": False}, '{"think": false}', None])
def test_everything_goes_to_the_template(tmp_path, tools, kwargs):
    row = ROW | {"tools": tools, "chat_template_kwargs": kwargs}
    found = load_one(tmp_path, row, TOOLS)
    for side in ("chosen", "rejected"):
        want = expected(row, TOOLS, side, tools=[tool()], think=False if kwargs else None)
        assert (found["prompt_ids"], found[side + "_ids"]) == want
    assert ("(read it)" in decoded(found, TOOLS)[1]) == (not kwargs)


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        (assistant("Look.", tool_calls=call(city="Oslo")), assistant("Look.", tool_calls=call(city="Rome"))),
        (assistant(None, tool_calls=call(city="Oslo")), assistant(None, tool_calls=call(city="Rome"))),
        (assistant("Look.", tool_calls=call(city="Oslo")), assistant("Look.")),
        (assistant(None, tool_calls=call(city="Oslo")), assistant("Look.")),
        (assistant("Look.", reasoning_content="so"), assistant("Look.", reasoning_content="or so")),
        (assistant("Look.", reasoning_content="so"), assistant("Look.")),
        (assistant("Look.", name="a"), assistant("Look.", name="b")),
    ],
)
def test_pairs_that_differ_in_a_field_alone(tmp_path, chosen, rejected):
    row = pair([user("hi")], [chosen], [rejected])
    found = load_one(tmp_path, row, TOOLS)
    for side in ("chosen", "rejected"):
        assert (found["prompt_ids"], found[side + "_ids"]) == expected(row, TOOLS, side)


def test_messages_of_nothing(tmp_path):
    rows = [pair([user("hi")], [assistant(None, name="a")], "no"), pair([user("hi")], [assistant(None)], "no"), ROW]
    assert drops(tmp_path, *rows, tokenizer=TOOLS) == {"empty completion": [0], "malformed row": [1]}


VARIANTS = [
    {},
    {"tools": [tool("clock")]},
    {"tools": None},
    {"chat_template_kwargs": {"think": False}},
    {"prompt": [user("Weather"), *ASKED[1:]]},
    {"prompt": [user("Weather?"), assistant(None, tool_calls=call(city="Rome")), ASKED[2]]},
    {"prompt": [*ASKED[:2], {"role": "ipython", "content": "4 degrees"}]},
    {"chosen": [assistant("It is 4.", tool_calls=call(city="Oslo"))]},
    {"chosen": [assistant("It is 4.", tool_calls=call(city="Oslo"), reasoning_content="read it", name="x")]},
    {"chosen": [*ROW["chosen"], user("Sure?"), assistant("Yes.")]},
    {"rejected": [assistant("No idea!")]},
]


def test_ids_cover_all_that_distinguishes_pairs(tmp_path):
    found = load(tmp_path, *(ROW | variant for variant in VARIANTS), tokenizer=TOOLS)[0]
    assert len(found) == len(set(found["pair_id"])) == len(VARIANTS)
    # A text that reads like a conversation is another pair.
    strings = {name: text for name, text in texts(tmp_path / "data.jsonl", [0])[0].items()}
    assert pair_of(strings).id() not in set(found["pair_id"])


def test_ids_do_not_depend_on_the_kind_of_file(tmp_path):
    with_nulls = {"role": "assistant", "tool_calls": None, "content": "No idea.", "reasoning_content": None}
    rows = [ROW, ROW | {"tools": json.dumps([tool()]), "rejected": [with_nulls]}, ROW | {"rejected": "No idea."}]
    assert len(set(load(tmp_path, *rows, tokenizer=TOOLS)[0]["pair_id"])) == 1


def test_nulls_that_arrow_fills_in_are_nothing(tmp_path):
    rows = [ROW, pair([user("hi")], [assistant("yes", tool_calls=call(metric=True))], [assistant("no", name="n")])]
    rows = json.loads(json.dumps(rows, sort_keys=True))  # as older versions of pyarrow sort them
    lines = load(tmp_path, *rows, tokenizer=TOOLS)[0]
    # Written without the type that keeps JSON as it is: every row has the fields of every other.
    columns = {name: [row.get(name) for row in rows] for name in ROW}
    table = datasets.Dataset.from_dict(columns, on_mixed_types=None)
    assert (
        table[0]["rejected"][0]["name"] is None
        and "metric" in table[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]
    )
    table.to_parquet(tmp_path / "data.parquet")
    found = load_pairs(tmp_path / "data.parquet", TOOLS)[0]
    assert found[:] == lines[:]
    assert texts(tmp_path / "data.parquet", [0, 1]) == texts(tmp_path / "data.jsonl", [0, 1])
    assert "null" not in decoded(found[0], TOOLS)[1]


def test_texts_show_every_field(tmp_path):
    rows = [ROW, ROW | {"chosen": [assistant("So?"), user("Yes"), assistant([{"type": "text", "text": "Fine."}])]}]
    found = texts(write(tmp_path / "data.jsonl", *rows), [0, 1])
    calls = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]'
    assert found[0] == {
        "prompt": f'tools: {json.dumps([tool()])}\n\nchat_template_kwargs: {{"think": true}}\n\nuser: Weather?\n\n'
        f"assistant: tool_calls: {calls}\n\ntool: 4 degrees",
        "chosen": f"It is 4.\nreasoning_content: read it\ntool_calls: {calls}",
        "rejected": "No idea.",
    }
    assert found[1]["chosen"] == "assistant: So?\n\nuser: Yes\n\nassistant: Fine."


def test_fields_that_the_template_does_not_write_are_named(tmp_path):
    rows = [ROW, ROW | {"tools": None}, pair([user("hi")], [assistant("yes", thinking="so")], "no")]
    report = load(tmp_path, *rows, tokenizer=byte_tokenizer(TEMPLATE.replace("m['content']", "m['content'] | string")))[
        1
    ]
    assert report.unwritten == {"tool_calls": 2, "reasoning_content": 2, "think": 2, "tools": 1, "thinking": 1}
    assert "2  with tool_calls, which the chat template does not write" in str(report)
    # Newer versions of transformers hand reasoning on under every name that it has.
    handed_on = "so" in TOOLS.apply_chat_template(rows[2]["chosen"], tokenize=False)
    assert load(tmp_path, rows[2], tokenizer=TOOLS)[1].unwritten == ({} if handed_on else {"thinking": 1})


def test_a_completion_of_which_the_template_writes_nothing(tmp_path):
    silent = byte_tokenizer(TEMPLATE.replace("m['content']", "(m.content or '')"))
    rows = [
        pair([user("hi")], [assistant(None, tool_calls=call())], "no"),
        pair([user("hi")], [assistant("no", tool_calls=call())], "no"),
        pair([user("hi")], "yes", "no"),
    ]
    assert drops(tmp_path, *rows, tokenizer=silent) == {
        "a completion that the chat template writes nothing of": [0],
        "identical as tokens": [1],
    }


@pytest.mark.parametrize("template", [FULL, TEMPLATE], ids=["reads lists", "reads text"])
def test_content_as_a_list_of_texts(tmp_path, template):
    tokenizer = byte_tokenizer(template)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "list", "image": None}]
    row = pair([{"role": "user", "content": parts}], [assistant(parts[:1])], [assistant("no")])
    found = load_one(tmp_path, row, tokenizer)
    prompt = "<|start|>user\na list<|end|>\n<|start|>assistant\n"
    assert decoded(found, tokenizer) == [prompt, "a <|end|>", "no<|end|>"]


def test_content_that_is_no_text(tmp_path):
    picture = [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    bad = [picture, 5, {"degrees": 4}, ["text"], [{"type": "text"}]]
    rows = [pair([user(content)]) for content in bad]
    assert drops(tmp_path, pair([user("hi")]), *rows, tokenizer=CHAT) == {
        "pictures or sounds, where only text is read; remove them": [1],
        "content that is neither text nor a list of texts": [2, 3, 4, 5],
    }


def test_null_content_and_an_empty_system_message(tmp_path):
    row = pair([{"role": "system", "content": ""}, *ASKED], [assistant(None, tool_calls=call())], "no")
    prompt, chosen, _ = decoded(load_one(tmp_path, row, TOOLS), TOOLS)
    assert prompt.startswith("<|start|>system\n<|end|>\n<|start|>user\nWeather?") and chosen == "[weather{}]<|end|>"


def test_tool_calls_in_json_and_none(tmp_path):
    rows = [
        pair(ASKED, [assistant("a", tool_calls=json.dumps(call(city="Oslo")))], [assistant("no", tool_calls="")]),
        pair(ASKED, [assistant("a", tool_calls=call(city="Oslo"))], [assistant("no", tool_calls=[])]),
    ]
    found = load(tmp_path, *rows, tokenizer=TOOLS)[0]
    assert decoded(found[0], TOOLS) == decoded(found[1], TOOLS)
    assert found["pair_id"][0] == found["pair_id"][1]


@pytest.mark.parametrize(
    "field",
    [{"tools": "{"}, {"tools": [7]}, {"tools": {"a": 1}}, {"chat_template_kwargs": [1]}, {"chosen": [{"role": 1}]}],
)
def test_fields_of_another_kind(tmp_path, field):
    assert drops(tmp_path, ROW, ROW | field, tokenizer=TOOLS) == {"malformed row": [1]}


def test_a_row_cannot_set_what_is_not_the_templates(tmp_path):
    own = {"chat_template": "{{ '<|end|>' }}"}
    rows = [
        ROW | {"chat_template_kwargs": kwargs} for kwargs in (own, {"tokenize": True}, {"continue_final_message": 1})
    ]
    assert drops(tmp_path, ROW, *rows, tokenizer=TOOLS) == {"chat_template_kwargs that no template sees": [1, 2, 3]}


def test_no_field_can_spell_a_control_token(tmp_path):
    bad = "<|end|>\n<|start|>system\n"
    calls = [{"function": {"name": bad, "arguments": {bad: [bad]}}}]
    row = {
        "prompt": [{"role": "user" + bad, "content": bad, "name": bad}],
        "chosen": [assistant(bad, tool_calls=calls, reasoning_content=bad)],
        "rejected": [assistant([{"type": "text", "text": bad}])],
        "tools": [tool(bad) | {bad: bad}],
        "chat_template_kwargs": {"eos": bad},
    }
    tokenizer = byte_tokenizer(FULL + "{{ eos }}")
    found, report = load(tmp_path, row, tokenizer=tokenizer)
    ids = [found[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    assert [part.count(start) for part in ids] == [3, 0, 0]  # tools, user, assistant
    assert [part.count(end) for part in ids] == [2, 2, 2]  # an end of turn, and EOS behind what the text ends with
    assert report.control_text == 1 and all(bad.strip() in text for text in decoded(found[0], tokenizer))


def test_as_trl_prepares_them(tmp_path):
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    thought = byte_tokenizer(FULL.replace("<|start|>assistant\n'", "<|start|>assistant\n<think>\n'"))
    turns = [assistant("How old?"), user("30"), assistant("Thanks.")]
    rows = [
        ROW,
        ROW | {"tools": json.dumps([tool()]), "chat_template_kwargs": {"think": False}},
        ROW | {"prompt": [{"role": "system", "content": ""}, user("hi"), assistant("So, ")], "rejected": turns},
        ROW | {"chosen": turns, "rejected": [*turns[:2], assistant(None, tool_calls=call())]},
        ROW | {"chosen": [user("And?"), assistant("b")]},
        {"chosen": [user("hi"), *turns], "rejected": [user("hi"), *turns[:2], assistant("So.")]},
    ]
    for tokenizer in (TOOLS, thought):
        found = load(tmp_path, *rows, tokenizer=tokenizer)[0]
        args = SimpleNamespace(dataset_num_proc=None, max_length=None)
        for row, ours in zip(rows, found, strict=True):
            trainer = SimpleNamespace(_tokenizer=tokenizer)
            one = datasets.Dataset.from_list([row], on_mixed_types="use_json")
            theirs = trl.DPOTrainer._prepare_dataset(trainer, one, tokenizer, args, "train")[0]
            assert ours["prompt_ids"] == theirs["prompt_ids"]
            for side in ("chosen_ids", "rejected_ids"):  # theirs end with the newline that no model writes
                assert ours[side] == theirs[side][:-1] and tokenizer.decode(theirs[side][-1:]) == "\n"


# Turns


def test_a_completion_is_all_that_follows_the_prompt(tmp_path):
    turns = [assistant("How old?"), user("30"), assistant("Thanks, Ann.")]
    row = {"prompt": [user("I am Ann.")], "chosen": turns, "rejected": [*turns[:2], assistant("Whatever.")]}
    found = load_one(tmp_path, row, CHAT)
    assert (found["prompt_ids"], found["chosen_ids"]) == expected(row, CHAT, "chosen")
    assert decoded(found, CHAT) == [
        "<|start|>user\nI am Ann.<|end|>\n<|start|>assistant\n",
        "How old?<|end|>\n<|start|>user\n30<|end|>\n<|start|>assistant\nThanks, Ann.<|end|>",
        "How old?<|end|>\n<|start|>user\n30<|end|>\n<|start|>assistant\nWhatever.<|end|>",
    ]


def test_a_completion_may_begin_with_another_turn(tmp_path):
    row = {"prompt": [user("I am Ann.")], "chosen": [user("Hi?"), assistant("Hi.")], "rejected": [assistant("Bye.")]}
    prompt, chosen, rejected = decoded(load_one(tmp_path, row, CHAT), CHAT)
    assert prompt == "<|start|>user\nI am Ann.<|end|>\n<|start|>"  # what both go on from
    assert chosen == "user\nHi?<|end|>\n<|start|>assistant\nHi.<|end|>" and rejected == "assistant\nBye.<|end|>"


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    "prompt, before",
    [
        ([SYSTEM, user("hi")], [SYSTEM, user("hi")]),  # the whole prompt again
        ([SYSTEM, user("hi")], [user("hi")]),  # its end again
        ("hi", [SYSTEM, user("hi")]),
        (None, [SYSTEM, user("hi")]),
        ([], [SYSTEM, user("hi")]),
    ],
)
def test_a_prompt_that_completions_repeat_is_there_once(tmp_path, prompt, before):
    row = pair(prompt, [*before, assistant("yes")], [*before, assistant("no")])
    start = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert decoded(load_one(tmp_path, row, CHAT), CHAT) == [start, "yes<|end|>", "no<|end|>"]


def in_parts(text):
    return user([{"type": "text", "text": text}])


def test_a_prompt_that_conversations_hold_is_there_once(tmp_path):
    given = [user("hi")], user("hi"), [in_parts("hi")], "hi"
    before = [], [SYSTEM], [SYSTEM, user("ho"), assistant("ha")]
    said = user("hi"), user(" hi\n"), in_parts("hi")
    ends = [assistant("yes")], [assistant("no"), user("why"), assistant("so")]
    forms = list(itertools.product(given, before, said))
    rows = [pair(prompt, *([*start, turn, *end] for end in ends)) for prompt, start, turn in forms]
    clean = [pair([*start, user("hi")], *ends) for _, start, _ in forms]
    found, expected = (load(tmp_path, *each, tokenizer=CHAT)[0] for each in (rows, clean))
    for name in ("row", "prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name][:] == expected[name][:]
    no = "no<|end|>\n<|start|>user\nwhy<|end|>\n<|start|>assistant\nso<|end|>"
    assert len(found) == 36 and decoded(found[-1], CHAT)[1:] == ["yes<|end|>", no]


def test_a_prompt_that_its_conversations_do_not_hold(tmp_path):
    asked, answer = [user("I am Ann.")], {"chosen": assistant("yes"), "rejected": assistant("no")}
    beginnings = {
        "neither": [[user("I am Bob.")]] * 2,
        "system": [[SYSTEM, user("I am Bob.")], []],
        "one": [[SYSTEM, *asked], []],
        "other": [[SYSTEM, *asked], [user("be"), *asked]],
    }
    rows = [
        {"prompt": asked} | {side: [*start, answer[side]] for side, start in zip(answer, both, strict=True)}
        for both in beginnings.values()
    ]
    goes_on = pair([SYSTEM], *([user("hi"), assistant(text)] for text in ("yes", "no")))
    assert drops(tmp_path, *rows, goes_on, tokenizer=CHAT) == {
        "a prompt that is not in its conversations": [0, 1],
        "different prompts": [2, 3],
    }


@pytest.mark.parametrize("end", [[assistant("How old?")], [SYSTEM]])
def test_conversations_that_go_on_with_the_user(tmp_path, end):
    row = pair([user("I am Ann."), *end], *([user("30"), assistant(text)] for text in ("yes", "no")))
    found = load_one(tmp_path, row, CHAT)
    assert (found["prompt_ids"], found["chosen_ids"]) == expected(row, CHAT, "chosen")


def test_whole_conversations_part_at_the_assistant(tmp_path):
    start = [user("Weather?")]
    row = {
        "chosen": [*start, assistant("", tool_calls=call(city="Oslo")), ASKED[2], assistant("4.")],
        "rejected": [*start, assistant("", tool_calls=call(city="Rome")), ASKED[2], assistant("4.")],
    }
    prompt, chosen, rejected = decoded(load_one(tmp_path, row, TOOLS), TOOLS)
    assert prompt == "<|start|>user\nWeather?<|end|>\n<|start|>assistant\n"
    rest = "<|end|>\n<|start|>tool\n4 degrees<|end|>\n<|start|>assistant\n4.<|end|>"
    assert chosen == '[weather{"city": "Oslo"}]' + rest and rejected == '[weather{"city": "Rome"}]' + rest


def test_conversations_that_are_no_pair(tmp_path):
    whole = [user("hi"), assistant("a")]
    rows = [
        {"chosen": whole, "rejected": [*whole, user("more"), assistant("b")]},  # is one: the second goes on
        {"chosen": whole, "rejected": [user("ho"), assistant("b")]},
        {"chosen": [*whole, user("x"), assistant("b")], "rejected": [*whole, user("y"), assistant("b")]},
        {"prompt": "other", "chosen": whole, "rejected": [user("hi"), assistant("b")]},
        {"chosen": whole, "rejected": [user("hi"), assistant("b"), user("c")]},
        {"chosen": whole, "rejected": whole},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
    ]
    assert drops(tmp_path, *rows, tokenizer=CHAT) == {
        "different prompts": [1, 2],
        "a prompt that is not in its conversations": [3],
        "malformed row": [4, 6],
        "identical pair": [5],
    }


def test_a_message_alone_is_a_list_of_one(tmp_path):
    row = pair([user("hi")], assistant("yes"), assistant("no"))
    assert load_one(tmp_path, row, CHAT) == load_one(tmp_path, pair([user("hi")]), CHAT)


def test_messages_in_other_spellings_are_named(tmp_path):
    shared = [{"from": "human", "value": "hi"}]
    rows = [
        pair([user("hi")]),
        pair(shared, {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}),
    ]
    assert drops(tmp_path, *rows, tokenizer=CHAT) == {"messages of from and value; name these role and content": [1]}


def test_messages_written_as_text(tmp_path):
    turned = {"content": 'say "it\'s"', "weight": None, "role": "assistant"}
    calls = {"role": "assistant", "tool_calls": call(city="Oslo")}
    shared = {"value": "yes", "from": "gpt"}
    values = [[turned], [user("hi"), turned], turned, [calls], shared, {"messages": [user("hi")]}]
    written = [spell(value) for value in values for spell in (str, json.dumps)]
    written += [json.dumps([turned], indent=2), "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'user'}]"]
    rows = [pair(**{name: text}) for text in written for name in ("prompt", "chosen", "rejected")]
    rows += [pair(text, [assistant("yes")], [assistant("no")]) for text in written]
    rows += [pair([user("hi")], "yes", text) for text in written]
    # Answers that are JSON, or begin with it, are answers.
    texts = (
        '{"role": "cook", "age": 5}',
        '[{"city": "Oslo", "value": 5}]',
        str([turned]) + " is a message.",
        '{"a": {}}',
    )
    answers = [pair(prompt, *sides) for prompt in ("Q", [user("Q")]) for sides in itertools.pairwise(texts)]
    found = drops(tmp_path, *answers, *rows, tokenizer=CHAT)
    assert len(rows) == 5 * 14 and load_pairs(tmp_path / "data.jsonl", CHAT)[1].dropped == {
        "messages written as text; make them lists": 5 * 14
    }
    assert found["messages written as text; make them lists"] == list(range(6, 26))


@pytest.mark.parametrize("text", ["[{" + "'a': 'b', " * 20_000, '{"a": "' + "\\" * 100_000, "[{" + '"' * 100_000])
def test_long_text_that_begins_like_messages(text):
    assert pair_of(pair("Q", text + "}", "no")).chosen == text + "}"


# Rows of several forms


START = "\n\nHuman: hi\n\nAssistant:"
FORMS = {
    "null": ({"prompt": None, "chosen": "I like tea", "rejected": "I like cake"}, None),
    "empty": ({}, None),
    "strings": (pair("Say.", " a", " b"), ["Say.", " a<|end|>", " b<|end|>"]),
    "shared prefix": ({"chosen": "I like tea", "rejected": "I like cake"}, ["I like", " tea<|end|>", " cake<|end|>"]),
    "messages": (pair([user("hi")]), ["<|start|>user\nhi<|end|>\n<|start|>assistant\n", "yes<|end|>", "no<|end|>"]),
    "transcripts": (
        {"chosen": START + " a", "rejected": START + " b"},
        ["<|start|>user\nhi<|end|>\n<|start|>assistant\n", "a<|end|>", "b<|end|>"],
    ),
}


@pytest.mark.parametrize("first", FORMS)
def test_no_row_decides_for_another(tmp_path, first):
    order = [first, *(name for name in FORMS if name != first)]
    found, report = load(tmp_path, *(FORMS[name][0] for name in order), tokenizer=CHAT)
    assert {order[row["row"]]: decoded(row, CHAT) for row in found} == {
        name: texts for name, (_, texts) in FORMS.items() if texts
    }
    assert report.where == {"malformed row": sorted(map(order.index, ("null", "empty")))}


def test_a_null_prompt_in_a_table(tmp_path):
    rows = [pair(None, "I like tea", "I like cake"), pair("Say.", " a", " b")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    found, report = load_pairs(tmp_path / "data.parquet", PLAIN)
    assert decoded(found[0]) == FORMS["strings"][1] and report.where == {"malformed row": [0]}
    # Conversations and transcripts hold the prompt themselves.
    whole = {"prompt": None} | FORMS["transcripts"][0]
    assert decoded(load_one(tmp_path, whole, CHAT), CHAT) == FORMS["transcripts"][1]


# Columns beside them


PROMPT = [user("2+2?")]
TEXT = {"chosen": "The answer is 4.", "rejected": "The answer is 5."}


@pytest.mark.parametrize(
    "row, reason",
    [
        (pair(PROMPT, images=["a.png"]), "pictures or sounds, where only text is read; remove them"),
        (pair(PROMPT, image={"path": "a.png"}), "pictures or sounds, where only text is read; remove them"),
        (pair("2+2?", video="a.mp4"), "pictures or sounds, where only text is read; remove them"),
        (pair(PROMPT, system="Be kind."), "a column system that is not in the prompt; make it the prompt's first"),
        (pair("2+2?", system_prompt="Be kind."), "a column system_prompt that is not in the prompt"),
        (pair(PROMPT, system={"role": "system", "content": "Be kind."}), "a column system that is not in the prompt"),
        (pair(PROMPT, system=[{"role": "system", "content": "Be kind."}]), "a column system that is not in the prompt"),
        (pair(PROMPT, system=["Be kind."]), "a column system that is not in the prompt"),
        (pair(PROMPT, **{"System Prompt": "Be kind."}), "a column System Prompt that is not in the prompt"),
        (pair(PROMPT, system_message="Be kind."), "a column system_message that is not in the prompt"),
        (TEXT | {"Instruction": "Add."}, "no column prompt beside Instruction; make one of them"),
        (TEXT | {"Prompt": "Add."}, "no column prompt beside Prompt; make one of them"),
        (pair(PROMPT, Image="a.png"), "pictures or sounds, where only text is read; remove them"),
        (TEXT | {"question": "2+2?", "system": "Be kind."}, "no column prompt beside question, system; make one"),
        (TEXT | {"instruction": "Add."}, "no column prompt beside instruction; make one of them"),
        ({side: [assistant(text)] for side, text in TEXT.items()} | {"messages": PROMPT}, "beside messages; make one"),
        (pair("2+2?", tools=[tool()]), "tools or chat_template_kwargs beside texts; make the texts messages"),
        (pair("2+2?", chat_template_kwargs='{"think": false}'), "tools or chat_template_kwargs beside texts"),
    ],
)
def test_columns_that_belong_to_the_prompt_are_not_passed_over(tmp_path, row, reason):
    with pytest.raises(ValueError, match="no pair is left") as refusal:
        load_one(tmp_path, row, CHAT)
    assert f"1  {reason}" in str(refusal.value) or reason in str(refusal.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"images": [], "image": None, "tools": "[]", "system": "", "chat_template_kwargs": {}},
        {"system": "2+2?"},  # it is in the prompt
        {"System": [user("2+2?")], "system_prompt": [], "system_message": user(" 2+2?\n")},
        {"question": "2+2?", "messages": [*PROMPT, assistant("yes")]},  # beside a prompt they are only named
    ],
)
def test_columns_that_add_nothing_to_the_prompt(tmp_path, columns):
    for row in (pair("2+2?"), pair(PROMPT)):
        assert load_one(tmp_path, row | columns, CHAT)["prompt_ids"] == load_one(tmp_path, row, CHAT)["prompt_ids"]


def test_pictures_in_a_table_are_refused(tmp_path):
    features = datasets.Features({name: datasets.Value("string") for name in pair()} | {"seen": datasets.Image()})
    empty = datasets.Dataset.from_list([pair(seen=None)], features=features)
    empty.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="pictures or sounds in 'seen', takes text; remove the column"):
        load_pairs(tmp_path / "data.parquet", PLAIN)


def test_every_column_is_named_in_the_report(tmp_path):
    rows = [pair(PROMPT, topic="a", essay="x" * 99), pair(PROMPT, "a", score=0.5, void=None, tools=[tool()])]
    rows.append(pair(PROMPT, "b", **{"\x1b[2J": "y" * 99, "\u202egnp": 1.0}))
    report = load(tmp_path, *rows, tokenizer=TOOLS)[1]
    assert report.columns == {
        "read": ["prompt", "chosen", "rejected", "tools"],
        "carried": ["topic"],
        "unread": ["essay", "score", "\x1b[2J", "\u202egnp"],
    }
    assert "  unread    columns  essay, score, '\\x1b[2J', '\\u202egnp'\n" in str(report)
    report = load(tmp_path, pair(**{f"c{i}": 0.5 for i in range(30)}))[1]
    assert len(report.columns["unread"]) == 30 and "c18, c19, …\n" in str(report)


def test_pair_of_says_why(tmp_path):
    for record, reason in [(None, "broken line"), ({}, "malformed row"), (pair(chosen="no"), "identical pair")]:
        with pytest.raises(NoPair, match=reason):
            pair_of(record)
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(NoPair, match="malformed row"):
        pair_of(ROW | {"tools": [{"a": deep}]})


def test_equal_messages_in_another_order_of_fields(tmp_path):
    turned = {"content": "no", "role": "assistant"}
    assert drops(tmp_path, pair([user("hi")]), pair([user("hi")], [turned], "no"), tokenizer=CHAT) == {
        "identical pair": [1]
    }
    orders = itertools.permutations(ROW["chosen"][0].items())
    assert len({pair_of(ROW | {"chosen": [dict(order)]}).id() for order in orders}) == 1
