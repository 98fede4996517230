"""From the texts and messages of a pair to token ids, with the tokenizer's own chat template."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from epsdpo_kernels.record.sources import Message, NoPair, Pair, text_of, turns

# A Unicode noncharacter, which no text should hold. One that does is guarded like a control token.
MARK = "\ufdd0"
MARKED = re.compile(f"{MARK}([0-9]+){MARK}")
# Characters given to the tokenizer at once: what it keeps of a token while it works is about a hundred bytes.
CHARACTERS = 1 << 20
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a row may not set: all that is not for the template to see.
RESERVED = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents"}
REFUSED = "refused by the chat template"
REWRITTEN = "text that spells a control token, which the chat template rewrites"
NOTHING = "a completion that the chat template writes nothing of"


class Rendered(NamedTuple):
    """Three texts, the completions with the prompt before them. `raw` begin as the tokenizer begins a text."""

    prompt: str
    chosen: str
    rejected: str
    raw: bool


class Encoded(NamedTuple):
    """Token ids, int32. `parted`: the completions begin before the prompt, tokenised alone, ends."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    parted: bool


class Encoder:
    """Renders pairs and tokenises them. A control token that a template writes is one; the data's text spells none.

    Before anything is rendered, such text becomes a numbered mark, and at tokenisation the ids of the text as text. The
    tokenizer sees other pieces than it otherwise would only where a mark is. A template that escapes, cuts or counts
    text does so with a mark too: where marks do not stand for what it writes of the text itself, there is no pair.

    prerendered: whether texts (not messages) hold control tokens that are meant as such; None to refuse them.
    """

    def __init__(self, tokenizer, prerendered: bool | None):
        if tokenizer.eos_token is None:
            raise ValueError("tokenizer: got one without an EOS token, takes one that completions can end with")
        self.tokenizer, self.prerendered = tokenizer, prerendered
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.control = tuple(dict.fromkeys([*special, *tokenizer.all_special_tokens]))
        self.guarded = sorted({MARK, *self.control}, key=len, reverse=True)
        self.marks = {token: f"{MARK}{i}{MARK}" for i, token in enumerate(self.guarded)}
        self.pattern = re.compile("|".join(map(re.escape, self.guarded)))
        whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        self.start = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
        self.start_text = "".join(tokenizer.convert_ids_to_tokens(self.start))
        self.newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def spelt(self, texts: Iterable[str]) -> str | None:
        """The first control token that texts spell."""
        return next((token for text in texts for token in self.pattern.findall(text) if token != MARK), None)

    # Rendering

    def render(self, pair: Pair) -> Rendered:
        """Raises NoPair where the template does, ValueError where there is none."""
        if pair.transcript and self.tokenizer.chat_template and not self.prerendered:
            chosen, rejected = ([{"role": "assistant", "content": str(side).strip()}] for side in pair[1:3])
            pair = Pair(turns(str(pair.prompt)), chosen, rejected)
        return self._render_texts(pair) if isinstance(pair.prompt, str) else self._render_messages(pair)

    def _render_texts(self, pair: Pair) -> Rendered:
        prompt, *sides = map(str, pair[:3]) if self.prerendered else map(self._guard, pair[:3])
        chosen, rejected = (prompt + self._closed(side, self.prerendered) for side in sides)
        begun = self.prerendered and self.start_text and prompt.startswith(self.start_text)
        return Rendered(prompt, chosen, rejected, raw=not begun)

    def _render_messages(self, pair: Pair) -> Rendered:
        if not self.tokenizer.chat_template:
            raise ValueError("tokenizer: got one without a chat template, takes one to write messages with")
        if pair.template_kwargs and RESERVED & pair.template_kwargs.keys():
            raise NoPair("chat_template_kwargs that no template sees")
        parts: list[Any] = [*map(self._messages, pair[:3]), {"tools": pair.tools} | (pair.template_kwargs or {})]
        guarded = self._guard(parts)
        start, *wholes = written = self._written(*guarded)
        if guarded != parts and list(map(self._unguard, written)) != self._written(*parts):
            raise NoPair(REWRITTEN)
        chosen, rejected = (self._closed(whole, True) for whole in wholes)
        for whole in (chosen, rejected):
            shared = start if whole.startswith(start) else os.path.commonprefix((start, whole))
            completion = whole[len(shared) :]
            if not self.pattern.sub("", completion).strip():
                raise NoPair(NOTHING)
        return Rendered(start, chosen, rejected, raw=False)

    def _written(self, prompt: list, chosen: list, rejected: list, options: dict[str, Any]) -> list[str]:
        start = self._apply(prompt, options, add_generation_prompt=True)
        return [start, *(self._apply(prompt + side, options) for side in (chosen, rejected))]

    def unwritten(self, pair: Pair) -> list[str]:
        """Fields of the pair's messages, tools and variables that the chat template does not mention."""
        if isinstance(pair.prompt, str):
            return []
        messages = [message for side in pair[:3] for message in cast(list[Message], side)]
        names = {name for message in messages for name in message} - {"role", "content"}
        names |= (pair.template_kwargs or {}).keys() | ({"tools"} if pair.tools else set())
        template = self.tokenizer.get_chat_template(tools=pair.tools)
        return sorted(name for name in names if name not in template and name not in self._handed_on)

    @cached_property
    def _handed_on(self) -> set[str]:
        """Fields whose text reaches the template under another name, as transformers does with thoughts."""
        found = set()
        for name in REASONING:
            thought = {"role": "assistant", "content": "an answer", name: "a thought"}
            try:
                if "a thought" in self._apply([{"role": "user", "content": "a question"}, thought], {}):
                    found.add(name)
            except NoPair:
                pass
        return found

    def _closed(self, text: str, rendered: bool | None) -> str:
        """A text with its end: EOS, or what it was rendered with. A newline after an end of turn is never generated."""
        closed = rendered and text.rstrip().endswith(self.control)
        return text.rstrip() if closed else text + self.tokenizer.eos_token

    def _apply(self, messages: list[Message], options: dict[str, Any], **more) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError):
            raise NoPair(REFUSED) from None

    def _messages(self, messages: Any) -> list[Message]:
        if not self._reads_parts:
            messages = [m | {"content": text_of(m)} if isinstance(m.get("content"), list) else m for m in messages]
        return messages

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads lists of text as it reads text; many would print them as Python does."""
        text, parts = "a text", [{"type": "text", "text": "a text"}]
        try:
            one, other = (self._apply([{"role": "user", "content": each}], {}) for each in (text, parts))
        except NoPair:
            return False
        return one == other

    def _guard(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.marks[match[0]], value)
        if isinstance(value, dict):
            return {self._guard(name): self._guard(part) for name, part in value.items()}
        return [self._guard(part) for part in value] if isinstance(value, list) else value

    def _unguard(self, text: str) -> str:
        texts = {mark: token for token, mark in self.marks.items()}
        return MARKED.sub(lambda match: texts.get(match[0], match[0]), text)

    # Tokenising

    def encode(self, rendered: Sequence[Rendered]) -> Iterator[Encoded]:
        """Splits where the tokens of a prompt and of both wholes part; that is the prompt's end but for merges."""
        ids = self._ids([text for one in rendered for text in one[:3]])
        for one in rendered:
            start = np.array(self.start if one.raw else [], np.int32)
            prompt, chosen, rejected = (np.concatenate((start, next(ids))) for _ in range(3))
            n = min(_common(prompt, chosen), _common(prompt, rejected))
            yield Encoded(prompt[:n], chosen[n:], rejected[n:], parted=n < len(prompt))

    def _ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        start = 0
        while start < len(texts):
            end, size = start + 1, len(texts[start])
            while end < len(texts) and (size := size + len(texts[end])) <= CHARACTERS:
                end += 1
            options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
            batch = self.tokenizer(texts[start:end], **options)["input_ids"]
            for text, ids in zip(texts[start:end], batch, strict=True):
                yield np.array(self._pieces(text) if MARK in text else ids, np.int32)
            start = end

    def _pieces(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(MARKED.split(text)):
            spelt = i % 2 == 1
            piece = self.guarded[int(piece)] if spelt else piece
            options = {"add_special_tokens": False, "split_special_tokens": spelt}
            # Some tokenizers put a space before a text: not before one that goes on.
            behind = self.tokenizer("\n" + piece, **options)["input_ids"] if i else []
            if self.newline and behind[: len(self.newline)] == self.newline:
                ids += behind[len(self.newline) :]
            else:
                ids += self.tokenizer(piece, **options)["input_ids"]
        return ids


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two sequences begin with alike."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n
