"""Where rows come from: kinds of files, reading in a stream, several processes, and what is kept on disk."""

import gzip
import json
import os
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from bench import rows  # noqa: E402
from epsdpo_kernels.record import rows as source_rows  # noqa: E402
from epsdpo_kernels.record.sources import texts  # noqa: E402
from pair_data import (  # noqa: E402
    CHAT,
    PLAIN,
    TEMPLATE,
    assistant,
    byte_tokenizer,
    decoded,
    load,
    pair,
    user,
    write,
)  # fmt: skip
from train import data  # noqa: E402
from train.data import load_pairs  # noqa: E402
from train.encode import Encoder  # noqa: E402

# Kinds of files


@pytest.mark.parametrize("name", ["data.json", "data.json.gz", "data.jsonl", "data.jsonl.gz"])
def test_lines(tmp_path, name):
    found, report = load_pairs(write(tmp_path / name, pair(), b"", pair(chosen="yep")), PLAIN)
    assert [decoded(row)[1] for row in found] == ["yes<|end|>", "yep<|end|>"]
    assert found["row"][:] == [0, 2] and (report.read, report.kept) == (2, 2)


def test_a_byte_order_mark_breaks_no_line(tmp_path):
    path = write(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + json.dumps(pair()).encode())
    assert load_pairs(path, PLAIN)[1].kept == 1


@pytest.mark.parametrize("name", ["data.json", "data.json.gz"])
def test_json_array(tmp_path, name):
    path = write(tmp_path / name, [pair(), 7, pair(chosen="yep")])
    found, report = load_pairs(path, PLAIN)
    assert found["row"][:] == [0, 2] and report.where == {"malformed row": [1]}
    assert texts(path, [2, 0]) == [pair(chosen="yep"), pair()]


