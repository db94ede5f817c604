"""Names that come from data, made fit for terminals and pictures."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides, zero widths), surrogate, private and unassigned characters, and
# line and paragraph separators: they move the cursor, reorder text or show as nothing.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0"}
# Combining marks beyond this many in a row climb over neighbouring lines.
_MOST_MARKS = 2


def printable(name: str, width: int = 60) -> str:
    """The name on one line: control characters escaped, outer spaces shown, at most `width` characters.

    >>> printable("a\\nb")
    'a\\\\nb'
    >>> printable("x" * 10, width=6)
    'xxxxx…'
    """
    parts: list[str] = []
    marks = 0
    # One character becomes at least one: no more than width + 1 of them can matter.
    for character in name[: width + 1]:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if category in _UNPRINTABLE or marks > _MOST_MARKS:
            parts.append(_SHORT.get(character, escaped(character)))
        else:
            parts.append(" " if category == "Zs" else character)
    if not parts:
        return "(empty)"
    if parts[0] == " " or parts[-1] == " ":
        parts = ["'", *parts, "'"]
    text = "".join(parts)
    return text if len(text) <= width else text[: width - 1] + "…"


def escaped(character: str) -> str:
    """A character by its code point, as Python writes it: \\x1b, \\u202e or \\U0001f600."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
