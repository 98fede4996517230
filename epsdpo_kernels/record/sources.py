"""Rows of a data set as preference pairs: texts or messages, and ids, without a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from .rows import Record, read_rows

# Columns whose text has to be in the prompt; in these and the two below, case, spaces and hyphens do not matter.
SYSTEM = ("system", "system_prompt", "system_message")
# The columns that a pair is read from; a system text is only looked for in the prompt.
PARTS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", *SYSTEM)
# Columns that can be a prompt, and say so where there is no `prompt`.
QUESTIONS = ("prompt", "question", "instruction", "instructions", "input", "query", "problem", "context", "history",
             "dialogue", "conversation", "conversations", "messages", *SYSTEM)  # fmt: skip
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
BROKEN, MALFORMED, DIFFERENT = "broken line", "malformed row", "different prompts"
NOT_HELD = "a prompt that is not in its conversations"
MEDIA_FOUND = "pictures or sounds, where only text is read; remove them"
CONTENT = "content that is neither text nor a list of texts"
# Roles that come before a conversation, not as an answer in it.
INSTRUCTS = ("system", "developer")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# JSON can spell half a surrogate pair, which no tokenizer and no table takes.
SURROGATE = re.compile("[\ud800-\udfff]")
# What a message written in JSON or as Python prints it begins with, any plain fields before its role, and what it says.
QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
FIELD = rf"{QUOTED}\s*:\s*(?:{QUOTED}|[\w.+-]+)\s*,\s*"
WRAPPED = r"""(?:\{\s*["'](?:messages|conversations?)["']\s*:\s*)?(?:\[\s*)?\{\s*"""
ROLE = re.compile(rf"""{WRAPPED}(?:{FIELD})*["'](?:role|from)["']\s*:""", re.DOTALL)
SAYS = re.compile(r"""["'](?:content|value|tool_calls)["']\s*:""")

Message = dict[str, Any]
Text = str | list[Message]


class NoPair(Exception):
    """A row is no pair; the text is the reason."""


class Pair(NamedTuple):
    """A pair as its source has it: three texts, or three lists of messages.

    Messages are what `apply_chat_template` takes, every field of them; `tools` and `template_kwargs` go there too. The
    texts of a transcript are Human's and Assistant's turns, which a chat template can write in its own way.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    transcript: bool = False

    def text(self) -> dict[str, str]:
        """Three readable texts: messages become paragraphs `role: content`, an answer alone its content."""
        around = {"tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        told = [f"{name}: {_readable(value)}" for name, value in around.items() if value]
        prompt = self.prompt if isinstance(self.prompt, str) else "\n\n".join([*told, *map(_paragraph, self.prompt)])
        return {"prompt": prompt, "chosen": _answer(self.chosen), "rejected": _answer(self.rejected)}

    def id(self) -> str:
        """16 hex digits, a hash of all that makes the pair, the same from every kind of file."""
        return hashlib.blake2b(self.canonical().encode(), digest_size=8).hexdigest()

    def canonical(self) -> str:
        """The pair as JSON. A field that is null is as good as absent."""
        around = [self.tools, self.template_kwargs] if self.tools or self.template_kwargs else []
        parts = _without_nulls([self.prompt, self.chosen, self.rejected, *around])
        return json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)


def text_of(message: Message) -> str:
    """The text of a message, whose content is a string, a list of {"type": "text", "text"}, or nothing."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _body(message: Message) -> str:
    fields = [f"{name}: {_readable(value)}" for name, value in message.items() if name not in ("role", "content")]
    return "\n".join([text_of(message), *fields] if text_of(message) or not fields else fields)


def _paragraph(message: Message) -> str:
    return f"{message['role']}: {_body(message)}"


def _answer(side: Text) -> str:
    if isinstance(side, str):
        return side
    return _body(side[0]) if len(side) == 1 else "\n\n".join(map(_paragraph, side))


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _without_nulls(value: Any, depth: int = 0) -> Any:
    if depth > 100:  # no use, and too deep for what comes after
        raise NoPair(MALFORMED)
    if isinstance(value, dict):
        return {name: _without_nulls(part, depth + 1) for name, part in value.items() if part is not None}
    return [_without_nulls(part, depth + 1) for part in value] if isinstance(value, list) else value


# From rows to pairs


def pair_of(record: Record | None) -> Pair:
    """The pair of a record. What the records around it look like plays no part.

    Raises:
        NoPair: it holds none, with the reason; :func:`train.data.load_pairs` says what is taken.
    """
    if record is None:
        raise NoPair(BROKEN)
    if _named(record, MEDIA):
        raise NoPair(MEDIA_FOUND)
    parts = [record.get(name) for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(side, str | list | dict) for side in parts[1:]):
        raise NoPair(MALFORMED)
    if any(isinstance(part, str) and _is_written(part.strip()) for part in parts):
        raise NoPair("messages written as text; make them lists")
    pair = _texts(record) if not any(isinstance(part, list | dict) for part in parts) else _conversations(record)
    if SURROGATE.search(pair.canonical()):
        raise NoPair(MALFORMED)
    for name, value in _named(record, SYSTEM):
        if isinstance(value, str | list | dict) and not all(text in _spoken(pair.prompt) for text in _said(value)):
            raise NoPair(f"a column {name} that is not in the prompt; make it the prompt's first message")
    if _is_empty(pair.chosen) or _is_empty(pair.rejected):
        raise NoPair("empty completion")
    if pair.chosen == pair.rejected:
        raise NoPair("identical pair")
    return pair


def _is_written(text: str) -> bool:
    """Whether a text is a message, or messages, in JSON or as Python prints them."""
    return text.endswith(("}", "]")) and bool(ROLE.match(text) and SAYS.search(text))


def _spoken(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(map(text_of, prompt))


def _named(record: Record, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The columns of those names that hold something."""
    return [(name, value) for name, value in record.items() if value and re.sub(r"[ -]", "_", name.lower()) in names]


def _said(value: Any) -> list[str]:
    """The texts of a text, a message, or several of them."""
    values = value if isinstance(value, list) else [value]
    return [(each if isinstance(each, str) else text_of(_message(each))).strip() for each in values]


def _is_empty(side: Text) -> bool:
    if isinstance(side, str):
        return not side.strip()
    fields = (value for message in side for name, value in message.items() if name not in ("role", "content", "name"))
    return not any(fields) and not any(text_of(message).strip() for message in side)


def _refuse_guess(record: Record) -> None:
    """Raises NoPair where there is no prompt, but a column that can be one."""
    if found := [name for name, value in _named(record, QUESTIONS) if isinstance(value, str | list | dict)]:
        raise NoPair(f"no column prompt beside {', '.join(found)}; make one of them")


def _texts(record: Record) -> Pair:
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if _tools(record) or _template_kwargs(record):
        raise NoPair("tools or chat_template_kwargs beside texts; make the texts messages")
    if chosen.startswith(HUMAN) or rejected.startswith(HUMAN):
        (before, chosen), (other, rejected) = map(_transcript, (chosen, rejected))
        if before != other:
            raise NoPair(DIFFERENT)
        if isinstance(prompt, str) and prompt.strip() not in before:
            raise NoPair(NOT_HELD)
        return Pair(before, chosen, rejected, transcript=True)
    if isinstance(prompt, str):
        if _repeated(prompt, chosen, rejected):
            if not all(side.startswith(prompt) for side in (chosen, rejected)):
                raise NoPair("completions that repeat the prompt after other text or space")
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Pair(prompt, chosen, rejected)
    # A column that others have in full is not one to do without.
    if "prompt" in record:
        raise NoPair(MALFORMED)
    _refuse_guess(record)
    # Split at whitespace: the last two pieces are the last whitespace and what follows it.
    prompt = "".join(re.split(r"(\s+)", os.path.commonprefix((chosen, rejected)))[:-2])
    if not prompt and chosen != rejected:
        raise NoPair(DIFFERENT)
    return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _repeated(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both completions hold a prompt's text, as words of its own, behind the same beginning."""
    text = prompt.strip()
    if not text or text not in os.path.commonprefix((chosen, rejected)):
        return False
    words = re.compile(rf"(?:\b|(?<!\w)){re.escape(text)}(?:\b|(?!\w))")
    one, other = words.search(chosen), words.search(rejected)
    return one is not None and other is not None and chosen[: one.end()] == rejected[: other.end()]


def _transcript(text: str) -> tuple[str, str]:
    prompt, marker, completion = text.rpartition(ASSISTANT)
    if not prompt.startswith(HUMAN) or HUMAN in completion:
        raise NoPair(MALFORMED)
    return prompt + marker, completion


def turns(transcript: str) -> list[Message]:
    """The messages of a transcript's prompt, without the assistant turn that it opens at its end."""
    parts = re.split(f"({HUMAN}|{ASSISTANT})", transcript)[1:-2]
    roles = ("user" if marker == HUMAN else "assistant" for marker in parts[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]


def _conversations(record: Record) -> Pair:
    given = record.get("prompt")
    prompt = [] if given is None else _messages(given, "user")
    sides = [_messages(record[side], "assistant") for side in ("chosen", "rejected")]
    if not all(side and side[-1]["role"] == "assistant" for side in sides):
        raise NoPair(MALFORMED)
    ends = [_end_of(prompt, side) for side in sides]
    others = [side[0]["role"] for side, end in zip(sides, ends, strict=True) if not end and _opens(side)]
    if not prompt or isinstance(given, str) and len(others) == 2:
        prompt, chosen, rejected = _shared(record, *sides)
        if isinstance(given, str) and given.strip() not in _spoken(prompt):
            raise NoPair(NOT_HELD)
    else:
        # One completion may go on with another's turn; two where an answer is due are other words for the prompt.
        due = prompt[-1]["role"] not in ("assistant", *INSTRUCTS)
        if due and len(others) == 2 or any(role in INSTRUCTS for role in others):
            raise NoPair(NOT_HELD)
        before, other = (side[: max(end - len(prompt), 0)] for side, end in zip(sides, ends, strict=True))
        if before != other:
            raise NoPair(DIFFERENT)
        prompt, (chosen, rejected) = before + prompt, (side[end:] for side, end in zip(sides, ends, strict=True))
    return Pair(prompt, chosen, rejected, _tools(record), _template_kwargs(record))


def _shared(record: Record, chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Whole conversations: what they share is the prompt, and what remains has to be the assistant's."""
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    if not n and min(len(chosen), len(rejected)) < 2:
        _refuse_guess(record)
        raise NoPair(MALFORMED)
    if not n or _opens(chosen[n:]) or _opens(rejected[n:]):
        raise NoPair(DIFFERENT)
    return chosen[:n], chosen[n:], rejected[n:]


def _opens(side: list[Message]) -> bool:
    """Whether a side begins with another than the assistant."""
    return bool(side) and side[0]["role"] != "assistant"


def _end_of(prompt: list[Message], side: list[Message]) -> int:
    """How many messages of a side are before the completion: those up to the prompt that it holds, or the prompt's end
    that it begins with; 0 for none. Whitespace, and text that is a list of texts, make no difference.
    """
    said, told = ([message | {"content": text_of(message).split()} for message in part] for part in (prompt, side))
    n = len(prompt) if prompt and _opens(side) else 0
    whole = (end for end in range(n, len(side) + 1) if n and told[end - n : end] == said)
    return next(whole, 0) or next((end for end in range(n - 1, 0, -1) if told[:end] == said[-end:]), 0)


def _messages(value: Any, role: str) -> list[Message]:
    """A text, a message or messages as messages, fields that are null left out."""
    if isinstance(value, str):
        if value.startswith(HUMAN):
            raise NoPair("a transcript beside messages; make it messages")
        return [{"role": role, "content": value}]
    if not isinstance(value, list | dict):
        raise NoPair(MALFORMED)
    return [_message(message) for message in (value if isinstance(value, list) else [value])]


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise NoPair(MALFORMED)
    message = {name: part for name, part in value.items() if part is not None}
    if "role" not in message and "from" in message:
        raise NoPair("messages of from and value; name these role and content")
    calls = _parsed(message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = calls
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_content_part(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise NoPair(CONTENT)
    if len(message) < 2 or not isinstance(message.get("role"), str) or not isinstance(calls or [], list):
        raise NoPair(MALFORMED)
    return message


def _content_part(part: Any) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {name: value for name, value in part.items() if value is not None}
    if isinstance(part, dict) and any(name in str(part.get("type")) for name in ("image", "video", "audio")):
        raise NoPair(MEDIA_FOUND)
    raise NoPair(CONTENT)


def _tools(record: Record) -> list[Any] | None:
    tools = _parsed(record.get("tools"))
    if isinstance(tools, list):
        tools = [_parsed(tool) for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise NoPair(MALFORMED)
    return tools or None


def _template_kwargs(record: Record) -> dict[str, Any] | None:
    kwargs = _parsed(record.get("chat_template_kwargs"))
    if kwargs and not isinstance(kwargs, dict):
        raise NoPair(MALFORMED)
    return kwargs or None


def _parsed(value: Any) -> Any:
    """A value that may be written as JSON."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise NoPair(MALFORMED) from None


# Pairs for those who look


def pairs(source: str | os.PathLike, rows: Iterable[int], split: str = "train") -> list[Pair]:
    """The pairs at some rows of a source, in the order asked for. Raises ValueError for a row that holds none."""
    wanted = [int(row) for row in rows]
    left, found = set(wanted), {}
    for row, record in read_rows(os.fspath(source), split) if wanted else ():
        if row in left:
            found[row] = record
            left.remove(row)
            if not left:
                break
    try:
        return [pair_of(found.get(row := each)) for each in wanted]
    except NoPair as drop:
        raise ValueError(f"rows: got {row}, where {source} holds no pair ({drop})") from None


def texts(source: str | os.PathLike, rows: Iterable[int], split: str = "train") -> list[dict[str, str]]:
    """The texts of those pairs: {"prompt", "chosen", "rejected"} each, see :meth:`Pair.text`."""
    return [pair.text() for pair in pairs(source, rows, split)]