@pytest.mark.parametrize("blanks", [0, 62, 65, 5000, 3 << 20])
@pytest.mark.parametrize("name", ["a.jsonl.fixed.json", "a.jsonl.fixed.json.gz", "data.json", "data.json.gz"])
def test_an_array_in_any_json_file_behind_any_blanks(tmp_path, name, blanks):
    rows = [pair(), pair(chosen="yep")]
    for mark in (b"", b"\xef\xbb\xbf"):
        content = mark + b" \r\n\t"[:blanks] * (blanks // 4 or 1) + json.dumps(rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert list(source_rows.read_rows(str(tmp_path / name), "train")) == list(enumerate(rows))
    # As lines they keep their numbers.
    content = b"\n" * blanks + json.dumps(pair()).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(source_rows.read_rows(str(tmp_path / name), "train")) == [(blanks, pair())]


def test_parquet(tmp_path):
    rows = [pair(topic="a"), pair(None), pair("x", "1", "2", topic="b")]
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    found, report = load_pairs(path, PLAIN)
    assert [decoded(row) for row in found] == [["Q: ", "yes<|end|>", "no<|end|>"], ["x", "1<|end|>", "2<|end|>"]]
    assert found["topic"][:] == ["a", "b"] and report.where == {"malformed row": [1]}


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([pair()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, report = load_pairs("someone/pairs", PLAIN, split="test")
    assert asked == [(("someone/pairs",), {"split": "test"})]
    assert decoded(found[0])[0] == "Q: " and report.source == "someone/pairs"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_pairs("nowhere.jsonl", PLAIN)
    with pytest.raises(ValueError, match="source: .* takes a hub name or a file"):
        load_pairs(tmp_path, PLAIN)
    cut = gzip.compress(b"{}" * 99)[:-9]
    for name, content in {"cut.jsonl.gz": cut, "a.jsonl.gz": b"{}", "a.parquet": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            load_pairs(tmp_path / name, PLAIN)


def test_files_of_no_rows(tmp_path):
    datasets.Dataset.from_dict({name: [] for name in pair()}).to_parquet(tmp_path / "a.parquet")
    contents = {"a.jsonl": b"\n \n", "a.json": b" [ ] ", "b.json": b"", "a.json.gz": gzip.compress(b"")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "a.parquet"):
        with pytest.raises(ValueError, match="no pair is left\n.*kept 0 of 0 rows"):
            load_pairs(tmp_path / name, PLAIN)


# In a stream


ARRAY = [{"a": ']}[{\\" 𝄞', "b": [[1.5e3], None]}, 12, "x,]", {}, {"long": "é" * 60}, [[{}]], {"last": -1}]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 1 << 20])
@pytest.mark.parametrize("indent", [None, 3])
def test_an_array_is_read_element_by_element(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(source_rows, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text(
        "\ufeff\n " + json.dumps(ARRAY, indent=indent, ensure_ascii=indent is None) + "\n", encoding="utf-8"
    )
    expected = [value if isinstance(value, dict) else {} for value in ARRAY]
    assert [json.loads(line) for _, line in source_rows.lines(str(path))] == expected


@pytest.mark.parametrize(
    "content", ['[{"a": 1}', '[{"a": 1}, {"b": ]', '[{"a": "\x01"}]', "[" * 100_000, '[{"a": 1}, 1']
)
def test_an_array_that_is_broken(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="data.json can't be read"):
        load_pairs(path, PLAIN)


def test_an_array_is_not_read_to_its_end_before_it_has_to_be(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[" + ",".join(json.dumps(pair(long="x" * 1000)) for _ in range(9000)) + ', {"broken": ')
    assert texts(path, [5, 0]) == [{"prompt": "Q: ", "chosen": "yes", "rejected": "no"}] * 2
    with gzip.open(tmp_path / "cut.jsonl.gz", "wb") as file:
        file.write(write(tmp_path / "a.jsonl", *[pair(long="x" * 1000)] * 2000).read_bytes())
    whole = (tmp_path / "cut.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    assert len(texts(tmp_path / "cut.jsonl.gz", [7])) == 1


ROWS = [
    *(pair(f"Say {i}.", f" {i}", f" {i + 1}", topic="ab"[i % 2], size=i) for i in range(40)),
    b"{",
    b"",
    pair([user("hi")], [assistant("yes")], "no"),
    pair(chosen="no"),
]


def everything(found, report):
    return found[:], report.as_dict() | {"source": ""}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""

    def empty(name):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / name)

    empty("cache")
    return empty


def test_several_processes_do_the_same(tmp_path, monkeypatch, cache):
    one = everything(*load(tmp_path, *ROWS, tokenizer=CHAT))
    assert one[1]["where"] == {"broken line": [41], "identical pair": [43]} and one[0]["row"][-1] == 42
    cache("another")
    monkeypatch.setattr(data, "ROWS_A_PROCESS", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    found, report = load(tmp_path, *ROWS, tokenizer=CHAT)
    assert everything(found, report) == one
    assert len(found.cache_files) >= 3  # a file from each
    with pytest.raises(ValueError, match="prerendered: row 30 has text"):
        load(tmp_path, *ROWS[:30], pair("<|end|>"), tokenizer=CHAT)


def test_batches_do_not_matter(tmp_path, monkeypatch, cache):
    one = everything(*load(tmp_path, *ROWS, tokenizer=CHAT))
    cache("another")
    monkeypatch.setattr(data, "ROWS_A_BATCH", 3)
    monkeypatch.setattr("train.encode.CHARACTERS", 10)
    assert everything(*load(tmp_path, *ROWS, tokenizer=CHAT)) == one


def test_rows_stay_on_disk(tmp_path):
    found, _ = load(tmp_path, *ROWS, tokenizer=CHAT)
    assert found.cache_files and all(Path(file["filename"]).stat().st_size for file in found.cache_files)


# What is kept on disk


def rewrite(path, content):
    """Another content of the same length, as if written at the same time."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_tokenised_twice(tmp_path, monkeypatch, cache):
    one = everything(*load(tmp_path, *ROWS, tokenizer=CHAT))

    def encode(*_):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", encode)
        again = byte_tokenizer(TEMPLATE)  # another object that says the same
        again("a text", padding="max_length", max_length=9, truncation=True)
        assert everything(*load(tmp_path, *ROWS, tokenizer=again)) == one
        # A copy elsewhere, and other columns of it, need no tokens either.
        (tmp_path / "copy.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes())
        found, _ = load_pairs(tmp_path / "copy.jsonl", CHAT, keep_columns=["size"])
        assert found.column_names[5:] == ["size"] and found["size"][3] == 3


def test_what_is_kept_goes_by_the_content(tmp_path):
    path = write(tmp_path / "data.jsonl", pair(), pair("x"))
    load_pairs(path, PLAIN)
    rewrite(path, path.read_bytes().replace(b"yes", b"nay"))
    assert [decoded(row)[1] for row in load_pairs(path, PLAIN)[0]] == ["nay<|end|>"] * 2
    write(path, pair(), b"", pair("x"))
    assert load_pairs(path, PLAIN)[0]["row"][:] == [0, 2]


def test_a_table_goes_by_its_content_too(tmp_path):
    path = tmp_path / "data.parquet"
    for answer in ("yes", "nay"):
        content = tmp_path / f"{answer}.parquet"
        datasets.Dataset.from_list([pair(chosen=answer)]).to_parquet(content)
        if path.exists():
            rewrite(path, content.read_bytes())
        else:
            path.write_bytes(content.read_bytes())
        assert decoded(load_pairs(path, PLAIN)[0][0])[1] == f"{answer}<|end|>"


def test_what_is_kept_goes_by_tokenizer_and_options(tmp_path):
    row, other = pair([user("hi")], "yes, of course", "no"), byte_tokenizer(TEMPLATE.replace("<|end|>", ";<|end|>"))
    for limit, end in ((1024, "yes, of course{}<|end|>"), (12, "yes, o")):
        for tokenizer, close in ((CHAT, ""), (other, ";"), (CHAT, "")):
            found, _ = load(tmp_path, row, tokenizer=tokenizer, max_length=limit)
            assert decoded(found[0], tokenizer)[1] == end.format(close)
    for _ in range(2):
        assert load(tmp_path, pair("<bos>"), prerendered=True)[0]["prompt_ids"][0] == [PLAIN.bos_token_id]
        assert len(load(tmp_path, pair("<bos>"), prerendered=False)[0]["prompt_ids"][0]) == 5


def test_a_large_file_is_measured(tmp_path, cache):
    rows.write(tmp_path / "pairs.jsonl", 400)
    found = rows.measure(tmp_path / "pairs.jsonl", CHAT, tmp_path / "cache")
    assert (found["rows"], found["kept"]) == (400, 396) and found["broken lines"] == [18, 118, 218, 318]
    pairs = load_pairs(tmp_path / "pairs.jsonl", CHAT)[0]
    assert found["tokens"] == sum(len(row[name]) for row in pairs for name in data.IDS)
    assert found["peak MiB"] >= found["MiB at the start"] > 100
