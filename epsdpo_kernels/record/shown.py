"""Text from outside made safe to show: that of a data set, a run's settings, a name in a record."""

from __future__ import annotations

import re
from typing import Any

# C0 and C1 controls but newline and tab; soft hyphen, zero-width, line, paragraph and direction marks; byte order and
# annotation marks; lone surrogates; tags; noncharacters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: Any, cut: int | None = None, more: str = " …") -> str:
    """A text with everything in it to be seen: marks that hide, break or turn text become ⟨U+…⟩.

    Args:
        cut: characters to keep at most; ``more`` follows where there were more, with ``{n}`` for how many.
    """
    text = str(text)
    left = len(text) - cut if cut is not None else 0
    shown = text[:cut].replace("\r\n", "\n") if left > 0 else text.replace("\r\n", "\n")
    shown = HIDDEN.sub(_spelt, shown)
    return shown + more.format(n=f"{left:,}") if left > 0 else shown


def in_a_line(text: Any, cut: int = 200) -> str:
    """A text for a line of a terminal: cut, visible, and without a way into the next line."""
    return re.sub("[\n\t]", _spelt, visible(text, cut))


def _spelt(mark: re.Match) -> str:
    return f"⟨U+{ord(mark[0]):04X}⟩"
