// The result that is shown, and what a token says of itself when it is pointed at or has the focus.

const popup = document.getElementById("popup");
// place: of the token that was shown last.
const shown = { focused: null, hovered: null, timer: 0, place: -1 };
const pointer = { x: NaN, y: NaN };
let tokens = [];

function why(token, isFirst) {
  const few = (count, one, many) => `${count} ${count === 1 ? one : many}`;
  if (token.verdict === "forced") return "The only candidate: the agent was not asked.";
  if (token.verdict === "plain") return "Decoded without an agent.";
  if (token.verdict === "fallback") return `All ${few(token.num_candidates, "candidate", "candidates")} rejected: fallback to rank ${token.rank}.`;
  const rejected = token.candidates.filter((candidate) => candidate[5] === false).length;
  const accepted = token.candidates.filter((candidate) => candidate[5]).length;
  if (accepted > 1) return `Rank ${token.rank}, chosen among ${accepted} accepted.`;
  // All are asked, those behind it too.
  if (!isFirst) return `Rank ${token.rank}, the only one accepted of ${token.candidates.length}.`;
  return `Accepted at rank ${token.rank}` + (rejected ? `, after ${few(rejected, "rejection", "rejections")}.` : ", the first asked about.");
}

function probability(value, kind) {
  const fill = element("span", { class: "bar-fill" });
  fill.style.width = 100 * (value ?? 0) + "%";
  const track = value === null ? null : element("span", { class: "bar-track" }, fill);
  return element("td", { class: "number " + kind }, percent(value), track);
}

function candidateRow(candidate, rank, chosen) {
  const [id, text, isSpecial, lm, accept, accepted] = candidate;
  const verdict = accepted === null ? ["none", "– not asked"] : accepted ? ["good", "✓ accepted"] : ["bad", "✕ rejected"];
  const look = (accepted === null ? "" : accepted ? "accepted" : "not-accepted") + (rank === chosen ? " chosen" : "");
  return element("tr", { class: look },
    element("td", { class: "number" }, String(rank)),
    element("td", {}, element("bdi", { class: "text" }, named(text, id)), isSpecial ? element("span", { class: "none" }, " special") : null),
    probability(lm, "lm"),
    probability(accept, "agent"),
    element("td", {}, element("span", { class: verdict[0] }, verdict[1]), rank === chosen ? element("span", { class: "tag" }, " chosen") : null));
}

