"""Texts of tokens: of a sequence, of each of its tokens, of a token by itself."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def decode_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Text of tokens, special ones left out; more tokens only add to it.

    Hence no clean-up of spaces, which rewrites what came before.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def text_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The part of the text that every token adds; the parts add up to the whole.

    A token that ends within a character adds nothing: the character comes with the token that
    completes it. A tokenizer that rewrites what it decoded before makes the parts differ from the
    whole; the parts stand.

    Args:
        ids: of the tokens.
        decode: the text of a prefix of them, or of a stretch.
    """
    pieces: list[str] = []
    # A stretch is decoded behind the one before it: by itself it may lose its leading space.
    start = settled = 0
    for count in range(1, len(ids) + 1):
        text = decode(ids[start:count])
        if text.endswith(_UNREADABLE) and count < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(ids[start:settled])) :])
        start, settled = settled, count
    return pieces if "".join(pieces) == decode(ids) else _pieces_of_prefixes(ids, decode)


def _pieces_of_prefixes(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The same from whole prefixes: slower, and right behind any token."""
    pieces: list[str] = []
    sent = ""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        if count < len(ids):
            text = text.rstrip(_UNREADABLE)
        pieces.append(text[len(sent) :] if text.startswith(sent) else "")
        sent += pieces[-1]
    return pieces


class TokenNames:
    """Tokens by themselves, as a person can tell them apart.

    Args:
        tokenizer: that of the model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self._names: dict[int, str] = {}

    def is_special(self, token_id: int) -> bool:
        """It has no text of its own in an answer."""
        return token_id in self._special

    def __getitem__(self, token_id: int) -> str:
        """Its text with its leading space, its name if it is special, its bytes if it is a part of
        a character."""
        if token_id not in self._names:
            self._names[token_id] = self._name(token_id)
        return self._names[token_id]

    def _name(self, token_id: int) -> str:
        alone = self._decode([token_id])
        if self.is_special(token_id):
            return alone
        if _UNREADABLE in alone:
            return self._bytes(token_id) or alone
        # Some tokenizers drop the leading space of a text: the second of two has it.
        twice = self._decode([token_id, token_id])
        return twice[len(alone) :] if twice.startswith(alone) else alone

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return str(text)

    def _bytes(self, token_id: int) -> str | None:
        """Characters, and of the rest the bytes as in ``\\xe2``; None: it has none."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str) or any(character not in _BYTES for character in piece):
            return piece if isinstance(piece, str) else None
        return bytes(_BYTES[character] for character in piece).decode(errors="backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies: printable bytes stand for themselves, the n-th other is U+0100+n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()
