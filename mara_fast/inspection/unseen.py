"""Characters that would not be seen in a text, or would change how the rest of it is seen.

    controls, formats, halves of surrogate pairs, separators of lines     by category
    spaces other than the plain one                                       by category
    letters, marks and variation selectors without a shape                by name

Joiners and the selector of emoji (U+200C, U+200D, U+FE0F) are parts of words and of emoji.
"""

import sys
import unicodedata
from functools import cache

_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
_SEEN = " \u200c\u200d"
_SHAPELESS = {
    *map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)),
    *map(chr, (0x180B, 0x180C, 0x180D, 0x180F)),
    *map(chr, range(0xFE00, 0xFE0F)),
    *map(chr, range(0xE0100, 0xE01F0)),
}


def is_unseen(character: str) -> bool:
    """It needs a sign to be seen."""
    if character in _SEEN:
        return False
    return unicodedata.category(character) in _CATEGORIES or character in _SHAPELESS


@cache
def unseen_pattern() -> str:
    """A regular expression of JavaScript, flag u, that matches one such character."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if is_unseen(chr(code)):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "[" + "".join(rf"\u{{{first:x}}}-\u{{{last:x}}}" for first, last in ranges) + "]"
