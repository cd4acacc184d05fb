"""The view in a terminal, and in what is not one."""

import io
import re

import pytest
from rich.console import Console

import speaker
from mara_fast import Generation
from mara_fast.inspection.terminal import print_generation, visible


def printed(generation: Generation, **options: bool | str | int | None) -> str:
    file = io.StringIO()
    console = Console(file=file, highlight=False, width=160, _environ={}, **options)  # type: ignore
    print_generation(generation, console, title="some prompt")
    return file.getvalue()


def test_without_colour_nothing_is_lost(spoken: list[Generation]) -> None:
    for result in spoken:
        text = printed(result)
        assert "\x1b" not in text
        plain = printed(result, force_terminal=True, no_color=True)
        assert not re.search(r"\x1b\[[0-9;]*[34][0-7]", plain)
        first = text.partition("\n\n")[0].partition("\n")[2]
        changed = [token for token in result.trace or () if token.rank]
        for number in range(1, len(changed) + 1):
            assert f"[{number}]" in first
        without_numbers = re.sub(r"\[\d+\]|\s|↵", "", first)
        shown = "".join(visible(str(token.text)) for token in result.trace or ())
        assert without_numbers == re.sub(r"\[\d+\]|\s|↵", "", shown)
        if changed:
            assert "Where the language model's first was not taken" in text


def test_with_colour(spoken: list[Generation]) -> None:
    text = printed(spoken[0], force_terminal=True, color_system="standard")
    assert "\x1b[" in text and "accept probability:" in text


def test_the_table_says_what_was_asked(spoken: list[Generation]) -> None:
    result = spoken[0]
    text = printed(result)
    place, token = next((p, t) for p, t in enumerate(result.trace or ()) if t.rank)
    row = next(line for line in text.splitlines() if line.startswith("│ 1 "))
    assert f" {place + 1} │" in row
    assert f"0 {100 * 2.718281828459045 ** token.candidates[0].logprob:.1f}% ✕" in row


def test_nothing_is_obeyed(hostile: Generation) -> None:
    text = printed(hostile)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\u2066\ud83c\ufeff]", text)
    text.encode()
    assert "␛[31m" in text and "⟨U+202E⟩" in text and "⟨U+D83C⟩" in text
    assert "👩‍👩‍👧" in text
    assert "⟨U+E0041⟩⟨U+034F⟩⟨U+3164⟩⟨U+2800⟩⟨U+00A0⟩⟨U+115F⟩⟨U+FFA0⟩⟨U+FE01⟩" in text
    assert "! " not in text


def test_without_an_agent(spoken: list[Generation]) -> None:
    text = printed(spoken[-1], force_terminal=True, color_system="standard")
    assert "Decoded without an agent." in text and "accept probability" not in text
    assert "Decoded without an agent." not in printed(spoken[0])


def test_without_texts() -> None:
    engine = speaker.engine(with_text=False)
    [result] = engine.generate([[3, 4]], trace=True, max_new_tokens=3)
    assert all(f"#{token_id}" in printed(result) for token_id in result.token_ids)
    [untraced] = engine.generate([[3, 4]], max_new_tokens=3)
    with pytest.raises(ValueError, match="has no trace"):
        printed(untraced)
