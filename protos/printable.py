"""Text of others (names, messages, output) made safe for a terminal: nothing in it is obeyed, all of it is shown.

Letters of every script stay as they are; control, format (bidirectional overrides) and unassigned characters do not.
"""

from __future__ import annotations

import re
import unicodedata

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, erasing
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS: titles, clipboard
    r"|\x1b[ -/]*[0-~]"
)


def printable(text: str, keep: str = "") -> str:
    """What a terminal would obey is written as Python writes it, e.g. \\x1b; characters of `keep` stay."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or _shown(c) else c.encode("unicode_escape").decode() for c in text)


def without_sequences(text: str) -> str:
    """Output of a program without terminal sequences: newlines and tabs stay, a carriage return becomes a newline."""
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n")).replace("\r", "\n")
    return "".join(c for c in text if c in "\n\t" or _shown(c))


def _shown(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] != "C" and kind not in ("Zl", "Zp")
