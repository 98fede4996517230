"""Text from outside made safe to show: that of a data set, a run's settings, a name in a record."""

from __future__ import annotations

import re
from typing import Any

# All of Unicode's Default_Ignorable_Code_Point: direction marks, tags, fillers, and the joiners and variation selectors
# of emoji and some scripts, for a message can be hidden in those too.
IGNORABLE = (
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
# And C0 and C1 controls but newline and tab; line and paragraph separators; annotation marks; lone surrogates.
HIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb\ud800-\udfff{IGNORABLE}{NONCHARACTERS}]")


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