function explain(token, place, result) {
  const head = element("div", { class: "popup-head" },
    element("bdi", { class: "text" }, named(token.text, token.token_id)),
    element("small", {}, `token ${place + 1} of ${result.tokens.length}` + (token.is_special ? ", special" : "")));
  const parts = [head, element("p", { class: "reason" }, why(token, result.is_first))];
  if (token.candidates.length) {
    const titles = ["Rank", "Candidate", "LM", "Agent", "Verdict"];
    parts.push(element("table", {},
      element("thead", {}, element("tr", {}, titles.map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, token.candidates.map((candidate, rank) => candidateRow(candidate, rank, token.rank)))));
  } else {
    parts.push(element("p", { class: "none" }, `LM probability ${percent(token.prob)}`));
  }
  const other = result.counterfactuals[place];
  if (other !== undefined) {
    parts.push(element("div", { class: "otherwise" }, element("span", {}, "Without the agent, from here"), continuation(other, place)));
  }
  return parts;
}

function continuation(other, place) {
  const text = other.text === null ? ["token ids " + other.token_ids.join(", ")] : visible(other.text);
  const end = { length: " …", eos: [" ", mark("■ end")] }[other.finish_reason] ?? "";
  return element("bdi", { class: "instead limit" }, place ? "…" : "", text, end);
}

function show(node) {
  const place = Number(node.dataset.place);
  // What is marked or scrolled in it stays so.
  if (place === shown.place && !popup.hidden) return position(node);
  shown.place = place;
  for (const other of tokens) other.classList.toggle("shown", other === node);
  for (const other of tokens) other.removeAttribute("aria-describedby");
  node.setAttribute("aria-describedby", "popup");
  popup.replaceChildren(...explain(data.results[state.result].tokens[place], place, data.results[state.result]));
  popup.hidden = false;
  position(node);
  popup.scrollTop = 0;
  const chosen = popup.querySelector(".chosen")?.getBoundingClientRect();
  const box = popup.getBoundingClientRect();
  if (chosen && chosen.bottom > box.bottom) popup.scrollTop = chosen.top - box.top - box.height / 2;
}

/** Below the token, or above it where there is more room; never outside of the window. */
function position(node) {
  const box = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const gap = 8;
  const { width, height } = popup.getBoundingClientRect();
  const below = window.innerHeight - box.bottom - gap;
  const top = below >= height || below >= box.top ? box.bottom + gap : box.top - gap - height;
  popup.style.top = Math.max(gap, Math.min(top, window.innerHeight - height - gap)) + "px";
  popup.style.left = Math.max(12, Math.min(box.left - 16, window.innerWidth - width - 12)) + "px";
}

function hide() {
  popup.hidden = true;
  for (const node of tokens) {
    node.classList.remove("shown");
    node.removeAttribute("aria-describedby");
  }
}

function settle() {
  clearTimeout(shown.timer);
  const node = shown.hovered ?? shown.focused;
  if (node) show(node);
  else hide();
}

function leave() {
  clearTimeout(shown.timer);
  // Time to reach the popup with the pointer.
  shown.timer = setTimeout(() => { shown.hovered = null; settle(); }, 140);
}

function go(place) {
  const node = tokens[Math.max(0, Math.min(place, tokens.length - 1))];
  for (const other of tokens) other.tabIndex = other === node ? 0 : -1;
  shown.hovered = null;
  node.focus({ preventScroll: true });
  // It may have had the focus before, with its popup closed.
  shown.focused = node;
  settle();
}

function onKey(event) {
  const node = event.currentTarget;
  const place = Number(node.dataset.place);
  const right = getComputedStyle(node.parentElement).direction === "rtl" ? -1 : 1;
  const target = { ArrowRight: place + right, ArrowLeft: place - right, Home: 0, End: tokens.length - 1, Enter: place, " ": place }[event.key];
  const lines = { ArrowDown: 40, ArrowUp: -40, PageDown: 0.9 * popup.clientHeight, PageUp: -0.9 * popup.clientHeight }[event.key];
  const scrolls = lines !== undefined && !popup.hidden && popup.scrollHeight > popup.clientHeight;
  if (target === undefined && !scrolls) return;
  event.preventDefault();
  if (scrolls) popup.scrollBy(0, lines);
  else go(target);
}

function tokenNode(token, place) {
  // The space before a word is not coloured: it stands between the tokens.
  const [, space, rest] = /^( *)([^]*)$/.exec(token.text ?? "");
  const outside = rest ? space : "";
  const whole = token.text === null ? [mark("#" + token.token_id)] : token.text === "" ? [mark("·")] : visible(token.text.slice(outside.length));
  const node = element("span", { class: classes(token), role: "button", "data-place": place, tabindex: place ? -1 : 0 }, whole);
  node.addEventListener("pointerenter", (event) => {
    // A finger focuses. Where the page has moved below the pointer, nothing is pointed at.
    if (event.pointerType === "touch" || (event.screenX === pointer.x && event.screenY === pointer.y)) return;
    shown.hovered = node;
    settle();
  });
  node.addEventListener("mouseleave", leave);
  node.addEventListener("focus", () => {
    shown.focused = node;
    settle();
    // With the popup there: on a phone it covers what is below.
    node.scrollIntoView({ block: "nearest" });
  });
  node.addEventListener("blur", (event) => { if (event.relatedTarget !== popup) { shown.focused = null; settle(); } });
  node.addEventListener("click", () => go(place));
  node.addEventListener("keydown", onKey);
  return [token.text === null && place ? " " : outside, node];
}

function changeRow(place, result) {
  const token = result.tokens[place];
  const first = token.candidates[0];
  const other = result.counterfactuals[place];
  return element("tr", {},
    element("td", { class: "number" }, element("button", { type: "button", class: "link", onclick: () => go(place) }, String(place + 1))),
    element("td", {}, element("bdi", { class: "text" }, named(token.text, token.token_id)), element("span", { class: "under" }, `rank ${token.rank}`)),
    element("td", {}, first ? element("bdi", { class: "text" }, named(first[1], first[0])) : "–",
      element("span", { class: "under" }, first ? `agent ${percent(first[4])}` : "")),
    element("td", {}, other === undefined ? element("span", { class: "none" }, "–") : continuation(other, place)));
}

function changesTable(result, places) {
  const titles = ["Token", "Taken", "The LM's first", "Without the agent, from here"];
  return element("section", { class: "card", "aria-label": "Changes" },
    element("h2", {}, "Where the language model's first choice was not taken"),
    element("div", { class: "scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, titles.map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, places.map((place) => changeRow(place, result))))));
}

function changes(places) {
  const step = (direction) => {
    const ahead = places.filter((place) => (direction > 0 ? place > shown.place : place < shown.place));
    const around = direction > 0 ? places[0] : places[places.length - 1];
    go((direction > 0 ? ahead[0] : ahead[ahead.length - 1]) ?? around);
  };
  const button = (direction, sign, label) => {
    const made = element("button", { type: "button", "aria-label": label, onclick: () => step(direction) }, sign);
    // The focus stays with the token, which knows where we are.
    made.addEventListener("mousedown", (event) => event.preventDefault());
    return made;
  };
  const text = places.length === 1 ? "1 change" : places.length + " changes";
  return element("div", { class: "changes" }, text, places.length ? [button(-1, "‹", "Previous change"), button(1, "›", "Next change")] : []);
}

function showResult(index) {
  state.result = index;
  shown.hovered = shown.focused = null;
  shown.place = -1;
  hide();
  const result = data.results[index];
  const places = result.tokens.flatMap((token, place) => (token.rank ? [place] : []));
  const isPlain = isWithoutAgent(result);
  const key = element("ul", { class: "legend", "aria-label": "Legend" }, legend());
  const parts = result.tokens.flatMap(tokenNode);
  tokens = parts.filter((part) => typeof part !== "string");
  const answer = element("section", { class: "card", "data-mode": state.mode, "aria-label": "Answer" });
  const choose = (mode) => {
    state.mode = answer.dataset.mode = mode;
    key.replaceChildren(...legend());
  };
  answer.append(
    ...(isPlain
      ? [element("p", { class: "none" }, "Decoded without an agent.")]
      : [element("div", { class: "tools" }, segments(MODES, state.mode, "Colour by", choose), changes(places)), key]),
    element("div", { class: "answer", dir: "auto" }, tokens.length ? parts.filter(Boolean) : element("span", { class: "none" }, "No tokens.")));
  document.getElementById("result").replaceChildren(
    element("section", { class: "card", "aria-label": "Prompt" }, element("h2", {}, "Prompt"), element("div", { class: "prompts" }, promptNodes(result.prompt))),
    answer,
    ...result.alarms.map((alarm) => element("p", { class: "card alarm" }, visible(alarm))),
    ...(result.error ? [element("p", { class: "card error", role: "alert" }, visible(result.error))] : []),
    ...(places.length ? [changesTable(result, places)] : []),
    statistics(result),
    element("details", { class: "card" }, element("summary", {}, "Options"), figures(result.options)));
  for (const button of document.querySelectorAll("#results button")) button.setAttribute("aria-current", String(Number(button.dataset.index) === index));
}

function listResults() {
  const entry = (result, index) => {
    const count = result.tokens.filter((token) => token.rank).length;
    const what = isWithoutAgent(result) ? "without an agent" : count === 1 ? "1 change" : count + " changes";
    const note = [result.id === null ? "" : result.id, `${result.tokens.length} tokens`, what];
    return element("li", {}, element("button", { type: "button", "data-index": index, onclick: () => { showResult(index); window.scrollTo(0, 0); } },
      element("bdi", { class: "prompt-line" }, promptLine(result.prompt)), element("small", {}, visible(note.filter(Boolean).join(" · "), false))));
  };
  const list = document.getElementById("results");
  list.append(element("ol", {}, data.results.map(entry)));
  list.hidden = data.results.length < 2;
}

fillSegments(document.getElementById("themes"), THEMES, "auto", (theme) => { document.documentElement.dataset.theme = theme; });
for (const name of ["pointermove", "pointerdown"]) {
  document.addEventListener(name, (event) => {
    if (event.pointerType !== "touch") Object.assign(pointer, { x: event.screenX, y: event.screenY });
  }, true);
}
popup.addEventListener("mouseenter", () => clearTimeout(shown.timer));
popup.addEventListener("mouseleave", leave);
// A click or a tap in it takes the focus from the token, which stays the one that is shown.
popup.addEventListener("blur", (event) => { if (event.relatedTarget !== tokens[shown.place]) { shown.focused = null; settle(); } });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (document.activeElement === popup) tokens[shown.place].focus({ preventScroll: true });
  shown.hovered = shown.focused = null;
  settle();
});
for (const name of ["scroll", "resize"]) {
  window.addEventListener(name, () => { const node = shown.hovered ?? shown.focused; if (node && !popup.hidden) position(node); }, { passive: true });
}
listResults();
showResult(0);
