"""The page in a browser: pointed at, focused, in both colour schemes, with texts that mean harm."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import speaker
from mara_fast import DecodingStats, Generation
from mara_fast.inspection import html_page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'"
)

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_CONTRAST = """() => {
  const channels = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[0-9.]+/g).map(Number);
    return [r, g, b, a];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map(
      (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const background = (element) => {
    const own = channels(getComputedStyle(element).backgroundColor);
    if (own[3] === 1) return own.slice(0, 3);
    return over(own, element.parentElement ? background(element.parentElement) : [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const under = background(element);
    const ink = over(channels(getComputedStyle(element).color), under);
    const [low, high] = [luminance(under), luminance(ink)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.className + ": " + element.textContent]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with playwright.sync_playwright() as driver:
        # The sandbox needs rights that root and containers do not have.
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens generations as a page; whatever the page complains of fails the test."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(generations: list[Generation], **options: Any) -> Any:
        path = tmp_path / "page.html"
        html_page(generations, ids=list(range(len(generations))), path=path)
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        contexts.append(context)
        view = context.new_page()
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on("dialog", lambda dialog: complaints.append(dialog.message))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(path.as_uri())
        return view

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file:") and url.endswith("page.html") for url in requests)


def place(generations: list[Generation], verdict: str, *, later: bool = False) -> tuple[int, int]:
    """The first token of this verdict: (generation, position)."""
    for index, generation in enumerate(generations):
        for position, token in enumerate(generation.trace or ()):
            if token.verdict == verdict and (not later or token.rank):
                return index, position
    raise AssertionError(f"no token is {verdict}")


def node(view: Any, position: int) -> Any:
    return view.locator(f'[data-place="{position}"]')


def choose(view: Any, index: int) -> None:
    view.locator(f'#results [data-index="{index}"]').click()


def test_pointing_shows_the_candidates(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    index, position = place(spoken, "accepted", later=True)
    choose(view, index)
    popup = view.locator("#popup")
    assert not popup.is_visible()
    node(view, position).hover()
    popup.wait_for(state="visible")
    generation = spoken[index]
    assert generation.trace is not None
    token = generation.trace[position]
    text = popup.inner_text()
    assert f"token {position + 1} of {len(generation.token_ids)}" in text
    assert f"Accepted at rank {token.rank}, after {token.rank} rejection" in text
    rows = popup.locator("tbody tr")
    assert rows.count() == len(token.candidates)
    for rank, candidate in enumerate(token.candidates):
        cells = rows.nth(rank).locator("td").all_inner_texts()
        assert cells[0] == str(rank)
        assert ("✕ rejected" in cells[4]) == (candidate.accepted is False)
        assert ("✓ accepted" in cells[4]) == (candidate.accepted is True)
        assert ("not asked" in cells[4]) == (candidate.accepted is None)
        assert ("chosen" in cells[4]) == (rank == token.rank)
        if candidate.accept_prob is not None and 0.001 < candidate.accept_prob < 0.999:
            assert abs(float(cells[3].strip().rstrip("%")) - 100 * candidate.accept_prob) <= 0.051
    assert generation.counterfactuals
    assert ("Without the agent, from here" in text) == any(
        item.position == position for item in generation.counterfactuals
    )
    box = popup.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1200
    assert box["y"] >= 0 and box["y"] + box["height"] <= 900
    view.mouse.move(2, 2)
    popup.wait_for(state="hidden")


def test_the_popup_can_be_reached_with_the_pointer(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    node(view, 3).hover()
    popup = view.locator("#popup")
    popup.wait_for(state="visible")
    popup.hover(position={"x": 30, "y": 20})
    view.wait_for_timeout(300)
    assert popup.is_visible() and "token 4 of" in popup.inner_text()


@pytest.mark.parametrize("has_touch", [False, True])
def test_its_text_can_be_selected(spoken: list[Generation], opened: Any, has_touch: bool) -> None:
    """A click or a tap in it leaves it there, and what is selected too."""
    view = opened(spoken, has_touch=has_touch, viewport={"width": 500, "height": 800})
    popup = view.locator("#popup")
    if has_touch:
        node(view, 3).tap()
        popup.locator(".reason").tap()
    else:
        node(view, 3).click()
        popup.locator(".reason").dblclick()
    selected = view.evaluate("getSelection().toString().trim()")
    assert has_touch or selected in popup.locator(".reason").inner_text().split(" ")
    view.mouse.move(2, 2)
    view.wait_for_timeout(300)
    assert popup.is_visible() and "token 4 of" in popup.inner_text()
    assert view.evaluate("getSelection().toString().trim()") == selected
    view.keyboard.press("Escape")
    assert not popup.is_visible()
    # The token has the focus again, and what is outside takes it away.
    view.keyboard.press("Enter")
    popup.locator(".reason").click()
    view.locator("h1").click()
    assert not popup.is_visible()


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_token_is_a_button(spoken: list[Generation], opened: Any, key: str) -> None:
    view = opened(spoken)
    node(view, 3).focus()
    view.keyboard.press("Escape")
    assert not view.locator("#popup").is_visible()
    view.keyboard.press(key)
    assert view.locator("#popup").is_visible()
    assert "token 4 of" in view.locator("#popup").inner_text()
    assert view.evaluate("window.scrollY") == 0


def test_a_long_list_is_scrolled(spoken: list[Generation], opened: Any) -> None:
    """To the row that was chosen, and by the keyboard."""
    index, position = place(spoken, "fallback")
    token = spoken[index].tokens[position]
    long = dataclasses.replace(spoken[index].trace[position], rank=5)  # type: ignore[index]
    long = dataclasses.replace(
        long, rank=59, num_candidates=60, candidates=long.candidates[:1] * 59 + long.candidates[-1:]
    )
    assert long.token_id == token.token_id
    generation = dataclasses.replace(spoken[index], trace=(long,), counterfactuals=None)
    view = opened([generation])
    node(view, 0).focus()
    popup = view.locator("#popup")

    def is_shown(row: int) -> bool:
        box, inside = popup.bounding_box(), popup.locator("tbody tr").nth(row).bounding_box()
        return box["y"] <= inside["y"] <= box["y"] + box["height"] - inside["height"]

    assert is_shown(59) and not is_shown(0)
    for _ in range(9):
        view.keyboard.press("PageUp")
    assert is_shown(0) and not is_shown(59)
    view.keyboard.press("ArrowDown")
    assert 0 < popup.evaluate("node => node.scrollTop") < 100
    for _ in range(9):
        view.keyboard.press("PageDown")
    assert is_shown(59) and view.evaluate("window.scrollY") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "random", "threshold": 0.1}, r"Rank \d+, chosen among (\d+) accepted\."),
        ({"strategy": "max_prob", "threshold": 0.9, "top_k": 6}, r"Rank \d+, the only one accep"),
    ],
    ids=str,
)
def test_other_strategies_in_words(options: dict[str, Any], words: str, opened: Any) -> None:
    generations = speaker.engine().generate(
        list(speaker.PROMPTS[:2]), trace=True, max_new_tokens=12, **options
    )
    view = opened(generations)
    found = 0
    for index, generation in enumerate(generations):
        choose(view, index)
        for position, token in enumerate(generation.trace or ()):
            accepted = sum(bool(candidate.accepted) for candidate in token.candidates)
            if token.verdict != "accepted":
                continue
            node(view, position).focus()
            text = view.locator("#popup .reason").inner_text()
            assert "after" not in text and "first asked" not in text
            match = re.match(words, text)
            found += match is not None
            if match is not None and match.groups():
                assert int(match[1]) == accepted > 1
    assert found


def test_the_keyboard_shows_the_same(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    node(view, 2).hover()
    pointed = view.locator("#popup").inner_text()
    view.mouse.move(2, 2)
    view.locator("#popup").wait_for(state="hidden")
    # One stop of the tab key for all tokens, then arrows.
    for _ in range(40):
        view.keyboard.press("Tab")
        if view.evaluate("document.activeElement.dataset.place") == "0":
            break
    else:
        raise AssertionError("the tab key reaches no token")
    assert "token 1 of" in view.locator("#popup").inner_text()
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert view.locator("#popup").inner_text() == pointed
    assert node(view, 2).get_attribute("aria-describedby") == "popup"
    view.keyboard.press("End")
    assert f"token {len(spoken[0].token_ids)} of" in view.locator("#popup").inner_text()
    view.keyboard.press("ArrowRight")
    view.keyboard.press("Home")
    assert "token 1 of" in view.locator("#popup").inner_text()
    view.keyboard.press("Escape")
    assert not view.locator("#popup").is_visible()
    view.keyboard.press("Tab")
    assert not view.locator("#popup").is_visible()


def test_verdicts_in_words(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    for verdict, words in (
        ("fallback", "rejected: fallback to rank"),
        ("plain", "Decoded without an agent."),
    ):
        index, position = place(spoken, verdict)
        choose(view, index)
        node(view, position).focus()
        assert words in view.locator("#popup").inner_text()


def test_changes_one_by_one(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    changed = [p for p, token in enumerate(spoken[0].trace or ()) if token.rank]
    assert len(changed) >= 2
    rows = view.locator('[aria-label="Changes"] tbody tr')
    assert rows.count() == len(changed)
    following = view.get_by_label("Next change")
    for position in [*changed, changed[0]]:
        following.click()
        assert f"token {position + 1} of" in view.locator("#popup").inner_text()
    # By the keyboard the button takes the focus from the token, which stays the one to go on from.
    for position in [*changed[1:], changed[0]]:
        following.press("Enter")
        assert f"token {position + 1} of" in view.locator("#popup").inner_text()
    view.get_by_label("Previous change").click()
    assert f"token {changed[-1] + 1} of" in view.locator("#popup").inner_text()
    view.keyboard.press("Escape")
    rows.nth(1).locator("button").click()
    assert f"token {changed[1] + 1} of" in view.locator("#popup").inner_text()


def test_colour_modes(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken)
    index, position = place(spoken, "fallback")
    choose(view, index)
    colour = "node => getComputedStyle(node).backgroundColor"
    colours = {}
    for mode in ("accept", "rank", "verdict"):
        view.locator(f'[data-value="{mode}"]').click()
        assert view.locator(f'[data-value="{mode}"]').get_attribute("aria-checked") == "true"
        colours[mode] = node(view, position).evaluate(colour)
        # Every colour of the text is explained.
        swatches = view.locator(".legend .swatch").evaluate_all(f"all => all.map({colour})")
        for token in view.locator(".token").all():
            assert token.evaluate(colour) in swatches
    assert len(set(colours.values())) == 3
    # The choice stays with the next result, and the arrows move it.
    choose(view, 0)
    assert view.locator('[aria-label="Answer"]').get_attribute("data-mode") == "verdict"
    view.locator('[data-value="verdict"]').focus()
    view.keyboard.press("ArrowLeft")
    assert view.locator('[aria-label="Answer"]').get_attribute("data-mode") == "rank"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(spoken: list[Generation], opened: Any, scheme: str) -> None:
    view = opened(spoken, color_scheme=scheme)
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 25)"
    assert dark == (scheme == "dark")
    for index in range(len(spoken)):
        choose(view, index)
        view.locator("summary").click()
        for mode in ("accept", "rank", "verdict"):
            for button in view.locator(f'[data-value="{mode}"]').all():
                button.click()
            node(view, 1).focus()
            ratios = view.evaluate(_CONTRAST)
            assert len(ratios) > 80
            assert min(ratios)[0] >= 4.5, min(ratios)
    # Every colour there is, also those that these answers do not have.
    view.evaluate(
        """() => {
          const answer = document.querySelector(".answer");
          const steps = (kind) => [0, 1, 2, 3, 4, 5].map((step) => `${kind}-${step}`);
          const looks = [...steps("accept"), ...steps("rank")];
          answer.replaceChildren(...[...looks, "first", "later changed", "rejected"].map((look) => {
            const made = document.createElement("span");
            made.className = "token " + look;
            made.textContent = look;
            return made;
          }));
        }"""
    )
    for mode in ("accept", "rank", "verdict"):
        view.locator('[aria-label="Answer"]').evaluate("(n, m) => { n.dataset.mode = m; }", mode)
        assert min(view.evaluate(_CONTRAST))[0] >= 4.5, min(view.evaluate(_CONTRAST))


def test_the_colour_scheme_can_be_chosen(spoken: list[Generation], opened: Any) -> None:
    view = opened(spoken[:1], color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = view.evaluate(background)
    view.locator('[data-value="dark"]').click()
    assert view.evaluate(background) != light
    view.locator('[data-value="auto"]').click()
    assert view.evaluate(background) == light
    view.emulate_media(color_scheme="dark")
    assert view.evaluate(background) != light
    view.locator('[data-value="light"]').click()
    assert view.evaluate(background) == light
    assert not view.locator("#results").is_visible()


def test_hostile_texts_are_only_shown(hostile: Generation, opened: Any) -> None:
    view = opened([hostile, hostile])
    assert view.evaluate("window.harmed") is None
    assert view.locator("main img, main script, main b, nav img").count() == 0
    answer = view.locator(".answer").inner_text()
    for text in ("</script><script>window.harmed = 1</script>", "<img src=x", "&lt;b&gt; ${1} `"):
        assert text in answer
    # Controls are signs, and what runs from right to left ends with its own token.
    signs = "⟨U+E0041⟩⟨U+034F⟩⟨U+3164⟩⟨U+2800⟩⟨U+00A0⟩⟨U+115F⟩⟨U+FFA0⟩⟨U+FE01⟩"
    for sign in (
        *("␀␛[31m␇", "⟨U+202E⟩abc⟨U+2066⟩", "⟨U+D83C⟩", "⟨U+2028⟩", "↵", "⇥", "🎉👩‍👩‍👧"),
        signs,
    ):
        assert sign in answer
    for position, token in enumerate(hostile.tokens):
        node(view, position).focus()
        popup = view.locator("#popup")
        assert f"token {position + 1} of {len(hostile.tokens)}" in popup.inner_text()
        assert popup.locator("tbody tr").count() == 3
        box = popup.bounding_box()
        assert box["width"] <= 520 and box["height"] <= 900 * 0.7
        if token.text == "":
            assert "part of a character" in popup.inner_text()
    view.locator("summary").click()
    assert view.evaluate("window.harmed") is None
    # Nothing is wider than the window.
    assert view.evaluate("document.documentElement.scrollWidth") <= 1200


def test_from_right_to_left(hostile: Generation, opened: Any) -> None:
    """Candidates stand where the others do, and the arrows go where they point."""
    trace = [
        dataclasses.replace(
            token,
            text=word,
            candidates=tuple(dataclasses.replace(c, text=word) for c in token.candidates),
        )
        for token, word in zip(hostile.tokens, ("مرحبا", " بالعالم", " سلام"), strict=False)
    ]
    generation = dataclasses.replace(hostile, trace=tuple(trace), counterfactuals=None, error=None)
    view = opened([generation])
    node(view, 0).focus()
    cell = view.locator("#popup tbody td .text").first
    assert cell.evaluate("node => getComputedStyle(node).textAlign") == "left"
    for key, focused in (("ArrowLeft", 1), ("ArrowLeft", 2), ("ArrowRight", 1)):
        before = view.locator(":focus").bounding_box()["x"]
        view.keyboard.press(key)
        assert view.evaluate("document.activeElement.dataset.place") == str(focused)
        assert (view.locator(":focus").bounding_box()["x"] < before) == (key == "ArrowLeft")


def test_without_an_agent(spoken: list[Generation], opened: Any) -> None:
    """Nothing is said of an agent, and no rank is shown that nobody knows."""
    [sampled] = speaker.engine(aligned=False).generate(
        "Hi", trace=True, acceptance="sample", max_new_tokens=12
    )
    failed = dataclasses.replace(
        spoken[0], trace=(), tokens=(), token_ids=[], error="NaN", stats=DecodingStats()
    )
    view = opened([sampled, spoken[0], failed])
    assert "Decoded without an agent." in view.locator('[aria-label="Answer"]').inner_text()
    text = view.locator("main").inner_text()
    for absent in ("Accept probability", "Forced", "change", "asked", "rank"):
        assert absent not in text.partition("Options")[0]
    colour = "all => all.map(node => getComputedStyle(node).backgroundColor)"
    assert set(view.locator(".token").evaluate_all(colour)) == {"rgba(0, 0, 0, 0)"}
    choose(view, 1)
    assert "Accept probability" in view.locator("main").inner_text()
    choose(view, 2)
    text = view.locator("main").inner_text()
    assert "No position was decided before the error." in text and "never asked" not in text


def test_a_narrow_window(spoken: list[Generation], hostile: Generation, opened: Any) -> None:
    view = opened([*spoken, hostile], viewport={"width": 360, "height": 700})
    for index in range(5):
        choose(view, index)
        assert view.evaluate("document.documentElement.scrollWidth") <= 360
        for position in (0, 10):
            node(view, position).click()
            box = view.locator("#popup").bounding_box()
            assert box["x"] == 0 and box["width"] == 360
            # The sheet does not cover what it is about.
            token = node(view, position).bounding_box()
            assert token["y"] + token["height"] <= box["y"] or token["height"] > 300
            view.keyboard.press("Escape")


def test_what_is_tapped_is_shown(spoken: list[Generation], opened: Any) -> None:
    """And not what the page has moved below a mouse that rests."""
    long = dataclasses.replace(spoken[0], trace=(spoken[0].trace or ()) * 12, counterfactuals=None)
    view = opened([long], viewport={"width": 360, "height": 700}, has_touch=True)
    view.mouse.move(180, 300)
    view.evaluate("y => window.scrollTo(0, y)", node(view, 100).bounding_box()["y"] - 640)
    box = node(view, 100).bounding_box()
    view.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    view.wait_for_timeout(400)
    assert "token 101 of" in view.locator("#popup").inner_text()
    token = node(view, 100).bounding_box()
    assert token["y"] + token["height"] <= view.locator("#popup").bounding_box()["y"]


def test_in_a_notebook(spoken: list[Generation], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<body>{spoken[0]._repr_html_()}</body>", encoding="utf-8")
    view = browser.new_page()
    complaints: list[str] = []
    view.on("console", lambda message: complaints.append(message.text))
    view.goto(f"file://{os.fspath(path)}")
    inside = view.frame_locator("iframe")
    inside.locator('[data-place="1"]').hover()
    assert "token 2 of" in inside.locator("#popup").inner_text()
    assert complaints == []
    view.close()
